"""Staged cells, reductions, budgets and captured cells: the gradients of back-propagation through plain segments."""

import gc

import pytest
import torch
from replay_cells import assert_close, assert_equal, normal, of_module
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from memformer_kernels import Memformer, MemformerConfig, MemformerLM, MemformerLMConfig, explain
from memformer_kernels.replay import CapturedCell, StagedCell, capture, memory_replay, surroundings

pytestmark = pytest.mark.guarantee("G16")

F64 = torch.float64
SIZES = dict(vocabulary=11, width=8, heads=2, hidden=16, slots=3, segment_length=5)


def _language_model(horizon, dtype=F64, **options):
    torch.manual_seed(3)
    model = MemformerLM(MemformerLMConfig(**SIZES, **options, layers=3)).to(dtype)
    segments = [tuple(torch.randint(11, (2, 5)) for _ in range(2)) for _ in range(horizon)]
    segments[-1] = tuple(t[:, :3] for t in segments[-1])  # a text ends where it ends
    segments[0][1][:, 1:3] = -100
    return model, segments


def _encoder_decoder(horizon, dtype=F64, dropout=0.0, **options):
    torch.manual_seed(4)
    config = MemformerConfig(**SIZES, **options, encoder_layers=2, decoder_layers=2, dropout=dropout)
    model = Memformer(config).to(dtype)
    return model, [tuple(torch.randint(11, (2, 5)) for _ in range(3)) for _ in range(horizon)]


MODELS = {"decoder only": _language_model, "encoder-decoder": _encoder_decoder}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())


def _plain(model):
    """The cell without its stages."""
    return lambda segment, memory: model.cell(segment, memory)


def _captured(cell):
    return CapturedCell(cell, always=True)


def _gradients(model, cell, segments, *, reduction="none", seed=0, state_weight=0.1, **options):
    """Loss and gradients of the parameters; nothing of it stays."""
    torch.manual_seed(seed)
    start = model.initial_memory(2)
    outputs, memory = memory_replay(cell, segments, start, reduction=reduction, **options)
    if reduction == "none":
        outputs = torch.stack(outputs).sum() / len(segments)
    loss = 3 * outputs + state_weight * memory.square().cos().sum()
    loss.backward()
    found = {name: p.grad for name, p in of_module(model).items()}
    model.zero_grad(set_to_none=True)
    return loss.item(), found


WAYS = {"in Python": lambda cell: cell, "captured": _captured}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("budget", [None, 0, 60_000, 10**9], ids=str)
@every_way
@every_model
def test_gradients_equal_back_propagation(make, way, budget, reduction):
    for horizon in (1, 6):
        model, segments = make(horizon)
        loss, expected = _gradients(model, _plain(model), segments, method="bptt")
        options = dict(reduction=reduction, activation_budget=budget)
        cell = way(model.cell)
        for _ in range(2):  # a captured cell captures once
            found_loss, found = _gradients(model, cell, segments, **options)
            assert found_loss == pytest.approx(loss, rel=1e-12)
            assert_close(found, expected, 1e-12)


@every_way
@every_model
def test_dropout_masks_are_the_same_in_both_passes(make, way):
    """Finite differences of a rollout whose seed is fixed: they see the forward's masks, the gradient both passes'."""
    model, segments = make(4, dropout=0.3)
    cell = way(model.cell)
    for reduction in ("none", "mean"):
        _, grads = _gradients(model, cell, segments, reduction=reduction)
        for name, parameter in of_module(model).items():
            at = grads[name].abs().argmax()
            if not name.startswith(("embedding", "write.key", "write.bias", "head.bias")):
                continue
            losses = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    parameter.flatten()[at] += step
                losses.append(_gradients(model, cell, segments, reduction=reduction)[0])
                with torch.no_grad():
                    parameter.flatten()[at] -= step
            assert (losses[0] - losses[1]) / 2e-5 == pytest.approx(grads[name].flatten()[at].item(), rel=1e-5), name


@every_model
def test_captured_rollouts_have_the_bits_of_uncaptured_ones(make):
    for dropout in (0.0, 0.2):
        model, segments = make(5, torch.float32, dropout=dropout)
        recorded = _captured(model.cell)
        for reduction in ("none", "sum"):
            expected = _gradients(model, model.cell, segments, reduction=reduction)
            for _ in range(2):
                found = _gradients(model, recorded, segments, reduction=reduction)
                assert found[0] == expected[0]
                assert_equal(found[1], expected[1])


