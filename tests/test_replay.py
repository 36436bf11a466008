"""The contract of `memory_replay`: gradients of full back-propagation, one autograd node, all or nothing."""

import dataclasses
import functools
import gc
import itertools
import random
import types

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import given, settings
from hypothesis import strategies as st
from replay_cells import (
    CASES,
    WIDTH,
    Case,
    Recurrence,
    aliases,
    assert_close,
    assert_equal,
    encoder_decoder,
    everything,
    gated,
    gradients,
    language_model,
    normal,
    of_module,
    recurrence,
    rows,
    values,
    weigh,
)
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from memformer_kernels import MemformerLMConfig, memory_replay
from memformer_kernels.replay.graph import ForeignTensorError
from memformer_kernels.replay.surroundings import modules_of
from memformer_kernels.training.peak_memory import measure, measure_in_fresh_process, peak_bytes, stored_bytes

pytestmark = pytest.mark.guarantee("G16")

F64, F32 = torch.float64, torch.float32
TOLERANCE = {F64: 1e-12, F32: 5e-6}

every_case = pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())


# Gradients


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@every_case
def test_gradients_equal_full_back_propagation(make, dtype):
    for horizon in (1, 2, 5, 12):
        case = make(horizon, dtype)
        expected = gradients(case, "bptt")
        assert any(g is not None and g.any() for g in expected.values())
        assert_close(gradients(case, "replay"), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("horizon", range(1, 13))
def test_gradients_equal_at_every_horizon(horizon):
    for make in (recurrence, gated, language_model):
        case = make(horizon, F64)
        assert_close(gradients(case, "replay"), gradients(case, "bptt"), TOLERANCE[F64])


@every_case
def test_checkpoint_has_the_bits_of_back_propagation(make):
    case = make(4, F32)
    assert_equal(gradients(case, "checkpoint"), gradients(case, "bptt"))


# what is added up in another order than autograd's: parameters and inputs used more than once a segment
USED_TWICE = {
    "language_model": {"write.key.weight"},
    "masked_language_model": {"write.key.weight"},
    "encoder_decoder": {"write.key.weight", "embedding.weight"},
}


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", [name for name in CASES if name != "aliases"])
def test_gradients_have_the_bits_of_back_propagation_where_each_parameter_is_used_once(name, dtype):
    for horizon in (1, 2, 7):
        case = CASES[name](horizon, dtype)
        replayed, expected = gradients(case, "replay"), gradients(case, "bptt")
        once = expected.keys() - USED_TWICE.get(name, set())
        assert_equal({n: replayed[n] for n in once}, {n: expected[n] for n in once})


@every_case
def test_outputs_and_state_are_those_of_back_propagation(make):
    case = make(3, F32)
    results = [memory_replay(case.cell, case.segments, case.start(), method=m) for m in ("replay", "bptt")]
    (leaves, spec), (expected, expected_spec) = map(pytree.tree_flatten, results)
    assert spec == expected_spec
    for leaf, want in zip(leaves, expected, strict=True):
        if isinstance(want, torch.Tensor):
            assert leaf.requires_grad == want.requires_grad
            assert torch.equal(leaf, want) and leaf.dtype == want.dtype
        else:
            assert leaf == want


@pytest.mark.parametrize("make", [language_model, encoder_decoder], ids=["decoder only", "encoder-decoder"])
def test_dropout_masks_are_replayed(make):
    case = make(4, F64, dropout=0.4)
    expected = gradients(case, "bptt", seed=3)
    assert_close(gradients(case, "replay", seed=3), expected, TOLERANCE[F64])
    with pytest.raises(AssertionError):
        assert_close(gradients(case, "replay", seed=4), expected, 1e-2)


LOSSES = {
    "first segment": lambda outputs, state: weigh(outputs[0]),
    "last segment": lambda outputs, state: weigh(outputs[-1]),
    "every other segment": lambda outputs, state: weigh(outputs[::2]),
    "final state": lambda outputs, state: weigh(state),
    "one output and the final state": lambda outputs, state: weigh((outputs[1], state)),
    "the largest": lambda outputs, state: torch.stack([weigh(o) for o in outputs]).max(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_the_loss_may_see_any_part_of_the_rollout(loss):
    for make in (recurrence, gated, aliases, language_model):
        case = make(4, F64)
        assert_close(gradients(case, "replay", loss), gradients(case, "bptt", loss), TOLERANCE[F64])


class Many(nn.Module):
    """A state of two tensors, outputs of two, and a branch that may be cut: what a fuzz test needs."""

    def __init__(self, cut: set[int]):
        super().__init__()
        torch.manual_seed(17)
        self.a, self.b, self.c = (nn.Parameter(torch.randn(WIDTH, dtype=F64)) for _ in range(3))
        self.unused = nn.Parameter(torch.ones(WIDTH, dtype=F64))
        self.cut = cut

    def forward(self, segment, state):
        t, x = segment
        first, second = state
        if t in self.cut:
            first = first.detach()
        first = torch.tanh(self.a * first + x)
        second = second + (self.b * first if t % 3 else x)
        return (first * x, self.c * second), (first, second)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_choice_of_what_needs_a_gradient_equals_back_propagation(data):
    horizon = data.draw(st.integers(1, 6))
    some = st.sets(st.integers(0, horizon - 1))
    module = Many(cut=data.draw(some))
    frozen = data.draw(st.sets(st.sampled_from("abc"), max_size=2))
    for name in frozen:
        getattr(module, name).requires_grad_(False)
    segments = list(enumerate(rows(horizon, F64, needs_grad=False)))
    for t in data.draw(some):
        segments[t][1].requires_grad_()
    state = tuple(normal(2, WIDTH, needs_grad=data.draw(st.booleans()), seed=s) for s in (3, 4))
    seen, sees_state = data.draw(some), data.draw(st.booleans())
    half = data.draw(st.integers(0, 1))
    case = Case(module, of_module(module), segments, state, [module])

    def loss(outputs, state):
        return weigh(([outputs[t][half] for t in sorted(seen)], state if sees_state else None)) + 0 * module.a.sum()

    module.a.requires_grad_()  # the loss always has something to differentiate
    case.parameters = of_module(module)
    assert_close(gradients(case, "replay", loss), gradients(case, "bptt", loss), TOLERANCE[F64])


def test_a_state_detached_by_the_cell_stops_the_gradient_there():
    case = recurrence(4, F64)
    module = case.cell

    def cell(segment, state):
        t, x = segment
        return module(x, state.detach() if t == 2 else state)

    case.cell, case.segments = cell, list(enumerate(case.segments))
    replayed = gradients(case, "replay", LOSSES["final state"])
    assert_equal(replayed, gradients(case, "bptt", LOSSES["final state"]))
    inputs = [grad is not None for name, grad in replayed.items() if name.startswith("input")]
    assert inputs == [False, False, True, True, False]  # four segments and the state


def test_gradient_reaches_the_initial_memory_and_the_bias_it_is_made_of():
    case = language_model(5, F64)
    (model,) = case.modules
    start = model.initial_memory(2).detach().requires_grad_()
    from_start = Case(case.cell, case.parameters, case.segments, start, [model])
    only_bias = gradients(from_start, "replay")["write.bias"]
    assert from_start.leaves()["input 0"] is start
    assert gradients(from_start, "replay")["input 0"].abs().max() > 0
    through_start = gradients(case, "replay")["write.bias"]
    assert (through_start - only_bias).abs().max() > 1e-6 * only_bias.abs().max()


def test_rollouts_chain_and_the_gradient_stops_where_the_caller_detaches():
    def rollout(method, detach):
        case = recurrence(4, F64)
        outputs, state = memory_replay(case.cell, case.segments[:2], case.state, method=method)
        more, state = memory_replay(case.cell, case.segments[2:], state.detach() if detach else state, method=method)
        weigh((more, state)).backward()
        return {name: leaf.grad for name, leaf in case.leaves().items()}

    for detach in (False, True):
        replayed = rollout("replay", detach)
        assert_close(replayed, rollout("bptt", detach), TOLERANCE[F64])
        assert (replayed["input 0"] is None) == detach


def test_rollouts_nest():
    inner = Recurrence()

    def cell(segments, state):
        outputs, state = memory_replay(inner, segments, state)
        return sum(outputs), state

    segments = rows(6, F64)
    nested = Case(cell, of_module(inner), [segments[:3], segments[3:]], normal(2, WIDTH, needs_grad=True), [inner])
    flat = Case(inner, of_module(inner), segments, nested.state, [inner])
    # a state in between would be weighed differently by `everything`: the sum is the same in both
    loss = lambda outputs, state: sum(outputs) + weigh(state)  # noqa: E731
    assert_close(gradients(nested, "replay", loss), gradients(flat, "bptt", loss), TOLERANCE[F64])


def test_cells_may_differentiate_within_a_segment():
    """A memory that learns by gradient descent while it reads: grad mode must be on in the forward too."""
    module = nn.Linear(WIDTH, WIDTH, dtype=F64)

    def cell(x, memory):
        loss = (x @ memory - module(x)).square().mean()
        (grad,) = torch.autograd.grad(loss, memory, create_graph=True)
        return loss, memory - 0.1 * grad

    case = Case(cell, of_module(module), rows(3, F64), normal(WIDTH, WIDTH, needs_grad=True), [module])
    assert_close(gradients(case, "replay"), gradients(case, "bptt"), TOLERANCE[F64])


def test_cells_may_differentiate_by_their_parameters_within_a_segment():
    """The inner gradient passes the parameter's hooks, as in back-propagation, and no hook of the replay."""
    module = Recurrence()
    module.of_input.weight.register_hook(lambda grad: 1.5 * grad)

    def cell(x, state):
        inner, _ = module(x, state.detach())
        (grad,) = torch.autograd.grad(inner, module.of_input.weight, create_graph=True)
        loss, state = module(x, state)
        return loss + grad.square().sum(), state + grad.mean()

    case = Case(cell, of_module(module), rows(3, F64), normal(2, WIDTH, needs_grad=True), [module])
    assert_close(gradients(case, "replay"), gradients(case, "bptt"), TOLERANCE[F64])


def test_checkpointed_layers_inside_and_checkpoint_around():
    module = Recurrence()

    def cell(x, state):
        return checkpoint(module, x, state, use_reentrant=False)

    case = Case(cell, of_module(module), rows(3, F64), normal(2, WIDTH, needs_grad=True), [module])
    expected = gradients(case, "bptt")
    assert_equal(gradients(case, "replay"), expected)

    outputs = checkpoint(lambda s: memory_replay(module, case.segments, s), case.state, use_reentrant=False)
    everything(*outputs).backward()
    assert_equal({name: leaf.grad for name, leaf in case.leaves().items()}, expected)


def test_saved_tensors_may_be_moved_elsewhere_by_hooks():
    case = recurrence(3, F64)
    expected = gradients(case, "bptt")
    with torch.autograd.graph.save_on_cpu():
        outputs, state = memory_replay(case.cell, case.segments, case.state)
    everything(outputs, state).backward()
    assert_equal({name: leaf.grad for name, leaf in case.leaves().items()}, expected)


def test_the_forward_has_the_bits_of_back_propagation_where_pytorch_has_a_path_without_gradients():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()

    def cell(x, state):
        state = layer(x + state)
        return state.sum(), state

    segments, state = [normal(2, 4, 8, dtype=F32, seed=t) for t in range(3)], torch.zeros(2, 4, 8)
    fast = torch.no_grad()(layer)(segments[0])
    assert not torch.equal(fast, layer(segments[0])), "no such path here: this test says nothing"
    results = [memory_replay(cell, segments, state, method=m, strict=m == "replay") for m in ("replay", "bptt")]
    assert torch.equal(results[0][1], results[1][1])


def test_unused_parameters_get_no_gradient_and_frozen_ones_stay_frozen():
    parts = {"used": Recurrence(), "unused": nn.Linear(2, 2), "frozen": nn.Linear(WIDTH, WIDTH)}
    module = nn.ModuleDict(parts).double()
    module["frozen"].requires_grad_(False)
    calls = []
    module["unused"].weight.register_hook(calls.append)
    module["unused"].weight.register_post_accumulate_grad_hook(calls.append)

    def cell(x, state):
        return module["used"](module["frozen"](x), state)

    outputs, _ = memory_replay(cell, rows(3, F64), torch.zeros(2, WIDTH, dtype=F64))
    sum(outputs).backward()
    assert module["used"].of_input.weight.grad is not None
    assert all(p.grad is None for name in ("unused", "frozen") for p in module[name].parameters())
    assert calls == []


def test_nothing_needs_a_gradient():
    case = recurrence(3, F64)
    module = case.cell.requires_grad_(False)
    outputs, state = memory_replay(module, [x.detach() for x in case.segments], case.state.detach())
    assert not state.requires_grad and not any(o.requires_grad for o in outputs)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_cell_just_runs(mode):
    case = language_model(3, F32)
    (model,) = case.modules
    model.register_buffer("counter", torch.zeros(()))
    with mode():
        start = case.start()
        outputs, state = memory_replay(case.cell, case.segments, start)
        expected, expected_state = memory_replay(case.cell, case.segments, start, method="bptt")
    assert torch.equal(state, expected_state) and all(map(torch.equal, outputs, expected))
    assert not state.requires_grad and state.is_inference() == (mode is torch.inference_mode)


@pytest.mark.parametrize("method", ["replay", "checkpoint", "bptt"])
def test_no_segments_give_the_state_back(method):
    state = (torch.ones(2, requires_grad=True), 3)
    assert memory_replay(Recurrence(), [], state, method=method) == ([], state)


def test_a_state_may_grow_from_nothing():
    module = Recurrence()

    def cell(x, states):
        output, state = module(x, torch.stack(states).mean(0) if states else torch.zeros_like(x))
        return output, [*states, state]

    case = Case(cell, of_module(module), rows(4, F64), [], [module])
    assert_close(gradients(case, "replay"), gradients(case, "bptt"), TOLERANCE[F64])


def test_outputs_may_hold_no_tensor_at_all():
    outputs, state = memory_replay(lambda x, state: ({"name": x}, state + 1), ["a", "b"], 0)
    assert (outputs, state) == ([{"name": "a"}, {"name": "b"}], 2)


def test_sparse_gradients_of_an_embedding():
    embedding = nn.Embedding(5, WIDTH, sparse=True)

    def cell(tokens, state):
        state = torch.tanh(embedding(tokens) + state)
        return state.sum(), state

    segments = [torch.tensor([0, 1]), torch.tensor([1, 1]), torch.tensor([1, 4])]
    grads = []
    for method in ("replay", "bptt"):
        outputs, _ = memory_replay(cell, segments, torch.zeros(2, WIDTH), method=method)
        sum(outputs).backward()
        grads.append(embedding.weight.grad.to_dense())
        assert embedding.weight.grad.is_sparse
        embedding.weight.grad = None
    torch.testing.assert_close(*grads, rtol=5e-6, atol=0)


def test_a_gradient_that_is_handed_on_is_not_added_to():
    """An addition gives both its operands one gradient, in one tensor: the sums must not be made in that."""
    weight = nn.Parameter(normal(2, WIDTH))
    case = Case(lambda x, state: (weight + x, state), {"weight": weight}, rows(3, F64), normal(2, WIDTH))
    assert_equal(gradients(case, "replay"), gradients(case, "bptt"))


def test_outputs_may_be_modified_by_the_caller():
    """Losses are often added up in place; strict compares with what the cell returned, not with what became of it."""
    case = recurrence(3, F64)
    expected = gradients(case, "bptt", lambda outputs, state: 2 * outputs[0] + outputs[1] + outputs[2])
    for strict in (False, True):

        def loss(outputs, state):
            total = outputs[0]
            total *= 2
            total += outputs[1]
            total += outputs[2]
            return total

        assert_equal(gradients(case, "replay", loss, strict=strict), expected)


# One autograd node


def test_hooks_are_called_once_with_the_whole_gradient():
    case = recurrence(4, F64)
    weight, bias = case.cell.of_input.weight, case.cell.of_input.bias
    calls = []

    def scale(grad):
        calls.append(grad.clone())
        return 3 * grad

    weight.register_hook(scale)
    weight.register_post_accumulate_grad_hook(lambda p: calls.append(p.grad.clone()))
    case.state.register_hook(lambda grad: calls.append(grad) or -grad)
    expected = gradients(case, "bptt")
    assert len(calls) == 3
    order = list(weight._backward_hooks)
    replayed = gradients(case, "replay")
    assert len(calls) == 6 and all(any(torch.equal(new, old) for old in calls[:3]) for new in calls[3:])
    assert_equal(replayed, expected)
    assert list(weight._backward_hooks) == order and bias.grad is None


def test_gradients_accumulate_over_rollouts():
    def twice(method):
        case = recurrence(3, F64)
        for seed in (0, 1):
            segments = [x + seed for x in case.segments]
            everything(*memory_replay(case.cell, segments, case.state, method=method)).backward()
        return {name: leaf.grad for name, leaf in case.leaves().items()}

    assert_equal(twice("replay"), twice("bptt"))


def test_parameters_used_outside_the_rollout_too():
    def both(method):
        case = recurrence(3, F64)
        outputs, state = memory_replay(case.cell, case.segments, case.state, method=method)
        loss, _ = case.cell(case.segments[0], state)
        (everything(outputs, state) + loss).backward()
        return {name: leaf.grad for name, leaf in case.leaves().items()}

    assert_close(both("replay"), both("bptt"), TOLERANCE[F64])


def test_the_graph_is_one_node():
    case = recurrence(5, F64)
    outputs, state = memory_replay(case.cell, case.segments, case.state)
    nodes = {o.grad_fn for o in outputs} | {state.grad_fn}
    assert len(nodes) == 1
    leaves = {p.variable for (node,) in [nodes] for p, _ in node.next_functions if p is not None}
    assert {id(leaf) for leaf in leaves} == {id(leaf) for leaf in case.leaves().values()}


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_infinities_of_one_segment_reach_the_parameters(bad):
    """So that a gradient scaler sees them and skips the step."""
    case = recurrence(4, F32)
    loss = lambda outputs, state: 2.0**16 * sum(o * (bad if t == 1 else 1) for t, o in enumerate(outputs))  # noqa: E731
    grads = gradients(case, "replay", loss)
    assert not any(grads[name].isfinite().all() for name in case.parameters)


def test_gradient_scaler_skips_the_step_and_then_takes_it():
    case = recurrence(3, F32)
    optimizer = torch.optim.SGD(case.cell.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = values(case.parameters)
    for overflow in (True, False):
        optimizer.zero_grad()
        outputs, _ = memory_replay(case.cell, case.segments, case.state)
        scaler.scale(outputs[0] * (float("inf") if overflow else 1) + outputs[2]).backward()
        scaler.step(optimizer)
        scaler.update()
        unchanged = all(torch.equal(p, before[name]) for name, p in case.parameters.items())
        assert unchanged == overflow
    assert scaler.get_scale() == 2.0**7


def test_second_backward_needs_the_graph_kept():
    case = recurrence(3, F64)
    loss = everything(*memory_replay(case.cell, case.segments, case.state))
    loss.backward(retain_graph=True)
    once = values({name: leaf.grad for name, leaf in case.leaves().items()})
    loss.backward()
    twice = {name: leaf.grad for name, leaf in case.leaves().items()}
    assert_equal(twice, {name: 2 * grad for name, grad in once.items()})
    outputs, _ = memory_replay(case.cell, case.segments, case.state)
    outputs[0].backward()
    with pytest.raises(RuntimeError, match="backward runs once unless retain_graph=True"):
        outputs[0].backward()


def test_a_second_derivative_is_refused():
    case = recurrence(2, F64)
    loss = everything(*memory_replay(case.cell, case.segments, case.state))
    with pytest.raises(NotImplementedError, match='no second derivative.*method="bptt" has'):
        torch.autograd.grad(loss, case.state, create_graph=True)


def test_only_some_gradients_may_be_asked_for():
    case = recurrence(3, F64)
    expected = gradients(case, "bptt")
    loss = everything(*memory_replay(case.cell, case.segments, case.state))
    (grad,) = torch.autograd.grad(loss, case.segments[1])
    assert torch.equal(grad, expected["input 1"])
    assert all(leaf.grad is None for leaf in case.leaves().values())


# All or nothing


class Planted(nn.Module):
    """Every kind of thing that an exception could leave half done; `bomb` is called once a segment."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(21)
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=F64)
        self.norm = nn.BatchNorm1d(WIDTH, dtype=F64)
        self.dropout = nn.Dropout(0.3)
        self.register_buffer("in_place", torch.ones(WIDTH, dtype=F64))
        self.register_buffer("assigned", torch.ones(WIDTH, dtype=F64))
        self.register_buffer("constant", torch.full((WIDTH,), 0.5, dtype=F64))
        self.numpy, self.python = np.random.default_rng(1), random.Random(2)
        self.generator = torch.Generator().manual_seed(3)
        self.sources = (self.numpy, self.python, self.generator)
        self.bomb = lambda: None

    def forward(self, x, state):
        x = self.dropout(self.norm(self.linear(x)) * self.in_place.clone() + self.assigned * self.constant)
        x = x * (1 + self.python.random() + self.numpy.random()) + torch.rand((), generator=self.generator)
        with torch.no_grad():
            self.in_place.lerp_(x.detach().mean(0), 0.1)
            self.assigned = 0.9 * self.assigned + 0.1 * x.detach().mean(0)
        self.bomb()
        state = torch.tanh(x + state)
        return state.square().sum(), state


def _planted(horizon=4):
    module = Planted()
    return Case(module, of_module(module), rows(horizon, F64), normal(2, WIDTH, needs_grad=True), [module])


def _surroundings(case):
    """All that a failed call must leave alone."""
    (module,) = case.modules
    return {
        "grad": {name: values(leaf.grad) for name, leaf in case.leaves().items()},
        "grad identities": {name: id(leaf.grad) for name, leaf in case.leaves().items()},
        "inputs": values({name: leaf for name, leaf in case.leaves().items()}),
        "buffers": values(dict(module.named_buffers())),
        "buffer identities": {name: id(b) for name, b in module.named_buffers()},
        "random": torch.get_rng_state(),
        "sources": (module.numpy.bit_generator.state, module.python.getstate(), module.generator.get_state()),
        "hooks": {name: list((leaf._backward_hooks or {}).items()) for name, leaf in case.leaves().items()},
        "training": [m.training for m in module.modules()],
    }


def _assert_same(actual, expected):
    actual, expected = pytree.tree_flatten(actual), pytree.tree_flatten(expected)
    assert actual[1] == expected[1]
    for a, b in zip(actual[0], expected[0], strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class Bomb:
    """Goes off at one call."""

    def __init__(self, at, error):
        self.at, self.error, self.calls = at, error, 0

    def __call__(self):
        self.calls += 1
        if self.calls - 1 == self.at:
            raise self.error("planted")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", range(8), ids=lambda at: f"{('forward', 'replay')[at // 4]}, call {at % 4}")
def test_an_exception_in_any_segment_leaves_everything_as_it_was(at, error):
    case = _planted()
    (module,) = case.modules
    for leaf in case.leaves().values():
        leaf.grad = torch.full_like(leaf, 0.25)
    module.linear.weight.register_hook(lambda grad: grad)
    module.linear.weight.register_hook(lambda grad: 2 * grad)
    module.bomb = Bomb(at, error)
    if at < 4:
        before = _surroundings(case)
        with pytest.raises(error, match="planted"):
            memory_replay(module, case.segments, case.state, random_sources=module.sources)
    else:
        options = dict(activation_budget=0, random_sources=module.sources)  # every segment is run again
        outputs, state = memory_replay(module, case.segments, case.state, **options)
        torch.rand(3), module.python.random(), module.numpy.random(5)
        before = _surroundings(case)
        with pytest.raises(error, match="planted"):
            everything(outputs, state).backward()
    assert module.bomb.calls == at + 1
    _assert_same(_surroundings(case), before)


@pytest.mark.parametrize("at", [2, 5], ids=["in the forward", "in the replay"])
def test_after_an_exception_a_call_gives_the_right_result(at):
    failed, other = _planted(), _planted()
    failed.cell.bomb = Bomb(at, RuntimeError)
    with pytest.raises(RuntimeError, match="planted"):
        gradients(failed, "replay", seed=5, random_sources=failed.cell.sources)
    if at >= 4:  # its forward was a success, and counts
        gradients(other, "bptt", seed=5)
    failed.cell.bomb = lambda: None
    replayed = gradients(failed, "replay", seed=6, random_sources=failed.cell.sources)
    assert_close(replayed, gradients(other, "bptt", seed=6), TOLERANCE[F64])
    _assert_same(values(dict(failed.cell.named_buffers())), values(dict(other.cell.named_buffers())))


def test_an_exception_without_gradients_leaves_everything_as_it_was():
    case = _planted()
    case.cell.bomb = Bomb(2, RuntimeError)
    before = _surroundings(case)
    with torch.no_grad(), pytest.raises(RuntimeError, match="planted"):
        memory_replay(case.cell, case.segments, case.state, random_sources=case.cell.sources)
    _assert_same(_surroundings(case), before)


# What replay preserves


def test_buffers_and_random_state_are_as_after_back_propagation():
    def passes(method):
        case = _planted()
        (module,) = case.modules
        torch.manual_seed(8)
        options = {"random_sources": module.sources} if method == "replay" else {}
        outputs, state = memory_replay(module, case.segments, case.state, method=method, **options)
        after_forward = _surroundings(case)
        everything(outputs, state).backward()
        after_backward = _surroundings(case)
        for key in ("buffers", "buffer identities", "random", "sources"):
            _assert_same(after_backward[key], after_forward[key])
        return after_forward, {name: leaf.grad for name, leaf in case.leaves().items()}, values(outputs)

    replayed, expected = passes("replay"), passes("bptt")
    for key in ("buffers", "random", "sources"):
        _assert_same(replayed[0][key], expected[0][key])
    assert replayed[0]["buffers"]["norm.num_batches_tracked"] == 4
    assert_close(replayed[1], expected[1], TOLERANCE[F64])
    _assert_same(replayed[2], expected[2])


def test_what_the_replay_sees_is_what_the_segment_saw():
    """Buffers that change along the rollout, and again between the passes, modules switched to eval in between."""
    expected = gradients(_planted(), "bptt", seed=9)
    case = _planted()
    torch.manual_seed(9)
    outputs, state = memory_replay(case.cell, case.segments, case.state, random_sources=case.cell.sources, strict=True)
    case.cell.eval()
    case.cell.in_place.add_(100)
    case.cell.assigned = case.cell.assigned + 100
    torch.rand(1), case.cell.numpy.random(), case.cell.python.random()
    buffers = values(dict(case.cell.named_buffers()))
    everything(outputs, state).backward()
    assert_close({name: leaf.grad for name, leaf in case.leaves().items()}, expected, TOLERANCE[F64])
    _assert_same(values(dict(case.cell.named_buffers())), buffers)
    assert not any(module.training for module in case.cell.modules())


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "assigned"])
def test_each_segment_is_replayed_with_its_own_buffers_any_number_of_times(in_place):
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(normal(WIDTH))
            self.register_buffer("mean", torch.ones(WIDTH, dtype=F64))

        def forward(self, x, state):
            state = torch.tanh(self.weight * x * self.mean.clone() + state)
            mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
            self.mean = self.mean.copy_(mean) if in_place else mean
            return state.sum(), state

    def case():
        module = Cell()
        return Case(module, of_module(module), rows(4, F64), normal(2, WIDTH, needs_grad=True), [module])

    expected = gradients(case(), "bptt")
    replayed = case()
    loss = everything(*memory_replay(replayed.cell, replayed.segments, replayed.state))
    for _ in range(2):
        for leaf in replayed.leaves().values():
            leaf.grad = None
        loss.backward(retain_graph=True)
        assert_equal({name: leaf.grad for name, leaf in replayed.leaves().items()}, expected)


def test_a_buffer_that_a_kept_graph_reads_may_change_between_the_passes():
    class Cell(Recurrence):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", normal(WIDTH))

        def forward(self, x, state):
            return super().forward(x * self.mean, state)

    def passes(change):
        module = Cell()
        case = Case(module, of_module(module), rows(3, F64), normal(2, WIDTH, needs_grad=True), [module])
        loss = everything(*memory_replay(module, case.segments, case.state))
        module.mean.add_(change)
        loss.backward()
        return {name: leaf.grad for name, leaf in case.leaves().items()}

    assert_equal(passes(100.0), passes(0.0))


def test_a_buffer_that_needs_a_gradient_gets_it():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", normal(WIDTH, needs_grad=True))

        def forward(self, x, state):
            state = torch.tanh(self.scale * x + state)
            return state.sum(), state

    module = Cell()
    case = Case(module, {"scale": module.scale}, rows(3, F64), normal(2, WIDTH), [module])
    assert_equal(gradients(case, "replay"), gradients(case, "bptt"))


SOURCES = {
    "torch.Generator": lambda: (s := torch.Generator().manual_seed(4), lambda: torch.rand((), generator=s).item()),
    "random.Random": lambda: (s := random.Random(4), s.random),
    "module random": lambda: (random.seed(4), (random, random.random))[1],
    "numpy Generator": lambda: (s := np.random.default_rng(4), s.random),
    "numpy Generator on MT19937": lambda: (s := np.random.Generator(np.random.MT19937(4)), s.random),
    "numpy RandomState": lambda: (s := np.random.RandomState(4), s.rand),
    "module numpy.random": lambda: (np.random.seed(4), (np.random, np.random.rand))[1],
}


@pytest.mark.parametrize("make_source", SOURCES.values(), ids=SOURCES.keys())
def test_random_sources_handed_over_are_replayed_and_others_found_by_strict(make_source):
    def case_and_source():
        source, draw = make_source()
        case = recurrence(3, F64)
        module = case.cell
        case.cell = lambda x, state: module(x * (1 + draw()), state)
        return case, source, draw

    case, _, draw = case_and_source()
    expected = gradients(case, "bptt")
    after = draw()
    case, source, draw = case_and_source()
    assert_equal(gradients(case, "replay", random_sources=[source], strict=True), expected)
    assert draw() == after
    case, source, draw = case_and_source()
    with pytest.raises(RuntimeError, match=r"segment 2 gave another result .*strict=True.*random_sources"):
        gradients(case, "replay", strict=True)
    case, source, draw = case_and_source()
    with pytest.raises(AssertionError):
        assert_close(gradients(case, "replay"), expected, 1e-3)


@pytest.mark.parametrize("part", ["output", "state"])
def test_strict_finds_hidden_state_in_the_segment_that_it_changes(part):
    """One bit in one segment, in the output or in the state alone."""
    case = recurrence(5, F64)
    module, runs = case.cell, []

    def cell(segment, state):
        t, x = segment
        output, state = module(x, state)
        runs.append(t)
        if t == 1 and runs.count(1) == 2:
            smallest = torch.finfo(F64).eps
            output, state = (output * (1 + smallest), state) if part == "output" else (output, state * (1 + smallest))
        return output, state

    case.cell, case.segments = cell, list(enumerate(case.segments))
    with pytest.raises(RuntimeError, match="segment 1 gave another result"):
        gradients(case, "replay", strict=True)
    runs.clear()
    assert_close(gradients(case, "replay"), gradients(case, "bptt"), 1e-12)


def test_strict_accepts_nan():
    case = recurrence(2, F64)
    module = case.cell
    case.cell = lambda x, state: module(x * float("nan"), state)
    assert gradients(case, "replay", strict=True)["of_state.weight"].isnan().all()


def _optimizer_step(case):
    torch.optim.SGD(case.cell.parameters(), lr=0.1).step()


EDITS = {
    "optimizer step": _optimizer_step,
    "parameter": lambda case: case.cell.of_input.weight.mul_(2),
    "freezing": lambda case: case.cell.of_input.weight.requires_grad_(False),
    "segment": lambda case: case.segments[1].add_(1),
    "state": lambda case: case.state.zero_(),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_edits_between_the_passes_raise(edit):
    case = recurrence(3, F64)
    for leaf in case.leaves().values():
        leaf.grad = torch.ones_like(leaf)
    loss = everything(*memory_replay(case.cell, case.segments, case.state))
    with torch.no_grad():
        edit(case)
    with pytest.raises(RuntimeError, match="parameters, segments and state must not change between"):
        loss.backward()
    assert all(torch.equal(leaf.grad, torch.ones_like(leaf)) for leaf in case.leaves().values())


def test_edits_of_an_output_that_is_the_state_raise():
    def cell(x, state):
        state = state + x
        return state, state

    outputs, state = memory_replay(cell, rows(3, F64), normal(2, WIDTH))
    loss = weigh(state)
    with torch.no_grad():
        outputs[1].zero_()
    with pytest.raises(RuntimeError, match="must not change between forward and backward"):
        loss.backward()


def test_edits_of_what_the_rollout_does_not_use_are_no_matter():
    module = nn.ModuleDict({"used": Recurrence(), "unused": nn.Linear(2, 2)})
    case = recurrence(3, F64)
    loss = everything(*memory_replay(lambda x, s: module["used"](x, s), case.segments, case.state))
    with torch.no_grad():
        module["unused"].weight.zero_()
    loss.backward()
    assert module["used"].of_input.weight.grad.any()


def _in_place(case):
    """Cells that modify what they must not."""
    module, counter = case.cell, torch.zeros(1, dtype=torch.long)

    def of_segment(x, state):
        x[0].mul_(2)
        return module(x, state)

    def of_state(x, state):
        hidden, count = state
        output, hidden = module(x, hidden)
        count += 1
        return output, (hidden, count)

    case.segments = [x.detach() for x in case.segments]
    return {"segment": (of_segment, case.state), "state": (of_state, (case.state, counter))}


@pytest.mark.parametrize("which", ["segment", "state"])
def test_a_cell_that_modifies_its_segment_or_state_raises(which):
    case = recurrence(3, F64)
    cell, state = _in_place(case)[which]
    with pytest.raises(RuntimeError, match="must not modify its segment or its state in place, .* segment 0"):
        memory_replay(cell, case.segments, state)


def test_a_cell_that_modifies_a_state_with_a_gradient_raises():
    def cell(x, state):
        state += x
        return state.sum(), state

    with pytest.raises(RuntimeError, match="in-place|in place"):
        memory_replay(cell, rows(2, F64), normal(2, WIDTH, needs_grad=True))


@pytest.mark.parametrize("horizon", [1, 3])
def test_a_cell_that_modifies_its_parameters_raises(horizon):
    case = recurrence(horizon, F64)
    module = case.cell

    def cell(x, state):
        result = module(x, state)
        with torch.no_grad():
            module.of_input.weight.mul_(0.5)
        return result

    case.cell = cell
    with pytest.raises(RuntimeError, match=r"got a modified parameter of shape \[6, 6\]"):
        gradients(case, "replay")


@pytest.mark.parametrize("where", [0, 2])
def test_a_tensor_with_a_graph_from_outside_is_refused_before_anything_changes(where):
    case = _planted()
    (module,) = case.modules
    weight = nn.Parameter(torch.ones(WIDTH, dtype=F64))
    doubled = 2 * weight

    def cell(segment, state):
        t, x = segment
        return module(x * doubled if t == where else x, state)

    before = _surroundings(case)
    with pytest.raises(ForeignTensorError, match="got a tensor made outside it by MulBackward0; pass that tensor in"):
        memory_replay(cell, list(enumerate(case.segments)), case.state, random_sources=module.sources)
    _assert_same(_surroundings(case), before)


@dataclasses.dataclass
class Opaque:
    """No pytree: what it holds cannot be seen."""

    held: object


def test_tensors_hidden_in_objects_are_refused():
    module = Recurrence()

    def in_state(x, state):
        output, new = module(x, state.held)
        return output, Opaque(new)

    def in_output(x, state):
        output, new = module(x, state)
        return Opaque({"loss": [output]}), new

    start = torch.zeros(2, WIDTH, dtype=F64)
    for cell, state in ((in_state, Opaque(start)), (in_output, start)):
        with pytest.raises(TypeError, match="must return pytrees, got tensors inside Opaque; .*register_pytree_node"):
            memory_replay(cell, rows(3, F64), state)
    # one without a graph is a value like any other
    outputs, _ = memory_replay(lambda x, s: (Opaque(x.detach()), module(x, s)[1]), rows(3, F64), start)
    assert isinstance(outputs[0], Opaque)


def test_parameters_used_only_in_a_later_segment():
    module = nn.ModuleDict({"always": Recurrence(), "later": nn.Linear(WIDTH, WIDTH, dtype=F64)})
    bare = nn.Parameter(normal(WIDTH))

    def cell(segment, state):
        t, x = segment
        return module["always"](module["later"](x) * bare if t == 2 else x, state)

    parameters = {**of_module(module), "bare": bare}
    case = Case(cell, parameters, list(enumerate(rows(4, F64))), normal(2, WIDTH), [module])
    assert_equal(gradients(case, "replay"), gradients(case, "bptt"))


def test_a_parameter_that_took_the_place_of_another_between_the_passes_raises():
    case = recurrence(2, F64)
    loss = everything(*memory_replay(case.cell, case.segments, case.state, activation_budget=0))
    case.cell.of_input.weight = nn.Parameter(torch.ones(WIDTH, WIDTH, dtype=F64))
    with pytest.raises(RuntimeError, match="got a parameter in the place of another"):
        loss.backward()


def test_a_parameter_that_only_the_replay_uses_raises():
    case = recurrence(2, F64)
    late, runs = nn.Parameter(normal(WIDTH)), []

    def cell(x, state):
        runs.append(x)
        return case.cell(x * late if len(runs) > 2 else x, state)

    loss = everything(*memory_replay(cell, case.segments, case.state, activation_budget=0))
    with pytest.raises(RuntimeError, match=r"segment 1 used a parameter of shape \[6\] when it was replayed that"):
        loss.backward()


@pytest.mark.parametrize("what", ["fewer outputs", "an output without a gradient"])
def test_a_replay_that_makes_other_outputs_raises(what):
    case = recurrence(2, F64)
    module, runs = case.cell, []

    def cell(x, state):
        output, state = module(x, state)
        runs.append(x)
        outputs = [output, output * 2]
        if len(runs) > 2:
            outputs = [output] if what == "fewer outputs" else [output, outputs[1].detach()]
        return outputs, state

    loss = everything(*memory_replay(cell, case.segments, case.state, activation_budget=0))
    with pytest.raises(RuntimeError, match="segment 1 made other outputs when it was replayed"):
        loss.backward()


# Autocast


def _autocast(cache=True, dtype=torch.bfloat16):
    return torch.autocast("cpu", dtype=dtype, cache_enabled=cache)


def test_autocast_is_entered_again_by_the_backward_outside_it():
    """Bit for bit where autocast has no cache: with it, back-propagation adds up a weight's gradient in bfloat16."""
    case = recurrence(4, F32)
    module = case.cell
    case.cell = lambda x, state: module(x, state.float())

    def grads(method):
        with _autocast(cache=False):
            outputs, state = memory_replay(case.cell, case.segments, case.state, method=method)
        assert not torch.is_autocast_enabled("cpu")
        everything(outputs, state).backward()
        found = {name: leaf.grad for name, leaf in case.leaves().items()}
        for leaf in case.leaves().values():
            leaf.grad = None
        return found

    replayed = grads("replay")
    assert_equal(replayed, grads("bptt"))
    with pytest.raises(AssertionError):
        assert_equal(replayed, gradients(case, "bptt"))


@pytest.mark.parametrize("make", [language_model, encoder_decoder], ids=["decoder only", "encoder-decoder"])
def test_models_under_autocast_are_as_near_to_the_truth_as_back_propagation(make):
    truth = gradients(make(6, F64), "bptt")
    errors = {}
    for method in ("replay", "bptt"):
        with _autocast():
            grads = gradients(make(6, F32), method)
        errors[method] = _distance(grads, truth)
    assert 1e-4 < errors["replay"] <= errors["bptt"] * 1.02


def _distance(grads, truth):
    """Relative error of all gradients as one vector."""
    differences = sum((grads[name].double() - want).square().sum() for name, want in truth.items())
    return (differences / sum(want.square().sum() for want in truth.values())).sqrt().item()


def test_autocast_that_is_on_in_the_backward_only_stays_out_of_the_replayed_forward():
    """PyTorch's backward operations do run under it: not recommended, but the same in back-propagation."""

    def grads(method):
        case = recurrence(3, F32)
        loss = everything(*memory_replay(case.cell, case.segments, case.state, method=method))
        with _autocast():
            loss.backward()
        return {name: leaf.grad for name, leaf in case.leaves().items()}

    assert_equal(grads("replay"), grads("bptt"))


@pytest.mark.parametrize("decorated", [False, True], ids=["plain", "with an autocast of its own"])
def test_a_weight_used_before_and_after_the_rollout_in_one_autocast_region_gets_all_gradients(decorated):
    """Autocast caches cast weights with their graph; the rollout must neither use nor leave any."""

    def grad(method, parts):
        module = Recurrence(F32)
        cell = torch.autocast("cpu", dtype=torch.bfloat16)(module.forward) if decorated else module
        x = rows(3, F32)
        with _autocast():
            before = module.of_input(x[0]).float().sum()
            outputs, _ = memory_replay(lambda a, b: cell(a, b.float()), x, torch.zeros(2, WIDTH), method=method)
            after = module.of_input(x[1]).float().square().sum()
            total = sum(p for p, wanted in zip((before, sum(outputs), after), parts, strict=True) if wanted)
            total.backward()
        return module.of_input.weight.grad

    whole = grad("replay", (True, True, True))
    parts = [grad("replay", tuple(i == j for j in range(3))) for i in range(3)]
    torch.testing.assert_close(whole, sum(parts), rtol=1e-2, atol=1e-2 * whole.abs().max().item())
    torch.testing.assert_close(whole, grad("bptt", (True, True, True)), rtol=2e-2, atol=2e-2 * whole.abs().max().item())
    assert min(p.abs().max() for p in parts) > 0.05 * whole.abs().max()


def test_a_rollout_without_gradients_in_an_autocast_region_cuts_nothing_off():
    """The cast weights that it made have no graph, and must not be found in autocast's cache afterwards."""
    module, x = Recurrence(F32), rows(2, F32)
    with _autocast():
        with torch.no_grad():
            memory_replay(lambda a, b: module(a, b.float()), x, torch.zeros(2, WIDTH))
        loss = module.of_input(x[0]).float().sum()
    loss.backward()
    assert module.of_input.weight.grad is not None


# Low precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_low_precision_is_at_least_as_near_to_the_truth_as_back_propagation(dtype):
    case, exact = recurrence(64, dtype), recurrence(64, F64)
    for name, leaf in exact.leaves().items():
        leaf.data.copy_(case.leaves()[name])
    loss = lambda outputs, state: sum(o.double() for o in outputs)  # noqa: E731
    truth = gradients(exact, "bptt", loss)
    errors = {}
    for method in ("replay", "bptt"):
        grads = gradients(case, method, loss)
        assert all(grad.dtype == dtype for grad in grads.values())
        errors[method] = _distance({n: grads[n] for n in case.parameters}, {n: truth[n] for n in case.parameters})
    assert errors["replay"] <= errors["bptt"]
    assert errors["replay"] <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("dtype", "horizon"), [(torch.bfloat16, 300), (torch.float16, 2100)])
def test_gradients_of_parameters_are_added_up_in_float32(dtype, horizon):
    """A sum of ones, which in bfloat16 stops at 256 and in float16 at 2048."""
    weight = nn.Parameter(torch.ones((), dtype=dtype))
    outputs, _ = memory_replay(lambda x, state: (weight * x, state), [1.0] * horizon, None)
    torch.stack(outputs).float().sum().backward()
    assert weight.grad.item() == horizon


# Batches


def test_splitting_the_batch_gives_the_same_bits():
    """For a cell whose own operations work row by row, as those of the package do."""
    torch.manual_seed(0)
    weight, bias = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def cell(x, state):
        mixed = (x * weight).sum(-1, keepdim=True)
        state = torch.tanh(state * bias + mixed * x)
        return (state * x).sum(-1), state

    segments = [normal(5, WIDTH, dtype=F32, seed=t) for t in range(4)]
    start = normal(5, WIDTH, dtype=F32, seed=9)

    def run(batch):
        xs, state = [x[batch].clone().requires_grad_() for x in segments], start[batch].clone().requires_grad_()
        outputs, final = memory_replay(cell, xs, state)
        (sum(o.square().sum() for o in outputs) + final.sum()).backward()
        return [*(o.detach() for o in outputs), final.detach(), *(x.grad for x in xs), state.grad]

    whole = run(slice(0, 5))
    for parts in ([slice(0, 1), slice(1, 5)], [slice(0, 3), slice(3, 5)]):
        joined = [torch.cat(pieces) for pieces in zip(*(run(part) for part in parts), strict=True)]
        assert all(map(torch.equal, joined, whole))


# Compiled cells


def test_compiled_cells():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.linear, self.norm = nn.Linear(WIDTH, WIDTH, dtype=F64), nn.BatchNorm1d(WIDTH, dtype=F64)

        def forward(self, x, state):
            state = torch.tanh(self.norm(self.linear(x)) + state)
            return state.square().sum(), state

    def run(method, compile):
        module = Cell()
        case = Case(compile(module), of_module(module), rows(4, F64), normal(2, WIDTH, needs_grad=True), [module])
        return gradients(case, method), values(dict(module.named_buffers()))

    expected = run("bptt", lambda module: module)
    for compiled in (
        lambda module: torch.compile(module, backend="aot_eager"),
        lambda module: torch.compile(lambda x, state: module(x, state), backend="aot_eager"),
    ):
        replayed = run("replay", compiled)
        assert_close(replayed[0], expected[0], TOLERANCE[F64])
        _assert_same(replayed[1], expected[1])


# Where modules are found


NET = nn.BatchNorm1d(1)
NETS = types.ModuleType("nets")
NETS.net = NET


def _finds(net):
    """Cells that use `net`, each in its own way."""
    in_list, in_dict = [[net]], {"net": (net,)}

    def default(x, state, net=net):
        return net(x), state

    def keyword_default(x, state, *, net=net):
        return net(x), state

    def calls_another(x, state):
        return default(x, state)

    class Callable:
        __slots__ = ("net",)

        def __init__(self):
            self.net = net

        def __call__(self, x, state):
            return self.net(x), state

    class CallsGlobal:
        def __call__(self, x, state):
            return NET(x), state

    class Holder:
        def __init__(self):
            self.inner = types.SimpleNamespace(net=net)
            self.many = [net]

        def step(self, x, state):
            return self.inner.net(x), state

    return {
        "module": net,
        "forward": net.forward,
        "closure": lambda x, state: (net(x), state),
        "global": lambda x, state: (NET(x), state),
        "global inside a comprehension": lambda x, state: ([NET(y) for y in x], state),
        "attribute of a Python module": lambda x, state: (NETS.net(x), state),
        "list": lambda x, state: (in_list[0][0](x), state),
        "dict": lambda x, state: (in_dict["net"][0](x), state),
        "default": default,
        "keyword default": keyword_default,
        "another function": calls_another,
        "partial": functools.partial(lambda n, x, state: (n(x), state), net),
        "object with slots": Callable(),
        "object that calls a global": CallsGlobal(),
        "bound method": Holder().step,
        "decorated": torch.autocast("cpu")(default),
        "compiled": torch.compile(default, backend="eager"),
    }


@pytest.mark.parametrize("way", _finds(NET))
def test_modules_are_found(way):
    assert any(NET in list(module.modules()) for module in modules_of(_finds(NET)[way]))


def test_functions_of_libraries_are_not_searched():
    def cell(x, state):
        return torch.nn.functional.gelu(x) * np.mean(3) * random.random(), itertools.count

    assert modules_of(cell) == []


# Arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cell": 3}, TypeError, r"memory_replay: cell must be callable as cell\(segment, state\), got int"),
        ({"segments": torch.ones(3, 2)}, TypeError, "memory_replay: segments must be a sequence, .* got Tensor"),
        ({"segments": iter([])}, TypeError, "memory_replay: segments must be a sequence, .* got list_iterator"),
        ({"method": "rtrl"}, ValueError, "memory_replay: method must be one of replay, checkpoint, bptt, got 'rtrl'"),
        ({"method": "bptt", "strict": True}, ValueError, 'strict must be left out unless method="replay", got True'),
        ({"method": "checkpoint", "random_sources": [random]}, ValueError, "random_sources must be left out unless"),
        ({"random_sources": torch.Generator()}, TypeError, "random_sources must be a sequence, .* got Generator"),
        ({"random_sources": ["seed"]}, TypeError, r"random_sources must hold torch.Generator, .* got str"),
        ({"cell": lambda x, s: x}, TypeError, r"cell must return \(output, next_state\), got Tensor"),
        ({"cell": lambda x, s: (x, s, s)}, TypeError, r"cell must return \(output, next_state\), got tuple"),
    ],
)
def test_wrong_arguments_raise(arguments, error, message):
    arguments = {"cell": Recurrence(), "segments": rows(2, F64), "state": torch.zeros(2, WIDTH, dtype=F64), **arguments}
    cell, segments, state = (arguments.pop(name) for name in ("cell", "segments", "state"))
    with pytest.raises(error, match=message):
        memory_replay(cell, segments, state, **arguments)


# Memory


MEASURED = MemformerLMConfig(vocabulary=64, width=32, heads=2, layers=2, hidden=64, slots=8, segment_length=64)
RANDOM_STATE = torch.get_rng_state().numel()


def test_peak_memory_of_replay_is_one_segment_and_the_memories():
    one_segment = measure("bptt", 1, MEASURED)
    few, many = (measure("replay", horizon, MEASURED) for horizon in (4, 32))
    stored = stored_bytes(32, MEASURED) - stored_bytes(4, MEASURED)
    assert stored == 28 * 8 * 32 * 4
    growth = many - few - stored
    assert abs(growth - 28 * RANDOM_STATE) <= 0.1 * one_segment
    assert many <= 1.5 * one_segment + stored_bytes(32, MEASURED) + 32 * RANDOM_STATE


def test_peak_memory_of_back_propagation_grows_with_the_horizon():
    four, eight, twelve = (measure("bptt", horizon, MEASURED) for horizon in (4, 8, 12))
    assert twelve - eight == pytest.approx(eight - four, rel=0.01)
    assert twelve > 2.5 * measure("replay", 12, MEASURED)


def test_replay_needs_no_more_memory_than_checkpoints():
    """Where the parameters' gradients are most of it too: they are added up as they come, not segment by segment."""
    for config in (MEASURED, dataclasses.replace(MEASURED, width=64, hidden=512, slots=4, segment_length=8)):
        random_states = 8 * RANDOM_STATE
        assert measure("replay", 8, config) <= 1.02 * measure("checkpoint", 8, config) + random_states


def test_measuring_in_a_fresh_process_gives_the_same_number(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert measure_in_fresh_process("replay", 3, MEASURED, batch=2) == pytest.approx(
        measure("replay", 3, MEASURED, batch=2), rel=0.01
    )


def test_peak_bytes_counts_what_lives_at_one_time():
    def run():
        a = torch.ones(1000)
        b = a + 1
        del a
        c = b * 2
        del b, c
        return torch.ones(500)

    assert 8000 <= peak_bytes(run, torch.device("cpu")) <= 8100


def test_memories_are_released_by_the_backward_and_with_the_outputs():
    """The first while the outputs live on, the second without the garbage collector: no reference cycle."""
    stored = []

    def cell(x, state):
        state = torch.tanh(state + x)
        stored.append(StorageWeakRef(state.untyped_storage()))
        return state.sum(), state

    gc.disable()
    try:
        outputs, state = memory_replay(cell, rows(3, F64), normal(2, WIDTH))
        sum(outputs).backward()
        assert [s.expired() for s in stored[:3]] == [True, True, False], "only the final state lives on"
        stored.clear()
        outputs, state = memory_replay(cell, rows(3, F64), normal(2, WIDTH))
        assert not any(s.expired() for s in stored)
        del outputs, state
        assert all(s.expired() for s in stored)
    finally:
        gc.enable()


def test_graphs_of_the_forward_are_let_go_segment_by_segment():
    alive = []

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = x.clone()
            ctx.save_for_backward(y)
            alive.append(StorageWeakRef(y.untyped_storage()))
            return y * 1

        @staticmethod
        def backward(ctx, grad):
            return grad

    def cell(x, state):
        assert all(ref.expired() for ref in alive), "an earlier segment still has its graph"
        state = torch.tanh(Kept.apply(x) + state)
        return state.sum(), state

    outputs, _ = memory_replay(cell, rows(4, F64), normal(2, WIDTH))
    alive.clear()
    sum(outputs).backward()
    assert len(alive) == 3  # the last segment has its graph still


# GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["float32", "bfloat16 autocast"])
def test_on_a_gpu_dropout_and_autocast_are_replayed(autocast):
    case = language_model(4, F32, dropout=0.3)
    (model,) = case.modules
    model.cuda()
    case.parameters = of_module(model)
    case.segments = pytree.tree_map(torch.Tensor.cuda, case.segments)

    def grads(method, **options):
        torch.manual_seed(1)
        with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None, cache_enabled=False):
            outputs, state = memory_replay(model.loss, case.segments, case.start(), method=method, **options)
        after = torch.cuda.get_rng_state()
        torch.stack(outputs).sum().backward()
        assert torch.equal(torch.cuda.get_rng_state(), after)
        found = {name: p.grad for name, p in case.parameters.items()}
        model.zero_grad()
        return found, after

    (replayed, random_state), (expected, expected_random_state) = grads("replay", strict=True), grads("bptt")
    assert torch.equal(random_state, expected_random_state)
    assert_close(replayed, expected, 5e-6 if autocast is None else 2e-2)
