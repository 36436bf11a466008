"""What of a recorded rollout may run at a time: the order in which calls go to the lanes, and when they do."""

import contextlib

import pytest
import torch
from replay_cells import assert_equal, of_module
from torch import nn

from memformer_kernels import MemformerLM, MemformerLMConfig
from memformer_kernels.replay import CapturedCell, StagedCell, capture, memory_replay, rollout
from memformer_kernels.replay.lanes import ASIDE, Lanes
from memformer_kernels.replay.python_part import PythonPart

pytestmark = pytest.mark.guarantee("G16")

HORIZON = 5


@pytest.fixture
def log(monkeypatch):
    """What happened in order: `(lane, what ran there)`, `("done", lane)` and "join", of the last recorded pass."""
    events, stack = [], []

    class Logged(Lanes):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            if self.many:
                events.clear()

        @contextlib.contextmanager
        def on(self, lane):
            if self.many:
                stack.append(lane)
            with super().on(lane):
                yield
            if self.many:
                stack.pop()

        def done(self, lane):
            if self.many:
                events.append(("done", lane))

        def join(self):
            if self.many:
                events.append("join")

    monkeypatch.setattr(capture, "Lanes", Logged)
    for name in ("run_and_pull", "run_ahead", "pull"):
        method = getattr(PythonPart, name)

        def logged(part, *arguments, name=name, method=method):
            label = arguments[0].label if name != "run_and_pull" else arguments[0]
            result = method(part, *arguments)
            if stack and result is not False:
                events.append((stack[-1], f"{name} {label}"))
            return result

        monkeypatch.setattr(PythonPart, name, logged)
    return events


def _model(**options):
    torch.manual_seed(3)
    sizes = dict(vocabulary=11, width=8, heads=2, hidden=16, slots=3, segment_length=5, layers=3)
    model = MemformerLM(MemformerLMConfig(**sizes, **options))
    return model, [tuple(torch.randint(11, (2, 5)) for _ in range(2)) for _ in range(HORIZON)]


def _rollout(model, cell, segments, **options):
    torch.manual_seed(0)
    start = model.initial_memory(2).contiguous()  # as what is recorded has it
    loss, memory = memory_replay(cell, segments, start, **{"reduction": "mean"} | options)
    if not isinstance(loss, torch.Tensor):
        loss = torch.stack(loss).mean()
    return loss + memory.square().cos().sum()


def _recorded(model, segments, **options):
    cell = CapturedCell(model.cell, always=True)
    for _ in range(2):  # the first records
        loss = _rollout(model, cell, segments, **options)
    return loss


def _pulls(log):
    return [event for event in log if event not in ("join",) and event[0] != "done"]


def test_a_segment_runs_again_beside_the_one_after_it(log):
    model, segments = _model()
    _recorded(model, segments).backward()
    assert log == [
        ("done", 0),
        (1, "run_ahead segment 3"),
        (0, "pull segment 4"),  # its graph was kept
        ("done", 0),
        (0, "run_ahead segment 2"),
        (1, "pull segment 3"),
        ("done", 1),
        (1, "run_ahead segment 1"),
        (0, "pull segment 2"),
        ("done", 0),
        (0, "run_ahead segment 0"),
        (1, "pull segment 1"),
        ("done", 1),
        (ASIDE, "pull prepare of segments 1 to 4"),
        (0, "pull segment 0"),
        ("done", 0),
        (ASIDE, "pull prepare of segments 0 to 0"),
        "join",
    ]


def test_the_readout_runs_beside_the_trajectory(log):
    model, segments = _model()
    _recorded(model, segments)
    groups = [(0, 0), (1, HORIZON - 1)]
    expected = []
    for t in range(HORIZON):
        expected.append(("done", 0))
        expected += [(ASIDE, f"run_and_pull readout of segments {a} to {b}") for a, b in groups if b == t]
    assert log == [*expected, "join"]


def test_random_numbers_are_drawn_in_the_order_of_one_stream(log):
    model, segments = _model(dropout=0.2)
    loss = _recorded(model, segments)
    assert not log  # no lanes in the forward
    loss.backward()
    assert (1, "run_ahead segment 3") in log


def test_budgets_say_how_many_graphs_may_stand(log):
    model, segments = _model()
    cell = CapturedCell(model.cell, always=True)
    _rollout(model, cell, segments)
    size = cell._store.captures[0]._sizes["advance"]
    for budget, ahead in ((0, False), (2 * size - 1, False), (2 * size, True)):
        log.clear()
        loss = _recorded(model, segments, activation_budget=budget)
        assert not any(lane == ASIDE for lane, _ in _pulls(log))
        loss.backward()
        assert any("run_ahead" in what for _, what in _pulls(log)) is ahead, budget
        assert not any(lane == ASIDE for lane, _ in _pulls(log))


def test_large_segments_run_alone(log, monkeypatch):
    model, segments = _model()
    monkeypatch.setattr(rollout, "LARGE_GRAPH", 100)
    _recorded(model, segments).backward()
    assert all(lane == 0 for lane, _ in _pulls(log))