def test_parts_run_over_as_many_segments_as_the_budget_allows():
    model, segments = _language_model(9)
    sizes = {"prepare": [], "readout": []}

    def spied(name, function):
        def run(*lists):
            sizes[name].append(len(lists[0]))
            return function(*lists)

        return run

    cell = model.cell
    staged = StagedCell(cell.advance, prepare=spied("prepare", cell.prepare), readout=spied("readout", cell.readout))
    memory_replay(staged, segments, model.initial_memory(2), reduction="mean", activation_budget=0)
    assert sizes == {"prepare": [1] * 9, "readout": [1] * 9}
    sizes["prepare"].clear(), sizes["readout"].clear()
    memory_replay(staged, segments, model.initial_memory(2), reduction="mean", activation_budget=10**9)
    assert sizes == {"prepare": [1, 8], "readout": [1, 8]}
    sizes["readout"].clear()
    memory_replay(staged, segments, model.initial_memory(2), reduction="mean")
    assert sizes["readout"][0] == 1 and max(sizes["readout"]) > 1


def test_a_captured_rollout_takes_the_groups_of_an_uncaptured_one():
    """Though the first state may be a view whose copy holds more: what dropout draws depends on the groups."""
    weight = nn.Parameter(torch.rand(64, dtype=F64))
    groups = []

    def advance(x, state):
        state = torch.tanh(torch.tanh(state.contiguous() * weight) + x)
        return state, state

    def readout(features, segments):
        groups.append(len(features))
        return [(f * weight).sin().sum() for f in features]

    segments = [normal(2, 64, seed=t) for t in range(9)]
    for wrap in (lambda cell: cell, _captured):
        groups.clear()
        memory_replay(wrap(StagedCell(advance, readout=readout)), segments, weight.expand(2, -1), reduction="mean")
        if wrap is not _captured:
            expected = list(groups)
    assert groups[-len(expected) :] == expected and max(expected) > 1


def test_a_segment_that_two_parts_read_gets_both_gradients():
    module = nn.Linear(6, 6, dtype=F64)

    def prepare(segments):
        return [module(x) for x in segments]

    def advance(x, state):
        state = torch.tanh(x + state)
        return state, state

    def readout(features, segments):
        return [(f * x).sum() for f, x in zip(features, segments, strict=True)]

    cell = StagedCell(advance, prepare=prepare, readout=readout)
    segments = [normal(2, 6, needs_grad=True, seed=t) for t in range(3)]
    inputs = {**{f"segment {t}": x for t, x in enumerate(segments)}, **of_module(module)}

    def gradients(method):
        outputs, _ = memory_replay(cell, segments, torch.zeros(2, 6, dtype=F64), method=method)
        return dict(zip(inputs, torch.autograd.grad(sum(outputs), inputs.values()), strict=True))

    assert_close(gradients("replay"), gradients("bptt"), 1e-12)


@every_way
def test_a_head_may_be_trained_alone(way):
    """Its gradients are all that the forward makes: no segment is run again."""
    model, segments = _language_model(4)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    expected = _gradients(model, _plain(model), segments, method="bptt", state_weight=0.0)
    cell = way(model.cell)
    for reduction in ("none", "mean", "mean"):
        found = _gradients(model, cell, segments, reduction=reduction, state_weight=0.0)
        assert found[0] == pytest.approx(expected[0], rel=1e-12)
        assert_close(found[1], expected[1], 1e-12)


def test_with_a_reduction_the_readout_runs_once():
    model, segments = _language_model(4)
    cell, calls = model.cell, []

    def readout(features, given):
        calls.append(len(features))
        return cell.readout(features, given)

    staged = StagedCell(cell.advance, prepare=cell.prepare, readout=readout)
    loss, _ = memory_replay(staged, segments, model.initial_memory(2), reduction="mean", activation_budget=0)
    loss.backward()
    assert sum(calls) == 4
    calls.clear()
    outputs, _ = memory_replay(staged, segments, model.initial_memory(2), activation_budget=0)
    torch.stack(outputs).mean().backward()
    assert sum(calls) == 8


