"""What stands round a rollout, where it is hard to see: buffers that share memory or come late, modules that no module
registers, parameters that change between the passes, gradients of others."""

import threading

import numpy as np
import pytest
import torch
from torch import nn

from memformer_kernels import CapturedCell, MemformerLM, MemformerLMConfig, StagedCell, explain, memory_replay
from memformer_kernels.gradient_sink import deliver

pytestmark = pytest.mark.guarantee("G16")

SEGMENTS = [torch.full((3,), float(t)) for t in (1, 2, 3)]


class Run(nn.Module):
    """A linear layer whose input is multiplied by a buffer that doubles at each segment."""

    def __init__(self, how: str):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.how = nn.Linear(3, 3), how
        self.register_buffer("a", None if how == "late" else torch.ones(3))
        if how in ("shared", "view"):
            self.register_buffer("b", self.a if how == "shared" else self.a[:])

    def forward(self, x, h):
        if self.how == "late":
            self.a = torch.ones(3) if self.a is None else self.a * 2
        else:
            self.a.mul_(2)
        h = torch.tanh(self.linear(x * (self.a if self.how == "late" else self.b)) + h)
        return h.sum(), h


@pytest.mark.parametrize("how", ["shared", "view", "late"])
def test_buffers_that_share_memory_or_come_late_are_replayed(how):
    def gradients(method):
        cell = Run(how)
        outputs, _ = memory_replay(cell, SEGMENTS, torch.zeros(3), method=method)
        torch.stack(outputs).sum().backward()
        return cell.linear.weight.grad, cell.a

    for expected, found in zip(gradients("bptt"), gradients("replay"), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


NORM = nn.BatchNorm1d(3)


class ByName(nn.Module):
    def forward(self, x, h):
        return NORM(x.expand(2, 3) + h).sum(), h + 1


class InAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = [NORM]

    def forward(self, x, h):
        return self.norms[0](x.expand(2, 3) + h).sum(), h + 1


class OfItsClass:
    norm = NORM

    def __call__(self, x, h):
        return self.norm(x.expand(2, 3) + h).sum(), h + 1


class InSlots:
    __slots__ = ("norm",)

    def __init__(self):
        self.norm = NORM


class Inherits(InSlots):
    __slots__ = ()

    def __call__(self, x, h):
        return self.norm(x.expand(2, 3) + h).sum(), h + 1


@pytest.mark.parametrize("make", [ByName, InAList, OfItsClass, Inherits])
def test_modules_that_no_module_registers_are_updated_once(make):
    NORM.reset_running_stats()
    NORM.zero_grad()
    outputs, _ = memory_replay(make(), SEGMENTS, torch.zeros(3), activation_budget=0)
    torch.stack(outputs).sum().backward()
    assert NORM.num_batches_tracked == 3


@pytest.mark.parametrize("which", [slice(None), slice(0, 1)], ids=["all", "the first"])
@pytest.mark.parametrize("change", ["frozen one modified", "frozen one replaced", "replaced by a frozen one"])
def test_a_parameter_that_changes_between_the_passes_is_noticed(change, which):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False))

    def cell(x, h):
        h = torch.tanh(net(x) + h)
        return h.sum(), h

    outputs, _ = memory_replay(cell, SEGMENTS, torch.zeros(3), activation_budget=0)
    with torch.no_grad():
        if change == "frozen one modified":
            net[1].weight.mul_(3)
        else:
            part = net[1] if change == "frozen one replaced" else net[0]
            part.weight = nn.Parameter(3 * part.weight, requires_grad=False)
    with pytest.raises(RuntimeError, match="must not change between forward and backward, got a (modified )?parameter"):
        torch.stack(outputs[which]).sum().backward()
    assert net[0].bias.grad is None


def test_gradients_that_another_thread_delivers_meanwhile_go_where_they_belong():
    other, net, found = nn.Parameter(torch.ones(3)), nn.Linear(3, 3), []

    class Fused(torch.autograd.Function):
        """Its backward has another thread back-propagate through another model."""

        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            def elsewhere():
                found.append(deliver((other,), lambda totals: (None if totals[0] is not None else torch.ones(3),))[0])

            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            return grad

    def cell(x, h):
        h = Fused.apply(torch.tanh(net(x) + h))
        return h.sum(), h

    outputs, _ = memory_replay(cell, SEGMENTS, torch.zeros(3))
    torch.stack(outputs).sum().backward()
    assert len(found) == 3 and all(torch.equal(grad, torch.ones(3)) for grad in found)