def test_segments_that_their_readout_dwarfs_run_alone(log):
    linear, head = nn.Linear(4, 4), nn.Sequential(*(nn.Linear(4, 4) for _ in range(8)))

    def advance(x, state):
        state = torch.tanh(linear(x) + state)
        return state, state

    def readout(features, segments):
        return list(head(torch.stack(features)).square().mean((1, 2)).unbind())

    segments = [torch.randn(2, 4) for _ in range(HORIZON)]
    cell = CapturedCell(StagedCell(advance, readout=readout), always=True)
    for _ in range(2):
        loss, _ = memory_replay(cell, segments, torch.zeros(2, 4), reduction="mean")
    loss.backward()
    assert _pulls(log) and all(lane == 0 and "run_ahead" not in what for lane, what in _pulls(log))


def test_a_plain_cell_runs_ahead_too(log):
    linear = nn.Linear(4, 4)

    def cell(x, state):
        state = torch.tanh(linear(x) + state)
        return state.square().mean(), state

    segments = [torch.randn(2, 4) for _ in range(HORIZON)]
    found = []
    for way in (cell, CapturedCell(cell, always=True)):
        linear.zero_grad()
        outputs, _ = memory_replay(way, segments, torch.zeros(2, 4))
        torch.stack(outputs).sum().backward()
        found.append(of_module(linear)["weight"].grad.clone())
    assert torch.equal(*found) and (1, "run_ahead segment 3") in log


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("frozen", [(), ("embedding", "position", "layers.0.self"), ("write", "projection")], ids=str)
def test_lanes_change_no_bit(reduction, frozen):
    model, segments = _model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen) if frozen else True)
    cell = CapturedCell(model.cell, always=True)
    found = []
    for way in (model.cell, cell, cell):
        model.zero_grad()
        _rollout(model, way, segments, reduction=reduction).backward()
        found.append({name: p.grad for name, p in of_module(model).items() if p.requires_grad})
    for one in found[1:]:
        assert_equal(one, found[0])


def test_a_backward_that_runs_twice_scales_anew():
    """What the forward made early is scaled where it lies, and made again for a second backward."""
    model, segments = _model()
    cell = CapturedCell(model.cell, always=True)
    loss = _rollout(model, cell, segments) * 3
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in of_module(model).items()}
    model.zero_grad()
    loss.backward()
    assert_equal({name: p.grad for name, p in of_module(model).items()}, once)


def test_early_sums_have_memory_of_their_own():
    """Two parameters may get one gradient from autograd: scaled where it lies, it would be scaled twice."""
    a, b = (nn.Parameter(torch.ones(2, 3)) for _ in range(2))

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = a, b

    module = Sum()
    cell = StagedCell(
        lambda x, state: (x + state, state + x), readout=lambda fs, _: [(f * 0 + module.a + module.b).sum() for f in fs]
    )
    segments = [torch.ones(2, 3)]  # of one call, whose sums nothing is added to
    for way in (cell, CapturedCell(cell, always=True)):
        module.zero_grad()
        for _ in range(2):
            loss, _ = memory_replay(way, segments, torch.zeros(2, 3), reduction="mean")
            (5 * loss).backward()
        assert torch.equal(a.grad, torch.full((2, 3), 10.0)) and torch.equal(b.grad, a.grad)


def test_what_the_third_lane_reads_is_held(monkeypatch):
    """A segment that two parts read: the gradient of one, which another lane made, is added to aside."""
    held = []

    class Holding(Lanes):
        def aside(self, tensors):
            held.append(tensors)
            return super().aside(tensors)

    monkeypatch.setattr(capture, "Lanes", Holding)
    first, linear, head = (nn.Linear(4, 4) for _ in range(3))

    def prepare(segments):
        return [torch.sin(first(x)) for x in segments]

    def advance(x, state):
        for _ in range(3):
            x = torch.tanh(linear(x) + state)
        return x, x

    def readout(features, segments):
        return [(head(f) * x).mean() for f, x in zip(features, segments, strict=True)]

    cell = StagedCell(advance, prepare=prepare, readout=readout)
    grads = []
    for way in (cell, CapturedCell(cell, always=True)):
        segments = [torch.linspace(i, i + 1, 8).view(2, 4).requires_grad_() for i in range(HORIZON)]
        for _ in range(2):
            loss, _ = memory_replay(way, segments, torch.zeros(2, 4), reduction="mean")
            found = torch.autograd.grad(loss, segments)
        grads.append(found)
    assert all(map(torch.equal, *grads))
    of_reads = [tensors[1] for tensors in held if isinstance(tensors, tuple)]
    assert of_reads and all(isinstance(t, torch.Tensor) for tensors in of_reads for t in tensors)


def test_each_lane_has_leaves_of_its_own(log, monkeypatch):
    """A leaf belongs to the stream that it was first used on, to which autograd hands its gradients."""
    leaves = {}
    back_propagate = PythonPart._back_propagate

    def of_lane(part, *arguments):
        stand_ins = part.surroundings.modules.stand_ins
        leaves.setdefault(id(stand_ins) if stand_ins else 0, set()).update(map(id, part._leaves()))
        return back_propagate(part, *arguments)

    monkeypatch.setattr(PythonPart, "_back_propagate", of_lane)
    model, segments = _model()
    loss = _recorded(model, segments)
    leaves.clear()  # of the forward
    loss.backward()
    assert len(leaves) == 3 and sum(map(len, leaves.values())) == len(set.union(*leaves.values()))
    assert all(p.grad is not None for p in model.parameters())


def test_one_lane_without_a_device():
    lanes, cpu = Lanes(), Lanes(torch.device("cpu"))
    assert not lanes.many and cpu.many
    with lanes.on(0), cpu.on(1), cpu.aside([torch.zeros(1)]):
        pass
    lanes.done(0)
    cpu.join()