def test_a_budget_saves_as_many_segments_as_it_holds():
    module = nn.Linear(6, 6, dtype=F64)
    runs = []

    def cell(x, state):
        runs.append(x)
        state = torch.tanh(module(x) + state)
        return state.sum(), state

    def replayed(budget):
        runs.clear()
        outputs, _ = memory_replay(
            cell, [normal(2, 6, seed=t) for t in range(8)], normal(2, 6), activation_budget=budget
        )
        torch.stack(outputs).sum().backward()
        return len(runs) - 8

    counts = [replayed(budget) for budget in (0, 100, 200, 400, 800, 10**6)]
    assert counts[0] == 8 and counts[-1] == 0
    assert counts == sorted(counts, reverse=True) and len(set(counts)) > 3
    assert replayed(None) == 7


def test_a_budget_holds_where_segments_grow():
    module, runs = nn.Linear(6, 6, dtype=F64), []

    def cell(x, state):
        runs.append(x)
        made = torch.tanh(module(x) + state)
        return made.sum(), made.mean(0, keepdim=True)

    segments = [normal(rows, 6, seed=rows + t) for rows in (2, 200) for t in range(4)]
    outputs, _ = memory_replay(cell, segments, normal(1, 6), activation_budget=2 * 200 * 6 * 8 + 1000)
    torch.stack(outputs).sum().backward()
    assert len(runs) - 8 == 6, "two of the large ones fit"


def test_what_the_forward_made_is_let_go_by_the_backward():
    """Though the loss is still there: features' gradients and sums too, that the forward made already."""
    model, segments = _language_model(4)
    saved = []

    def note(tensor):
        saved.append(StorageWeakRef(tensor.untyped_storage()))
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, _ = memory_replay(model.cell, segments, model.initial_memory(2), reduction="mean")
    early = [call.early for call in loss.grad_fn.passes.tape.calls if call.early is not None]
    assert early and loss.grad_fn.passes.tape.early_sums and len(saved) > 20
    loss.backward()
    gc.collect()
    ours = [*model.parameters(), *(t for segment in segments for t in segment)]
    known = {t.untyped_storage()._cdata for t in ours}
    assert all(ref.expired() or ref.cdata in known for ref in saved)


def test_a_recorded_backward_stays_on_the_calling_thread():
    """On a GPU autograd would take another, for which cuBLAS keeps a workspace of its own in the graph's memory."""
    may_leave = []

    class Square(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.square())

        @staticmethod
        def backward(ctx, grad):
            may_leave.append(torch._C._is_multithreading_enabled())
            return grad

    segments = [normal(2, 6, seed=t, needs_grad=True) for t in range(3)]
    cell = _captured(lambda x, state: (Square.apply(x + state).sum(), x + state))
    memory_replay(cell, segments, normal(2, 6), reduction="mean")[0].backward()
    assert len(may_leave) >= 3 and not any(may_leave)
    assert torch._C._is_multithreading_enabled()


def test_features_gradients_do_not_stand_there_twice():
    """Before and after they are multiplied by that of the loss, in a captured rollout, which owns them."""
    made, alive = [], []

    class Read(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())

        @staticmethod
        def backward(ctx, grad):
            grad = grad * 2
            made.append(StorageWeakRef(grad.untyped_storage()))
            return grad

    class Advance(torch.autograd.Function):
        forward = staticmethod(lambda ctx, x: x.clone())

        @staticmethod
        def backward(ctx, grad):
            alive.append(sum(not ref.expired() for ref in made))
            return grad

    def advance(x, state):
        state = Advance.apply(x + state)
        return state.sin(), state

    segments = [normal(2, 6, seed=t, needs_grad=True) for t in range(4)]
    cell = StagedCell(advance, readout=lambda features, _: [Read.apply(f).sum() for f in features])
    for _ in range(2):
        loss, _ = memory_replay(_captured(cell), segments, normal(2, 6), reduction="mean")
        loss.backward()
    assert len(made) >= 8 and alive and not any(alive)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@every_way
