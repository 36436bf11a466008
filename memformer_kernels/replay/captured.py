"""Rollouts as CUDA graphs: the passes of the engine, recorded once for segments of one form, and replayed.

What is recorded is the engine in Python as it stands, on tensors that stay: its calls, its budget, its sums; calls that
do not depend on one another go to several streams (`lanes`). A replay copies the segments and the state in, and the
outputs, the last state and the gradients out. A rollout that is longer than one graph should be is a rollout of
rollouts: of all but the last the forward is run again before the backward.
"""

import dataclasses
import functools
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from memformer_kernels.recording import Recording, aside
from memformer_kernels.replay.graph_random import GraphRandom
from memformer_kernels.replay.lanes import Lanes
from memformer_kernels.replay.python_part import python_parts
from memformer_kernels.replay.rollout import Passes, run_parts
from memformer_kernels.replay.surroundings import Surroundings, modules_of, versions_of
from memformer_kernels.replay.tape import Grads, NoTape
from memformer_kernels.replay.totals import Totals, sums_of
from memformer_kernels.replay.tree import Tree, as_leaf


class CapturedCell:
    """A cell that `memory_replay` runs as CUDA graphs: no Python and no launches a segment, but the same arithmetic.

        cell = CapturedCell(model.cell)
        loss, memory = memory_replay(cell, segments, memory, reduction="mean")

    It holds the graphs and their memory; keep it as long as the model. A form of rollout that was not seen before
    (shapes, number of segments, budget, reduction) is recorded first, which takes a few rollouts in Python. On a CPU it
    is the cell.

    Args:
        cell: a cell as `memory_replay` takes, or a `StagedCell`. It must launch the same kernels for every segment of
            one form: what is decided by values, makes the host wait for the GPU, changes buffers, or draws on other
            than PyTorch's CUDA generators cannot be captured. Such a cell runs in Python, and a warning says why, once.
        segments_per_graph: of longer rollouts, graphs of about as many segments follow one another. All but the last
            run their forward twice, and parameters' gradients are added up by graph.
        always: raise where the cell cannot be captured, instead.

    Gradients are those of the uncaptured rollout. `strict` and `random_sources` run it in Python. Parameters may be
    trained in place; replaced ones are noticed.
    """

    def __init__(
        self, cell: Callable[[Any, Any], tuple[Any, Any]], *, segments_per_graph: int = 128, always: bool = False
    ):
        if segments_per_graph < 1:
            raise ValueError(f"CapturedCell: segments_per_graph must be at least 1, got {segments_per_graph}")
        self.cell, self.segments_per_graph, self.always = cell, segments_per_graph, always
        self.reason: str | None = None  # why it runs in Python
        self.modules = modules_of(cell)
        self._even_on_a_cpu = always  # the same code without graphs, for tests
        self._store = _Store()

    def __call__(self, segment: Any, state: Any) -> tuple[Any, Any]:
        return self.cell(segment, state)

    def clear(self) -> None:
        """Lets go of all graphs and their memory."""
        self._store = _Store()

    def takes(self, devices: Sequence[torch.device]) -> bool:
        """Whether a rollout with tensors on these devices runs as graphs."""
        if self.reason is not None or not self._even_on_a_cpu and all(d.type == "cpu" for d in devices):
            return False
        if len(devices) != 1:
            self.give_up(NotCapturable(f"its tensors lie on {', '.join(map(str, devices)) or 'no device'}"))
            return False
        return True

    def chunks(self, segments: list) -> list[list]:
        """The segments of each graph."""
        size = -(-len(segments) // -(-len(segments) // self.segments_per_graph))
        return [segments[t : t + size] for t in range(0, len(segments), size)]

    def part(self, surroundings: Surroundings, parameters: list[Tensor], **options: Any) -> "CapturedRollout":
        """The part of a rollout whose segments are `chunks`."""
        self._store.follow(parameters, surroundings.devices[0])
        return CapturedRollout(self.cell, surroundings, self._store, **options)

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
class _Store:
    """All captures of one cell, in one pool of memory."""

    captures: list["_Capture"] = field(default_factory=list)
    pool: tuple | None = None
    pending: object = None  # the ticket of the forward that left in the pool what its backward needs
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
            self.captures, self.pending, self.device, self.addresses = [], None, device, addresses
            self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
            self.aliases = {p: torch.nn.Parameter(p.detach(), p.requires_grad) for p in parameters}
            self.originals = {alias: p for p, alias in self.aliases.items()}


@dataclass
class _Record:
    capture: "_Capture"
    random: tuple | None  # where the forward began
    ticket: object


class CapturedRollout:
    """A rollout as a part of another: `(segments, state) -> (outputs, state)`. See `tape.Part`."""

    bytes_each = expected_bytes = None

    def __init__(
        self,
        cell: Callable,
        surroundings: Surroundings,
        store: _Store,
        *,
        budget: int | None,
        asked: int | float | None,
        weight: float | None,
    ):
        """`budget` in bytes, as it was `asked` for; `weight` as `rollout.Passes` has it."""
        self.cell, self.surroundings, self.store, self.budget, self.weight = cell, surroundings, store, budget, weight
        self.parameters: list[Tensor] = []
        training = tuple(module.training for module in surroundings.modules.owners)
        self._rest_of_form = training, surroundings.autocast, torch.is_grad_enabled(), asked, weight

    def run_only(self, arguments: Tree) -> Tree:
        return self._capture(arguments).run(arguments)[0]

    def run(self, label: str, arguments: Tree, left: int) -> tuple[Tree, _Record]:
        capture = self._capture(arguments)
        result, random = capture.run(arguments)
        self.parameters += capture.parameters  # while the GPU runs; `Tape.close` takes each once
        return result, _Record(capture, random, self.store.pending)

    def pull(self, record: _Record, arguments: Tree, grads: Grads, totals: Totals) -> Grads:
        capture = record.capture
        totals.own()  # what the last backward lent is overwritten now
        if self.store.pending is not record.ticket:
            capture.run_again(arguments, record.random)
        self.store.pending = None
        of_arguments, sums = capture.pull(grads, record.random)
        totals.lend({self.store.originals.get(leaf, leaf): total for leaf, total in sums.items()})
        return of_arguments

    def _capture(self, arguments: Tree) -> "_Capture":
        """The capture that serves these arguments: made now if there is none."""
        form = arguments.spec, [_leaf_form(leaf) for leaf in arguments.leaves], self._rest_of_form
        capture = next((c for c in self.store.captures if c.form == form), None)
        if capture is None:
            self.store.pending = None
            capture = _Capture(self, form, arguments)
            self.store.captures.append(capture)
        return capture


def _leaf_form(leaf: Any) -> tuple:
    return (leaf.shape, leaf.dtype, leaf.requires_grad) if isinstance(leaf, Tensor) else (type(leaf), leaf)


class _Capture:
    """Rollouts of one form: a recording of the forward, and one of the backward where there is anything to go back for.

    The backward reads what the forward left in the pool.
    """

    def __init__(self, part: CapturedRollout, form: tuple, arguments: Tree):
        self.form, self.cell, self.store, self.surroundings = form, part.cell, part.store, part.surroundings
        self.budget, self.weight = part.budget, part.weight
        self.leaves: list[Tensor] = []  # aliases of parameters, and other leaves in use
        self.needs_grad: list[bool] = []
        self.random: GraphRandom | None = None
        self._inputs = _Inputs(arguments.tensors())
        self._arguments = arguments.replace(self._inputs.tensors)
        self._grads: list[Tensor | None] = []
        self._passes: Passes | None = None
        self._sizes: dict[str, int] = {}  # graphs hold a little more in a capture, which must not change the groups
        self._draws, calls = self._try(arguments)
        if self.store.device.type == "cuda":
            graph_random = GraphRandom(self.store.device, calls if self._draws else 0)
            self.surroundings = dataclasses.replace(part.surroundings, random=graph_random)
            # a rollout without gradients draws once: from the default generator, which moves on by itself
            self.random = graph_random if graph_random.generators else None
        self._record()

    @property
    def parameters(self) -> list[Tensor]:
        return [self.store.originals.get(leaf, leaf) for leaf in self.leaves]

    def run(self, arguments: Tree) -> tuple[Tree, tuple | None]:
        """The result, and where the random state stood before."""
        began = None if self.random is None else self.random.here()
        result = self.run_again(arguments, began)
        if self.random is not None:
            self.random.move_on(began)
        copies = _copies(result.tensors())
        for copy, needs_grad in zip(copies, self.needs_grad, strict=False):
            copy.requires_grad_(needs_grad)
        return result.replace(copies), began

    def run_again(self, arguments: Tree, began: tuple | None) -> Tree:
        self._inputs.copy(arguments.tensors())
        if self.random is not None:
            self.random.go_to(began)
        self.store.pending = object()
        return self._forward.replay()

    def pull(self, grads: Sequence[Tensor | None], began: tuple | None) -> tuple[Grads, dict[Tensor, Tensor]]:
        """Gradients of the result to those of the arguments, and the leaves' sums, which the next call overwrites."""
        static = [(grad, to) for grad, to in zip(grads, self._grads, strict=True) if to is not None]
        for grad, to in static:
            if grad is None:
                to.zero_()
        given = [(grad, to) for grad, to in static if grad is not None]
        _copy([grad for grad, _ in given], [to for _, to in given])
        if self.random is not None:
            self.random.go_to(began)
        found, sums = self._backward.replay()
        copies = iter(_copies([g for g in found if g is not None]))
        return [None if g is None else next(copies) for g in found], sums

    def _run_forward(self, arguments: Tree, *, recorded: bool) -> Tree:
        parts = python_parts(self.cell, self.surroundings, self.budget, count=True, sizes=self._sizes)
        if not torch.is_grad_enabled():
            return Tree.of(run_parts(NoTape(), parts, *arguments.whole(), budget=self.budget))
        lanes = self._lanes() if recorded and not self._draws else Lanes()  # which would draw in another order
        self._passes = Passes(parts, self.surroundings, self.budget, self.weight, lanes=lanes, once=True)
        return self._passes.forward(arguments.cut(), {})

    def _run_backward(self, *, recorded: bool) -> tuple[Grads, dict[Tensor, Tensor]]:
        self._passes.lanes = self._lanes() if recorded else Lanes()
        grads, totals = self._passes.backward(self._passes.tape.values, self._grads)
        return grads, sums_of(totals, self.leaves)

    def _lanes(self) -> Lanes:
        return Lanes(self.store.device, self.surroundings.modules, list(self.store.aliases.values()))

    def _record(self) -> None:
        replaced = self.surroundings.modules.parameters_replaced
        grad = torch.is_grad_enabled()

        def on_aliases(body: Callable) -> Callable:
            def run() -> Any:
                with replaced(self.store.aliases), torch.set_grad_enabled(grad):
                    result = body()
                if self.random is not None:
                    self.random.put_back()
                return result

            return run

        generators = [] if self.random is None else self.random.generators
        try:
            options = dict(pool=self.store.pool, warm_ups=0, generators=generators)
            forward = on_aliases(functools.partial(self._run_forward, self._arguments, recorded=True))
            self._forward = Recording(forward, self.store.device, **options)
            if any(self.needs_grad):
                backward = functools.partial(self._run_backward, recorded=True)
                self._backward = Recording(on_aliases(backward), self.store.device, **options)
        except RuntimeError as error:
            raise NotCapturable(str(error).splitlines()[0]) from error
        if self.store.device.type == "cuda":
            self._passes = None  # the graphs have what they need
        if self.random is not None:
            self.random.measure(self._forward.replay)

    def _try(self, arguments: Tree) -> tuple[bool, int]:
        """Runs it aside as it is: kernels get compiled; what it uses, draws and holds is found. Whether it draws, and
        how many calls it makes.

        On the arguments as they were given, which may be views that copies are not: what graphs hold depends on it.
        """
        modules, random = self.surroundings.modules, self.surroundings.random
        replaced = modules.parameters_replaced(self.store.aliases)
        with random.kept(), modules.kept_if_raises(), replaced, aside(self.store.device):
            cpu, others, _ = random.get()
            buffers = versions_of(modules.buffers())
            result = self._run_forward(arguments, recorded=False)
            self.needs_grad = [t.requires_grad for t in result.tensors()]
            self._grads = [torch.zeros_like(t) if t.requires_grad else None for t in result.tensors()]
            calls = 0
            if torch.is_grad_enabled():
                self._sizes = self._passes.parts.sizes()
                self.leaves, calls = self._passes.tape.parameters, len(self._passes.tape.calls)
                if any(self.needs_grad):
                    self._run_backward(recorded=False)
            self._passes = None
            cpu_after, others_after, _ = random.get()
            if self.store.device.type == "cuda" and not torch.equal(cpu, cpu_after):
                raise NotCapturable("it draws on the CPU's random generator")
            if versions_of(modules.buffers()) != buffers:
                raise NotCapturable("it changes a buffer of a module")
            return not all(map(torch.equal, (cpu, *others), (cpu_after, *others_after))), calls


class _Inputs:
    """Tensors that stay, of the shapes of given ones: those of one shape and dtype lie side by side, so that one launch
    fills them, unless that would put them at addresses that kernels do not like."""

    def __init__(self, given: Sequence[Tensor]):
        alike = defaultdict(list)
        for i, t in enumerate(given):
            alone = i if t.nbytes % 16 else None
            alike[t.shape, t.dtype, alone].append(i)
        places: dict[int, Tensor] = {}
        self._stacks = []
        for (shape, dtype, _), indices in alike.items():
            stack = torch.empty(len(indices), *shape, dtype=dtype, device=given[indices[0]].device)
            places |= zip(indices, stack.unbind(), strict=True)
            self._stacks.append((indices, stack))
        self.tensors = [as_leaf(places[i], t.requires_grad) for i, t in enumerate(given)]
        self.copy(given)

    @torch.no_grad()
    def copy(self, given: Sequence[Tensor]) -> None:
        for indices, stack in self._stacks:
            torch.stack([given[i] for i in indices], out=stack)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    copies = [torch.empty_like(t) for t in tensors]
    _copy(tensors, copies)
    return copies


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copies all in one launch."""
    if targets:
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)