@pytest.mark.parametrize("way", ["as it is", "captured"])
def test_half_precision_without_autocast_survives_a_scaled_loss(way):
    """The factor of a gradient scaler does not fit gradients in float16 that the forward made."""
    torch.manual_seed(0)
    sizes = dict(width=32, heads=2, layers=1, hidden=32, slots=4, segment_length=8)
    model = MemformerLM(MemformerLMConfig(**sizes)).half()
    segments = [(t, t) for t in torch.randint(256, (3, 2, 8))]
    cell = CapturedCell(model.cell, always=True) if way == "captured" else model.cell
    for method in ("replay", "bptt"):
        loss, _ = memory_replay(cell, segments, model.initial_memory(2), reduction="mean", method=method)
        model.zero_grad()
        (loss.float() * 65536).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert model.head.weight.grad.abs().max() > 1

    net = nn.Linear(3, 3)

    def advance(x, h):
        with torch.autocast("cpu", torch.float16):  # inside, where a rollout does not see it
            return net(x), h

    parts = StagedCell(advance, readout=lambda features, _: [f.float().mean() for f in features])
    cell, found = CapturedCell(parts, always=True) if way == "captured" else parts, []
    for method in ("replay", "bptt"):
        loss, _ = memory_replay(cell, SEGMENTS, torch.zeros(3), reduction="mean", method=method)
        found.append(torch.autograd.grad(loss * 65536, net.bias)[0])
    torch.testing.assert_close(*found, rtol=2e-3, atol=0)


@pytest.mark.parametrize("way", ["as it is", "captured"])
def test_half_precision_without_autocast_makes_no_gradient_early(way):
    """Nothing in it is lost to underflow: the scaled gradient is that of back-propagation."""
    torch.manual_seed(0)
    head = nn.Linear(3, 3).half()
    parts = StagedCell(lambda x, h: (x + h, h), readout=lambda xs, _: [head(x).sum() * 1e-6 for x in xs])
    cell = CapturedCell(parts, always=True) if way == "captured" else parts
    segments, start = [x.half() for x in SEGMENTS], torch.zeros(3).half()
    found = []
    for method in ("replay", "bptt"):
        loss, _ = memory_replay(cell, segments, start, reduction="mean", method=method)
        found.append(torch.autograd.grad(loss.float() * 32768, head.bias)[0])
    torch.testing.assert_close(*found, rtol=2e-3, atol=0)
    assert 0.001 < found[0].min() < 1


def test_features_and_next_state_may_share_a_tensor_without_gradient():
    torch.manual_seed(0)
    net, mask = nn.Linear(3, 3), torch.ones(3)

    def advance(x, state):
        h, mask = state
        h = torch.tanh(net(x * mask) + h)
        return (h, mask), (h, mask)

    def readout(features, segments):
        return [(h * mask).sum() for h, mask in features]

    found = []
    for cell in (StagedCell(advance, readout=readout), CapturedCell(StagedCell(advance, readout=readout), always=True)):
        loss, _ = memory_replay(cell, SEGMENTS, (torch.zeros(3), mask), reduction="mean")
        found.append((loss.detach(), *torch.autograd.grad(loss, [*net.parameters()])))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_a_cell_that_modifies_its_state_is_refused_without_gradients_too():
    def cell(x, h):
        return h.add_(1).sum(), h

    with torch.no_grad(), pytest.raises(RuntimeError, match="must not modify its segment or its state in place"):
        memory_replay(cell, SEGMENTS, torch.zeros(3))


def test_an_exception_beside_a_sparse_buffer_is_the_cells_own():
    net = nn.Linear(3, 3)
    net.register_buffer("sparse", torch.eye(3).to_sparse())

    def cell(x, h):
        raise KeyError("the cell's own")

    cell.net = net
    with pytest.raises(KeyError, match="the cell's own"):
        memory_replay(lambda x, h: (net(x), cell(x, h)), SEGMENTS, torch.zeros(3))


def test_layers_that_are_made_in_the_first_segment():
    net = nn.Sequential(nn.LazyBatchNorm1d(), nn.Linear(3, 3))

    def cell(x, h):
        h = torch.tanh(net(x.expand(2, 3)) + h)
        return h.sum(), h

    outputs, _ = memory_replay(cell, SEGMENTS, torch.zeros(2, 3))
    torch.stack(outputs).sum().backward()
    assert net[1].weight.grad is not None


def test_arrays_in_segments_are_not_captured():
    net = nn.Linear(3, 3)

    def cell(segment, h):
        h = torch.tanh(net(torch.as_tensor(segment)) + h)
        return h.sum(), h

    captured = CapturedCell(cell, always=True)
    memory_replay(captured, SEGMENTS, torch.zeros(3))
    with pytest.raises(RuntimeError, match="cannot be captured: its segments or its state hold a ndarray"):
        memory_replay(captured, [np.ones(3, dtype=np.float32)] * 3, torch.zeros(3))


@pytest.mark.parametrize("budget", [-5, True, 0.5, "1 GiB"])
def test_explain_refuses_the_budgets_that_a_rollout_refuses(budget):
    net = nn.Linear(3, 3)
    arguments = lambda x, h: (net(x).sum(), h), SEGMENTS, torch.zeros(3)  # noqa: E731
    with pytest.raises(ValueError, match="explain: activation_budget must be"):
        explain("memory_replay", *arguments, activation_budget=budget)
    with pytest.raises(ValueError, match="memory_replay: activation_budget must be"):
        memory_replay(*arguments, activation_budget=budget)