@every_model
def test_what_is_recomputed_does_not_matter(make, way, dropout):
    results = []
    for recompute in ("none", "cheap", "all"):
        model, segments = make(4, dropout=dropout, recompute=recompute)
        results += [_gradients(model, way(model.cell), segments, seed=5) for _ in range(2)]
    for loss, found in results[1:]:
        assert loss == results[0][0]
        assert_equal(found, results[0][1])


@every_model
def test_graph_that_recomputes_all_holds_the_inputs_of_layers(make):
    held = {}
    for recompute in ("cheap", "all"):
        model, segments = make(2, recompute=recompute)
        held[recompute] = explain(memory_replay, model.cell, segments, model.initial_memory(2)).graph["advance"]
    assert held["all"] < held["cheap"] / 2


@pytest.mark.parametrize("config", [MemformerLMConfig, MemformerConfig])
def test_unknown_recompute_is_refused(config):
    model = MemformerLM if config is MemformerLMConfig else Memformer
    with pytest.raises(ValueError, match="recompute must be one of .*'all'.*, got 'some'"):
        model(config(recompute="some"))


def test_explain_tells_what_a_rollout_will_keep():
    weight = nn.Parameter(torch.rand(8, dtype=F64))
    calls = []

    def advance(x, state):
        calls.append(1)
        state = torch.tanh(torch.tanh(state * weight) + x)
        return state, state

    def readout(features, segments):
        return [(f * weight).sin().sum() for f in features]

    def prepare(segments):
        return [x * 2 for x in segments]

    cell = StagedCell(advance, prepare=prepare, readout=readout)
    segments, start = [normal(4, 8, seed=t) for t in range(6)], torch.zeros(4, 8, dtype=F64)
    random = torch.get_rng_state()
    one = 4 * 8 * 8  # bytes of a tensor
    for budget, kept in ((None, 1), (0, 0), (3 * 2 * one, 3), (10**6, 6)):
        told = explain("memory_replay", CapturedCell(cell), segments, start, activation_budget=budget)
        assert (told.graph["advance"], told.state, told.inputs, told.features) == (2 * one, one, one, one)
        assert (told.stored, told.sums, told.kept) == (6 * 3 * one, 64, kept)
        assert f"the last {kept} keep their graph, {6 - kept} are replayed" in str(told)
        calls.clear()
        outputs, _ = memory_replay(StagedCell(advance), segments, start, activation_budget=budget)
        torch.stack([o.sum() for o in outputs]).sum().backward()
        assert len(calls) == 6 + 6 - kept  # as it was told
    assert told.groups == {"prepare": 6, "readout": 6}
    assert torch.equal(random, torch.get_rng_state()) and explain(memory_replay, cell, segments, start).kept == 1
    with pytest.raises(ValueError, match="explain: segments must hold at least one"):
        explain("memory_replay", cell, [], start)


def test_rollouts_that_overlap_do_not_mix():
    """Two forwards before two backwards: what the first left in the graphs' memory is gone."""
    model, first = _language_model(4)
    _, second = _language_model(4)
    second = [(t.flip(1), y) for t, y in second]
    for reduction in ("none", "mean"):
        expected = [_gradients(model, _plain(model), s, method="bptt", state_weight=0.0)[1] for s in (first, second)]
        cell = _captured(model.cell)
        losses = []
        for segments in (first, second):
            outputs, _ = memory_replay(cell, segments, model.initial_memory(2), reduction=reduction)
            losses.append(3 * (outputs if reduction == "mean" else torch.stack(outputs).mean()))
        for loss, want in zip(losses, expected, strict=True):
            loss.backward(retain_graph=True)
            assert_close({n: p.grad for n, p in of_module(model).items()}, want, 1e-12)
            model.zero_grad()
            loss.backward()  # and a second time
            assert_close({n: p.grad for n, p in of_module(model).items()}, want, 1e-12)
            model.zero_grad()


def test_what_another_forward_overwrites_is_made_again(monkeypatch):
    """All captures share one pool: what a forward left in it stands until the next forward, of whatever form."""
    model, long = _language_model(5)
    short = long[:2]
    cell = _captured(model.cell)
    forwards = []
    run_again = capture.Capture.run_again
    monkeypatch.setattr(capture.Capture, "run_again", lambda c, *a: forwards.append(c) or run_again(c, *a))

    def loss(segments):
        return memory_replay(cell, segments, model.initial_memory(2), reduction="mean")[0]

    loss(long).backward()
    assert len(forwards) == 1  # left for its backward
    first, second = loss(long), loss(short)
    forwards.clear()
    second.backward()
    assert not forwards
    first.backward()
    assert len(forwards) == 1 and forwards[0] is cell._store.captures[0]


