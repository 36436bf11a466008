"""Cells as CUDA graphs: each part captured once for arguments of one form, and replayed for every segment.

Of a part there are one graph of its forward without gradients, for the trajectory; and one or more pairs of a forward
with its autograd graph and a backward. The first pair replays segments; where the budget allows, the last segments of
a rollout have a pair each, run the forward of that pair at once, and need no replay.

Arguments are copied into the tensors that were there at the capture, results are copied out. The parameters' gradients
are added up inside the graphs.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from memformer_kernels.recording import Recording, aside
from memformer_kernels.replay.budget import Keeper, groups_of
from memformer_kernels.replay.python_part import PythonPart
from memformer_kernels.replay.rollout import Grads, Parts
from memformer_kernels.replay.stages import functions_of
from memformer_kernels.replay.surroundings import Autocast, Surroundings, modules_of, same_bits, versions_of
from memformer_kernels.replay.totals import StaticTotals, Totals
from memformer_kernels.replay.tree import Tree, as_leaf


class CapturedCell:
    """A cell that `memory_replay` runs as CUDA graphs: no Python and no launches a segment, but the same arithmetic.

        cell = CapturedCell(model.cell)
        loss, memory = memory_replay(cell, segments, memory, reduction="mean")

    It holds the graphs, their memory, and one set of float32 gradients; keep it as long as the model. A form of
    segments that was not seen before is captured first, which takes a few eager segments' time. On a CPU it is the
    cell.

    Args:
        cell: a cell as `memory_replay` takes, or a `StagedCell`, whose parts are captured one by one. It must launch
            the same kernels for every segment of one form: what is decided by values, makes the host wait for the GPU,
            changes buffers, or draws on other than PyTorch's CUDA generators cannot be captured. Such a cell runs in
            Python, and a warning says why, once.
        always: raise where the cell cannot be captured, instead.

    Gradients are those of the uncaptured rollout. `strict` and `random_sources` run it in Python. Parameters may be
    trained in place; replaced ones are noticed.
    """

    def __init__(self, cell: Callable[[Any, Any], tuple[Any, Any]], *, always: bool = False):
        self.cell, self.always = cell, always
        self.reason: str | None = None  # why it runs in Python
        self.modules = modules_of(cell)
        self._even_on_a_cpu = always  # the same code without graphs, for tests
        self._store = _Store()

    def __call__(self, segment: Any, state: Any) -> tuple[Any, Any]:
        return self.cell(segment, state)

    def clear(self) -> None:
        """Lets go of all graphs and their memory."""
        self._store = _Store()

    def parts(
        self, surroundings: Surroundings, parameters: list[Tensor], given: Sequence[Tensor], budget: int | None
    ) -> Parts | None:
        """The parts of one rollout over `given`, or None where it must run in Python."""
        devices = {t.device for t in (*parameters, *given)}
        if self.reason is not None or not self._even_on_a_cpu and all(d.type == "cpu" for d in devices):
            return None
        if len(devices) != 1:
            self.give_up(NotCapturable(f"its tensors lie on {', '.join(sorted(map(str, devices))) or 'no device'}"))
            return None
        self._store.follow(parameters, devices.pop())
        functions = functions_of(self.cell)
        return Parts(**{n: CapturedPart(n, f, surroundings, self._store, budget) for n, f in functions.items()})

    def give_up(self, error: "NotCapturable") -> None:
        """From now on the cell runs in Python."""
        self.clear()
        if self.always:
            raise RuntimeError(f"memory_replay: the cell cannot be captured: {error}") from error
        self.reason = str(error)
        warnings.warn(f"memory_replay: the cell runs in Python, not as CUDA graphs: {error}", stacklevel=5)


class NotCapturable(Exception):
    """Says why."""


@dataclass
class _Pool:
    """Memory that the recordings of one part share. What a forward left in it for its backward stands until another
    recording of the pool runs that does not follow it."""

    handle: tuple | None
    pending: dict["_Pair", object] = field(default_factory=dict)

    def runs(self, pair: "_Pair") -> None:
        """Nothing is pending any more but what the pairs recorded before `pair`, in the same capture, left."""
        before = pair.capture.pairs[: pair.capture.pairs.index(pair)]
        self.pending = {p: ticket for p, ticket in self.pending.items() if p in before}


@dataclass
class _Store:
    """All captures of one cell."""

    totals: dict[str, StaticTotals] = field(default_factory=dict)  # of each part
    captures: list["_Capture"] = field(default_factory=list)
    pools: dict[str, _Pool] = field(default_factory=dict)
    device: torch.device | None = None
    addresses: list[tuple] = field(default_factory=list)

    # Captured graphs are made on these, which share the parameters' memory: a parameter itself may be in a graph of the
    # caller's, which ties its gradient to the caller's stream
    aliases: dict[Tensor, Tensor] = field(default_factory=dict)
    originals: dict[Tensor, Tensor] = field(default_factory=dict)

    def follow(self, parameters: list[Tensor], device: torch.device) -> None:
        """Forgets everything where the parameters are not those of the captures."""
        addresses = [(id(p), p.data_ptr(), p.requires_grad) for p in parameters]
        if addresses != self.addresses or device != self.device:
            self.pools, self.totals, self.device, self.addresses = {}, {}, device, addresses
            self.captures.clear()
            self.aliases = {p: torch.nn.Parameter(p.detach(), p.requires_grad) for p in parameters}
            self.originals = {alias: p for p, alias in self.aliases.items()}

    def original(self, leaf: Tensor) -> Tensor:
        return self.originals.get(leaf, leaf)

    def alias(self, parameter: Tensor) -> Tensor:
        return self.aliases.get(parameter, parameter)

    def totals_of(self, name: str) -> StaticTotals:
        if name not in self.totals:
            self.totals[name] = StaticTotals(self.device)
        return self.totals[name]

    def pool(self, name: str) -> _Pool:
        if name not in self.pools:
            self.pools[name] = _Pool(torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None)
        return self.pools[name]


@dataclass(frozen=True)
class _Modes:
    """All that a capture depends on besides its arguments."""

    training: tuple[bool, ...]
    autocast: Autocast
    grad: bool

    @classmethod
    def now(cls, surroundings: Surroundings) -> "_Modes":
        training = tuple(module.training for module in surroundings.modules.owners)
        return cls(training, surroundings.autocast, torch.is_grad_enabled())


@dataclass
class _Record:
    capture: "_Capture"
    random: tuple | None
    pair: "_Pair | None" = None
    ticket: object = None


class CapturedPart:
    """See `rollout.Part`."""

    def __init__(self, name: str, function: Callable, surroundings: Surroundings, store: _Store, budget: int | None):
        self.name, self.function, self.surroundings, self.store = name, function, surroundings, store
        self.budget = budget
        self.bytes_each: int | None = None
        self.keeps: int | None = None  # how many of the last calls keep their graph
        self.used: list[_Capture] = []
        self.modes = _Modes.now(surroundings)
        self._state: list[int] | None = None  # which of the arguments' tensors are the state's

    @property
    def parameters(self) -> list[Tensor]:
        found = [self.store.original(leaf) for capture in self.used for leaf in capture.leaves]
        return list({id(p): p for p in found}.values())

    def run_only(self, arguments: Tree) -> Tree:
        return self._capture(arguments).run(arguments)

    def run(self, label: str, arguments: Tree, left: int) -> tuple[Tree, _Record]:
        capture = self._capture(arguments)
        record = _Record(capture, self.surroundings.random.get() if capture.draws else None)
        if self.keeps is None:  # the first of the rollout's calls
            most = left + 1 if self.name == "advance" else 1
            self.keeps = 1 if self.budget is None else min(self.budget // max(capture.bytes, 1), most)
        capture.need_pairs(max(1, self.keeps))
        if left >= self.keeps or not capture.pairs:
            return capture.run(arguments), record
        record.pair, record.ticket = capture.pairs[self.keeps - 1 - left], object()
        result = capture.copied(record.pair.run(arguments))
        capture.pool.pending[record.pair] = record.ticket
        return result, record

    def run_and_pull(self, label: str, arguments: Tree, weight: float, totals: Totals) -> tuple[Tree, Grads]:
        capture = self._capture(arguments)
        capture.need_pairs(1)
        totals.taking_static(self.store.totals_of(self.name), self.store.alias)
        if not capture.pairs:
            return capture.run(arguments), [None] * len(arguments.tensors())
        result = capture.copied(capture.pairs[0].run(arguments))
        return result, capture.pairs[0].pull([weight] * len(capture.needs_grad))

    def pull(self, record: _Record, arguments: Tree, grads: Grads, totals: Totals) -> Grads:
        capture, pair = record.capture, record.pair
        totals.taking_static(self.store.totals_of(self.name), self.store.alias)
        if pair is None or capture.pool.pending.pop(pair, None) is not record.ticket:
            if record.random is not None:
                self.surroundings.random.set(record.random)
            pair = capture.pairs[0]
            pair.run(arguments)
        return pair.pull(grads)

    def group(self, left: int, budget: int | None) -> int:
        return 1 if self.bytes_each is None else groups_of(left, self.bytes_each, budget)

    def _with_state_as_leaf(self, arguments: Tree) -> Tree:
        """The first state may need no gradient where the others do; one capture serves them all."""
        tensors = arguments.tensors()
        if self._state is None:
            state = {id(t) for t in Tree.of(arguments.whole()[1]).tensors() if t.is_floating_point()}
            self._state = [i for i, t in enumerate(tensors) if id(t) in state]
        if all(tensors[i].requires_grad for i in self._state):
            return arguments
        return arguments.replace([as_leaf(t, t.requires_grad or i in self._state) for i, t in enumerate(tensors)])

    def _capture(self, arguments: Tree) -> "_Capture":
        """The capture that serves these arguments: made now if there is none."""
        if self.name == "advance" and self.modes.grad:
            arguments = self._with_state_as_leaf(arguments)
        form = arguments.spec, [_leaf_form(leaf) for leaf in arguments.leaves], self.modes
        capture = next((c for c in self.store.captures if (c.name, c.form) == (self.name, form)), None)
        if capture is None:
            capture = _Capture(self, form, arguments)
            self.store.captures.append(capture)
        if capture not in self.used:
            self.used.append(capture)
        if self.bytes_each is None:
            self.bytes_each = capture.bytes
        return capture


def _leaf_form(leaf: Any) -> tuple:
    return (leaf.shape, leaf.dtype, leaf.requires_grad) if isinstance(leaf, Tensor) else (type(leaf), leaf)


class _Capture:
    """One part for arguments of one form."""

    def __init__(self, part: CapturedPart, form: tuple, arguments: Tree):
        self.name, self.form, self.function, self.store = part.name, form, part.function, part.store
        self.surroundings, self.pool = part.surroundings, part.store.pool(part.name)
        self.leaves: list[Tensor] = []  # aliases of parameters, and other leaves in use
        self.needs_grad: list[bool] = []
        self.draws = False
        self.bytes = 0
        self.pairs: list[_Pair] = []
        self._forward: Recording[Tree] | None = None
        self._arguments = _static(arguments)
        self._try(arguments)

    def run(self, arguments: Tree) -> Tree:
        """The result without a graph."""
        if self._forward is None:
            self._record_forward(torch.no_grad())
        _copy(arguments.tensors(), self._arguments.tensors())
        self.pool.pending.clear()
        return self.copied(self._forward.replay())

    def copied(self, result: Tree) -> Tree:
        copies = _copies(result.tensors())
        for copy, needs_grad in zip(copies, self.needs_grad, strict=False):
            copy.requires_grad_(needs_grad)
        return result.replace(copies)

    def call(self, arguments: Tree) -> Tree:
        modules = self.surroundings.modules
        with modules.parameters_replaced(self.store.aliases), self.surroundings.autocast.again():
            return Tree.of(self.function(*arguments.whole()))

    def record(self, body: Callable) -> Recording:
        try:
            return Recording(body, self.store.device, pool=self.pool.handle, warm_ups=0)
        except RuntimeError as error:
            raise NotCapturable(str(error).splitlines()[0]) from error

    def need_pairs(self, count: int) -> None:
        """At least `count` pairs, where there is anything to go back for."""
        if len(self.pairs) >= count or not any(self.needs_grad):
            return
        self.pool.pending.clear()
        self.pairs.clear()
        pairs = [_Pair(self, self._arguments if i == 0 else _static(self._arguments)) for i in range(count)]
        # all forwards before all backwards: what one leaves for its backward, no other may overwrite
        with self.surroundings.random.kept():
            for pair in pairs:
                pair.record_forward()
            for pair in reversed(pairs):
                pair.record_backward()
            self.pairs = pairs
            self._check_forward()

    def _record_forward(self, mode: Any) -> None:
        def body() -> Tree:
            with mode:
                result = self.call(self._arguments)
            return result.replace([t.detach() for t in result.tensors()])

        self._forward = self.record(body)

    def _check_forward(self) -> None:
        """A forward without a graph may have kernels of its own. The trajectory then is run with one."""
        self._record_forward(torch.no_grad())
        state = self.surroundings.random.get()
        results = []
        for recording in (self._forward, self.pairs[0].forward):
            self.surroundings.random.set(state)
            results.append([t.clone() for t in recording.replay().tensors()])
        if not all(map(same_bits, *results)):
            self._record_forward(torch.enable_grad())

    def _try(self, arguments: Tree) -> None:
        """Runs it aside as it is: kernels get compiled; what it uses, draws and holds is found."""
        modules, random = self.surroundings.modules, self.surroundings.random
        replaced = modules.parameters_replaced(self.store.aliases)
        with random.kept(), modules.kept_if_raises(), replaced, aside(self.store.device):
            cpu, others, _ = random.get()
            buffers = versions_of(modules.buffers())
            if torch.is_grad_enabled():
                self._try_with_gradients(arguments)
            else:
                self.call(arguments.cut())
            cpu_after, others_after, _ = random.get()
            if self.store.device.type == "cuda" and not torch.equal(cpu, cpu_after):
                raise NotCapturable("it draws on the CPU's random generator")
            if versions_of(modules.buffers()) != buffers:
                raise NotCapturable("it changes a buffer of a module")
            self.draws = not all(map(torch.equal, (cpu, *others), (cpu_after, *others_after)))

    def _try_with_gradients(self, arguments: Tree) -> None:
        for _ in range(2):
            trial, totals = PythonPart(self.function, self.surroundings, Keeper(None, count=True)), Totals()
            result, record = trial.run(self.name, arguments.cut(), 0)
            self.needs_grad = [t.requires_grad for t in result.tensors()]
            if any(self.needs_grad):
                grads = [torch.zeros_like(t) if t.requires_grad else None for t in result.tensors()]
                trial.pull(record, arguments.cut(), grads, totals)
        self.leaves, self.bytes = trial.parameters, trial.bytes_each
        self.store.totals_of(self.name).reserve([leaf for leaf in self.leaves if totals.of(leaf) is not None])


class _Pair:
    """A forward with its graph, and the backward of it."""

    def __init__(self, capture: _Capture, arguments: Tree):
        self.capture, self.arguments = capture, arguments
        self.leaves: list[Tensor] = []
        self.made: list[Tensor] = []
        self.forward: Recording[Tree]
        self.backward: Recording[Grads] | None = None

    def run(self, arguments: Tree) -> Tree:
        """The result, where the next run will write its own."""
        _copy(arguments.tensors(), self.arguments.tensors())
        self.capture.pool.runs(self)
        return self.forward.replay()

    def pull(self, grads: Sequence[Tensor | float | None]) -> Grads:
        """Gradients of the results to those of the arguments; the parameters' are added up in the store."""
        given = [(grad, static) for grad, static in zip(grads, self.grads, strict=True) if static is not None]
        for grad, static in given:
            if not isinstance(grad, Tensor):
                static.fill_(grad or 0.0)
        tensors = [pair for pair in given if isinstance(pair[0], Tensor)]
        _copy([grad for grad, _ in tensors], [static for _, static in tensors])
        found = self.backward.replay()
        copies = iter(_copies([g for g in found if g is not None]))
        return [None if g is None else next(copies) for g in found]

    def record_forward(self) -> None:
        def body() -> Tree:
            leaves = self.arguments.cut()
            with torch.enable_grad():
                result = self.capture.call(leaves)
            self.leaves, self.made = leaves.tensors(), result.tensors()
            return result.replace([t.detach() for t in self.made])

        self.forward = self.capture.record(body)
        if not self.made:
            self.forward.replay()
        self.grads = [torch.zeros_like(m) if m.requires_grad else None for m in self.made]

    def record_backward(self) -> None:
        capture = self.capture
        roots = [i for i, grad in enumerate(self.grads) if grad is not None]
        wanted = [i for i, leaf in enumerate(self.leaves) if leaf.requires_grad]

        def body() -> Grads:
            with capture.store.totals_of(capture.name).taking(capture.leaves):
                grads = torch.autograd.grad(
                    [self.made[i] for i in roots],
                    [*(self.leaves[i] for i in wanted), *capture.leaves],
                    [self.grads[i] for i in roots],
                    allow_unused=True,
                )
            of = dict(zip(wanted, grads, strict=False))
            return [of.get(i) for i in range(len(self.arguments.tensors()))]

        self.backward = capture.record(body)
        if capture.store.device.type == "cuda":
            self.leaves, self.made = [], []


def _static(arguments: Tree) -> Tree:
    return arguments.replace([as_leaf(t.clone(), t.requires_grad) for t in arguments.tensors()])


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(t) for t in tensors]
    _copy(tensors, copies)
    return copies


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copies all in one launch."""
    if targets:
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)
