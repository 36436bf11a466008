"""One rollout recorded as CUDA graphs: the engine in Python as it stands, its calls, its budget, its sums, on tensors
that stay. Calls that do not depend on one another go to several streams (`lanes`)."""

import dataclasses
import functools
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
from memformer_kernels.replay.surroundings import Autocast, Surroundings, versions_of
from memformer_kernels.replay.tape import Grads, NoTape
from memformer_kernels.replay.totals import sums_of
from memformer_kernels.replay.tree import Tree, as_leaf


class NotCapturable(Exception):
    """Says why."""


@dataclass
class Store:
    """All captures of one cell, in one pool of memory."""

    captures: list["Capture"] = field(default_factory=list)
    latest: "Capture | None" = None  # that served a forward
    ahead: "Ahead | None" = None
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
            self.captures, self.latest, self.ahead, self.pending = [], None, None, None
            self.device, self.addresses = device, addresses
            self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
            self.aliases = {p: torch.nn.Parameter(p.detach(), p.requires_grad) for p in parameters}
            self.originals = {alias: p for p, alias in self.aliases.items()}


@dataclass
class Form:
    """What a capture was made for, besides the parameters."""

    spec: Any
    leaves: list[tuple]
    grad: bool
    asked: int | float | None  # the budget
    weight: float | None
    training: tuple[bool, ...] = ()  # of the modules
    autocast: Autocast | None = None

    @classmethod
    def of(cls, arguments: Tree, *rest: Any) -> "Form":
        return cls(arguments.spec, [_form_of(leaf) for leaf in arguments.leaves], torch.is_grad_enabled(), *rest)


def _form_of(leaf: Any) -> tuple:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.dtype, leaf.device, leaf.requires_grad
    if not isinstance(leaf == leaf, bool):  # an array, say, which may change
        raise NotCapturable(f"its segments or its state hold a {type(leaf).__name__}")
    return type(leaf), leaf


@dataclass
class Ahead:
    """A forward that was launched before all that it depends on was looked at."""

    capture: "Capture"
    result: Tree


class Capture:
    """Rollouts of one form: a recording of the forward, and one of the backward where there is anything to go back for.

    The backward reads what the forward left in the pool.
    """

    def __init__(
        self,
        cell: Callable,
        store: Store,
        surroundings: Surroundings,
        form: Form,
        arguments: Tree,
        *,
        budget: int | None,
        weight: float | None,
    ):
        self.cell, self.store, self.surroundings, self.form = cell, store, surroundings, form
        self.budget, self.weight = budget, weight
        self.leaves: list[Tensor] = []  # aliases of parameters, and other leaves in use
        self.needs_grad: list[bool] = []
        self.random: GraphRandom | None = None
        self._inputs = _Inputs(arguments.tensors())
        self._arguments = arguments.replace(self._inputs.tensors)
        self._grads: list[Tensor | None] = []
        self._passes: Passes | None = None
        self._sizes: dict[str, int] = {}  # graphs hold a little more in a capture, which must not change the groups
        self.draws, calls = self._try(arguments)
        if self.store.device.type == "cuda":
            graph_random = GraphRandom(self.store.device, calls if self.draws else 0)
            self.surroundings = dataclasses.replace(surroundings, random=graph_random)
            # a rollout without gradients draws once: from the default generator, which moves on by itself
            self.random = graph_random if graph_random.generators else None
        self._record()

    @property
    def parameters(self) -> list[Tensor]:
        return [self.store.originals.get(leaf, leaf) for leaf in self.leaves]

    def run(self, arguments: Tree) -> tuple[Tree, tuple | None]:
        """The result, and where the random state stood before."""
        began = None if self.random is None else self.random.here()
        ahead, self.store.ahead, self.store.latest = self.store.ahead, None, self
        result = ahead.result if ahead and ahead.capture is self else self.run_again(arguments, began)
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
        lanes = self._lanes() if recorded and not self.draws else Lanes()  # which would draw in another order
        self._passes = Passes(parts, self.surroundings, self.budget, self.weight, lanes=lanes, once=True)
        return self._passes.forward(arguments.cut(), {})

    def _run_backward(self, *, recorded: bool) -> tuple[Grads, dict[Tensor, Tensor]]:
        self._passes.lanes = self._lanes() if recorded else Lanes()
        # Autograd would use a thread of its own, and cuBLAS keeps a workspace for every thread and stream
        with torch.autograd.set_multithreading_enabled(False):
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