class _Overwritten(capture.Recording):
    """What a recording returned is run over by every later replay, as in the pool that graphs share."""

    returned: list = []

    def replay(self):
        result = super().replay()
        for tensor in self.returned:
            if tensor.is_floating_point():
                tensor.detach().fill_(torch.nan)
        if isinstance(result, capture.Tree):
            self.returned[:] = result.tensors()
        else:
            grads, sums = result
            self.returned[:] = [t for t in (*grads, *sums.values()) if t is not None]
        return result


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("horizon", [4, 5])  # graphs of one length, and a shorter one
@every_model
def test_a_long_rollout_in_several_graphs(make, horizon, reduction, monkeypatch):
    monkeypatch.setattr(capture, "Recording", _Overwritten)
    model, segments = make(horizon)
    cell = CapturedCell(model.cell, segments_per_graph=2, always=True)
    expected = _gradients(model, _plain(model), segments, method="bptt", reduction=reduction)
    for _ in range(2):
        found = _gradients(model, cell, segments, reduction=reduction)
        assert found[0] == pytest.approx(expected[0], rel=1e-12)
        assert_close(found[1], expected[1], 1e-12)
    with torch.no_grad():
        outputs, memory = memory_replay(cell, segments, model.initial_memory(2), reduction=reduction)
    assert memory.shape == (2, 3, 8) and (reduction == "mean" or len(outputs) == horizon)


def test_captures_follow_training_replaced_parameters_and_forms():
    model, segments = _language_model(3, dropout=0.1)
    cell = _captured(model.cell)

    def check():
        for reduction in ("none", "mean"):
            expected = _gradients(model, model.cell, segments, reduction=reduction)
            found = _gradients(model, cell, segments, reduction=reduction)
            assert found[0] == pytest.approx(expected[0], rel=1e-12)
            assert_close(found[1], expected[1], 1e-12)

    check()
    with torch.no_grad():
        model.head.weight.mul_(1.1)  # as an optimiser does
    check()
    model.eval()
    check()
    model.train()
    model.head.weight = nn.Parameter(model.head.weight.detach() * 2)
    check()
    model.layers[0].requires_grad_(False)
    check()


@pytest.fixture
def events(monkeypatch):
    """Forwards that are launched, and looks at what they depend on, in order."""
    found, run_again, look = [], capture.Capture.run_again, surroundings.Surroundings.of
    monkeypatch.setattr(capture.Capture, "run_again", lambda c, *a: found.append("launched") or run_again(c, *a))
    monkeypatch.setattr(surroundings.Surroundings, "of", lambda *a: found.append("looked") or look(*a))
    return found


def test_a_forward_is_launched_before_all_that_it_depends_on_is_looked_at(events):
    model, segments = _language_model(3)
    cell = _captured(model.cell)
    expected = _gradients(model, model.cell, segments, reduction="mean")
    for order in (["looked", "launched"], ["launched", "looked"], ["launched", "looked"]):
        events.clear()
        found = _gradients(model, cell, segments, reduction="mean")
        assert events == order
        assert found[0] == pytest.approx(expected[0], rel=1e-12)
        assert_close(found[1], expected[1], 1e-12)
    for others in (segments[:2], [tuple(t[:, :2] for t in segment) for segment in segments]):
        events.clear()
        _gradients(model, cell, others, reduction="mean")
        assert events == ["looked", "launched"]
    events.clear()
    _gradients(model, cell, others, reduction="sum")
    assert events == ["looked", "launched"]


class _Changing(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, segment, state):
        state = torch.tanh(segment + (2 if self.training else 1) * state @ self.weight)
        return state.square().mean(), state


@pytest.mark.parametrize("change", ["evaluation", "another weight", "a frozen weight", "autocast"])
def test_what_was_launched_for_nobody_does_no_harm(events, change):
    torch.manual_seed(0)
    model, casts = _Changing(), False
    cell = _captured(model)
    segments, state = [torch.randn(2, 4) for _ in range(3)], torch.randn(2, 4, requires_grad=True)

    def loss(cell):
        with torch.autocast("cpu", torch.bfloat16, enabled=casts):
            return memory_replay(cell, segments, state, reduction="mean")[0]

    def backward(loss):
        """The loss and its gradient."""
        state.grad = None
        loss.backward()
        return {"loss": loss.detach(), "state": state.grad}

    before = backward(loss(model))
    backward(loss(cell))
    waiting = loss(cell)  # its backward comes after that of another
    if change == "evaluation":
        model.eval()
    elif change == "another weight":
        model.weight = nn.Parameter(model.weight.detach() * 2)
    elif change == "a frozen weight":
        model.weight.requires_grad_(False)
    casts = change == "autocast"
    events.clear()
    found = backward(loss(cell))
    assert events == ["launched", "looked", "launched"]
    assert_close(found, backward(loss(model)), 1e-6)
    if change in ("evaluation", "autocast"):
        model.train()
        assert_close(backward(waiting), before, 1e-6)


def test_what_draws_is_not_launched_for_nobody(events):
    model, segments = _language_model(3, dropout=0.1)
    cell = _captured(model.cell)
    for _ in range(2):
        events.clear()
        _gradients(model, cell, segments, reduction="mean")
        assert events == ["looked", "launched"]
    model.eval()
    before = torch.get_rng_state()
    memory_replay(cell, segments, model.initial_memory(2), reduction="mean")
    assert torch.equal(torch.get_rng_state(), before)


@every_way
def test_without_gradients(way):
    model, segments = _language_model(5)
    cell = way(model.cell)
    with torch.no_grad():
        expected, state = memory_replay(_plain(model), segments, model.initial_memory(2), method="bptt")
        for _ in range(2):
            outputs, found = memory_replay(cell, segments, model.initial_memory(2))
            torch.testing.assert_close(outputs, expected)
            torch.testing.assert_close(found, state)
        mean, _ = memory_replay(cell, segments, model.initial_memory(2), reduction="mean")
        torch.testing.assert_close(mean, torch.stack(expected).mean())
    assert not mean.requires_grad


def test_no_gradient_flows_where_none_is_asked_for():
    model, segments = _language_model(3)
    loss, memory = memory_replay(model.cell, segments, model.initial_memory(2), reduction="mean")
    model.zero_grad()
    memory.sum().backward(retain_graph=True)  # nothing of the losses
    assert model.head.weight.grad is None and model.write.bias.grad is not None
    model.zero_grad()
    loss.backward()
    assert model.head.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_scaler_reaches_the_readout_in_float16(dtype):
    """In float16 a readout is differentiated when the scaled gradient is there, otherwise in the forward."""
    model, segments = _language_model(3, dtype=torch.float32)
    cell, calls = model.cell, []

    def readout(*lists):
        calls.append(1)
        return cell.readout(*lists)

    with torch.autocast("cpu", dtype):
        loss, _ = memory_replay(
            StagedCell(cell.advance, readout=readout, prepare=cell.prepare),
            segments,
            model.initial_memory(2),
            reduction="mean",
            activation_budget=0,
        )
    before = len(calls)
    loss.mul(2.0**10).backward()
    assert (len(calls) > before) == (dtype == torch.float16)


def test_a_cell_that_cannot_be_captured_runs_in_python_and_says_why():
    norm = nn.BatchNorm1d(6)

    def cell(x, state):
        state = torch.tanh(norm(x) + state)
        return state.sum(), state

    segments = [normal(4, 6, dtype=torch.float32, seed=t) for t in range(3)]
    outputs, _ = memory_replay(cell, segments, torch.zeros(4, 6))
    torch.stack(outputs).sum().backward()
    expected, norm.weight.grad = norm.weight.grad, None
    norm.reset_running_stats()
    recorded = CapturedCell(cell)
    recorded._even_on_a_cpu = True
    with pytest.warns(UserWarning, match="runs in Python, not as CUDA graphs: it changes a buffer of a module"):
        outputs, _ = memory_replay(recorded, segments, torch.zeros(4, 6))
    torch.stack(outputs).sum().backward()
    assert torch.equal(norm.weight.grad, expected)
    assert norm.num_batches_tracked == 3
    with pytest.raises(RuntimeError, match="the cell cannot be captured: it changes a buffer"):
        memory_replay(_captured(cell), segments, torch.zeros(4, 6))


def test_wrong_parts_are_refused():
    model, segments = _language_model(3)
    cell, start = model.cell, model.initial_memory(2)
    for part, function in (("prepare", lambda s: s[:-1]), ("readout", lambda f, s: torch.zeros(3))):
        parts = {"prepare": cell.prepare, "readout": cell.readout, part: function}
        with pytest.raises(TypeError, match=f"memory_replay: {part} must return a list, one item a segment"):
            memory_replay(StagedCell(cell.advance, **parts), segments, start)
    with pytest.raises(TypeError, match=r"outputs must be scalar tensors with a reduction, got \[2\]"):
        memory_replay(lambda x, s: (s[:, 0, 0], s), segments, start, reduction="sum")
    with pytest.raises(ValueError, match="reduction must be one of none, mean, sum, got 'max'"):
        memory_replay(cell, segments, start, reduction="max")
    with pytest.raises(ValueError, match="segments must hold at least one segment with reduction"):
        memory_replay(cell, [], start, reduction="mean")
    for budget in (-1, True, "1 GB"):
        with pytest.raises(ValueError, match="activation_budget must be bytes from 0 up"):
            memory_replay(cell, segments, start, activation_budget=budget)
    with pytest.raises(ValueError, match='activation_budget must be left out unless method="replay"'):
        memory_replay(cell, segments, start, method="bptt", activation_budget=0)


@every_way
def test_an_exception_leaves_a_captured_cell_usable(way):
    model, segments = _language_model(4)
    expected = _gradients(model, _plain(model), segments, method="bptt")
    fails = [True]
    inner = model.cell

    def advance(x, memory):
        if fails[0]:
            raise KeyboardInterrupt
        return inner.advance(x, memory)

    cell = way(StagedCell(advance, prepare=inner.prepare, readout=inner.readout))
    with pytest.raises(KeyboardInterrupt):
        _gradients(model, cell, segments)
    fails[0] = False
    assert_close(_gradients(model, cell, segments)[1], expected[1], 1e-12)


def test_graphs_of_a_staged_rollout_are_let_go_without_the_garbage_collector():
    """Also where what they hold is counted: counting must not tie an output to its own graph."""
    alive = []

    def advance(x, state):
        assert all(ref.expired() for ref in alive), "an earlier segment still has its graph"
        state = torch.exp(x + state).tanh()  # both save what they return
        alive.append(StorageWeakRef((middle := state.exp()).untyped_storage()))
        return middle.sin().sum(), state

    gc.collect()
    gc.disable()
    try:
        segments = [normal(2, 6, seed=t, needs_grad=True) for t in range(4)]
        cell = StagedCell(advance, readout=lambda features, _: [f * 1 for f in features])
        loss, _ = memory_replay(cell, segments, normal(2, 6), reduction="mean")
        loss.backward()
    finally:
        gc.enable()


def test_a_graph_holds_at_least_one_segment():
    with pytest.raises(ValueError, match="CapturedCell: segments_per_graph must be at least 1, got 0"):
        CapturedCell(lambda x, s: (x, s), segments_per_graph=0)


def test_captures_are_let_go():
    model, segments = _language_model(3)
    cell = _captured(model.cell)
    _gradients(model, cell, segments)
    assert cell._store.captures
    cell.clear()
    gc.collect()
    assert not cell._store.captures


def test_what_graphs_read_lies_side_by_side_at_addresses_of_16_bytes():
    given = [torch.randn(2, 4), torch.arange(3), torch.randn(2, 4).requires_grad_(), torch.arange(3), torch.ones(())]
    inputs = capture._Inputs(given)
    assert [t.requires_grad for t in inputs.tensors] == [False, False, True, False, False]
    assert all(t.data_ptr() % 16 == 0 for t in inputs.tensors)
    assert inputs.tensors[2].data_ptr() - inputs.tensors[0].data_ptr() == given[0].nbytes
    others = [t.detach() + 1 for t in given]
    inputs.copy([others[0].t().contiguous().t(), *others[1:]])
    assert all(map(torch.equal, inputs.tensors, others))
