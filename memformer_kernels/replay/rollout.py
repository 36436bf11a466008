"""Memory-replay back-propagation, exactly, as one autograd node.

    forward    m_0 given; for t = 0 .. S-1:  o_t, m_{t+1} = cell(x_t, m_t); keep m_0 .. m_{S-1}
    backward   g = dLoss/dm_S; for t = S-1 .. 0:  run cell(x_t, m_t) again; back-propagate dLoss/do_t and g through it;
               add up the parameters' gradients; g = dLoss/dm_t

A rollout is a list of calls of the cell's parts: of the cell itself, one a segment, or of the three parts of a
`StagedCell`. A call reads values and makes values; the values that calls read are kept, and nothing else. The backward
goes through the calls from the last to the first with a table of the values' gradients. How a call is run, and run
again, its part knows: `python_part` in Python, `captured` from CUDA graphs.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from memformer_kernels.replay.surroundings import Surroundings, versions_of
from memformer_kernels.replay.totals import Totals, gradients
from memformer_kernels.replay.tree import Tree, as_leaf

Grads = list[Tensor | None]
LARGE = 2**26  # bytes of a segment's graph, of work that fills a GPU: in groups it is no faster


class Part(Protocol):
    """A function of pytrees that can be run again."""

    parameters: list[Tensor]  # leaves in use, as far as they are known
    bytes_each: int | None  # what the graph of one segment holds

    def run_only(self, arguments: Tree) -> Tree:
        """The result, never to be run again."""

    def run(self, label: str, arguments: Tree, left: int) -> tuple[Tree, Any]:
        """The result, cut off its graph, and a record for `pull`. `label` names the call in messages; `left` segments
        come after it."""

    def pull(self, record: Any, arguments: Tree, grads: Grads, totals: Totals) -> Grads:
        """Runs again, and back-propagates gradients of the result's tensors to those of the arguments' tensors; those
        of the parameters go to `totals`."""

    def run_and_pull(self, label: str, arguments: Tree, weight: float, totals: Totals) -> tuple[Tree, Grads]:
        """The result, and the gradients where that of each of its elements is `weight`."""

    def group(self, left: int, budget: int | None) -> int:
        """How many of `left` segments to take at once."""


@dataclass
class Parts:
    """A cell's parts; a plain cell is all `advance`."""

    advance: Part
    prepare: Part | None = None
    readout: Part | None = None

    def sizes(self) -> dict[str, int]:
        """What the graph of one segment holds, of each part."""
        parts = dict(advance=self.advance, prepare=self.prepare, readout=self.readout)
        return {name: part.bytes_each for name, part in parts.items() if part is not None}

    def allowed(self, budget: int | None) -> int | None:
        """The budget of a group: by default the graph of one segment, if that is not large."""
        if budget is not None or self.advance.bytes_each is None:  # which its first call measures
            return budget
        return min(self.advance.bytes_each, LARGE)


@dataclass
class Call:
    part: Part
    arguments: Tree  # hollow: its tensors are the values `reads`
    reads: list[int]
    makes: list[int]
    record: Any
    early: list[int | None] | None = None  # values: gradients of what it reads, where the forward made them


@dataclass
class Tape:
    """The calls of one rollout in the order they ran, and the values between them."""

    versions: dict[Tensor, int]  # of the parameters before the forward
    calls: list[Call] = field(default_factory=list)
    early: Totals = field(default_factory=Totals)  # of the parameters, where the forward made them
    early_sums: dict[Tensor, int] = field(default_factory=dict)  # the same as values
    loss: int | None = None  # the value that is the sum of the early calls' results
    values: list[Tensor | None] = field(default_factory=list)
    given: int = 0  # how many of the values the rollout was given
    parameters: list[Tensor] = field(default_factory=list)
    _numbers: dict[int, int] = field(default_factory=dict)  # of values, by the identity of their tensors

    def admit(self, tree: Tree) -> Tree:
        """The tree's tensors, without their graphs, as values."""
        tree = tree.cut()
        for tensor in tree.tensors():
            self._numbers[id(tensor)] = len(self.values)
            self.values.append(tensor)
        return tree

    def numbers(self, tree: Tree) -> list[int]:
        return [self._numbers[id(t)] for t in tree.tensors()]

    def call(self, part: Part, label: str, left: int, *arguments: Any, weight: float | None = None) -> Any:
        """The part's result on pytrees of values, a pytree of values; with a weight, its gradient at once."""
        tree, early, record = Tree.of(arguments), None, None
        leaves, reads = tree.cut(), self.numbers(tree)
        if weight is None:
            result, record = part.run(label, leaves, left)
        else:
            result, grads = part.run_and_pull(label, leaves, weight, self.early)
            early = [None if grad is None else self._keep(grad) for grad in grads]
            for number in reads:
                if number >= self.given:  # what another call made: nobody reads it again
                    self.values[number] = None
        result = self.admit(result)
        self.calls.append(Call(part, tree.hollow(), reads, self.numbers(result), record, early))
        return result.whole()

    def _keep(self, tensor: Tensor) -> int:
        self.values.append(tensor)
        return len(self.values) - 1

    def make_loss(self, loss: Tensor) -> Tensor:
        """`loss`, the sum of the early calls' results, as a value."""
        differentiable = any(n is not None for call in self.calls for n in call.early or ())
        (loss,) = self.admit(Tree.of([loss.requires_grad_(differentiable)])).tensors()
        self.loss = self._numbers[id(loss)]
        return loss

    def close(self) -> None:
        """The forward is over: keeps the values that the backward needs."""
        parts = {id(call.part): call.part for call in self.calls}.values()
        self.parameters = list({id(p): p for part in parts for p in part.parameters}.values())
        for parameter in self.parameters:
            self.versions.setdefault(parameter, parameter._version)
        self.early_sums = {p: self._keep(total) for p in self.parameters if (total := self.early.of(p)) is not None}
        self.early = Totals()
        needed = {n for call in self.calls for n in (call.reads if call.early is None else call.early)}
        needed |= set(self.early_sums.values())
        self.values = [value if n in needed else None for n, value in enumerate(self.values)]
        self._numbers.clear()


class NoTape:
    """Calls without gradients."""

    def admit(self, tree: Tree) -> Tree:
        return tree

    def call(self, part: Part, label: str, left: int, *arguments: Any) -> Any:
        return part.run_only(Tree.of(arguments)).whole()


def run_parts(
    tape: Tape | NoTape, parts: Parts, segments: Sequence[Any], state: Any, *, budget: int | None, **at_once: float
) -> tuple[list[Any], Any]:
    """The rollout itself: `advance` from segment to segment, `prepare` and `readout` of many segments at once."""
    inputs, outputs = list(segments) if parts.prepare is None else [], []
    for t in range(len(segments)):
        if t == len(inputs):
            inputs += _next_group(tape, parts.prepare, "prepare", [segments], t, parts.allowed(budget))
        result = tape.call(parts.advance, f"segment {t}", len(segments) - 1 - t, inputs[t], state)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(f"memory_replay: cell must return (output, next_state), got {type(result).__name__}")
        outputs.append(result[0])
        state = result[1]
    if parts.readout is not None:
        features, outputs = outputs, []
        while (t := len(outputs)) < len(segments):
            budget_now = parts.allowed(budget)
            outputs += _next_group(tape, parts.readout, "readout", [features, segments], t, budget_now, **at_once)
            features[: len(outputs)] = [None] * len(outputs)
    return outputs, state


def _next_group(
    tape: Tape | NoTape, part: Part, name: str, lists: list[Sequence[Any]], t: int, budget: int | None, **at_once: float
) -> list[Any]:
    """A part that takes lists, from segment t on, over as many segments as the budget allows."""
    left = len(lists[0]) - t
    size = part.group(left, budget)
    label = f"{name} of segments {t} to {t + size - 1}"
    result = tape.call(part, label, left - size, *(list(one[t : t + size]) for one in lists), **at_once)
    if not (isinstance(result, list | tuple) and len(result) == size):
        got = f"{len(result)} items" if isinstance(result, list | tuple) else type(result).__name__
        raise TypeError(f"memory_replay: {name} must return a list, one item a segment ({size}), got {got}")
    return list(result)


def weighed_sum(outputs: list[Any], weight: float) -> Tensor:
    """Their sum times `weight`."""
    for output in outputs:
        if not isinstance(output, Tensor) or output.dim():
            got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise TypeError(f"memory_replay: outputs must be scalar tensors with a reduction, got {got}")
    return torch.stack(outputs).sum() * weight


@dataclass
class Passes:
    """The two passes of one rollout with gradients. With `weight`, the outputs' sum times it is in their place."""

    parts: Parts
    surroundings: Surroundings
    budget: int | None
    weight: float | None

    def forward(self, given: Tree, versions: dict[Tensor, int]) -> Tree:
        """Of `(segments, state)`: outputs and last state, without a graph. `versions` are the parameters'."""
        self.tape = tape = Tape(versions)
        admitted = tape.admit(given)
        tape.given = len(tape.values)
        at_once = {} if self.weight is None else {"weight": self.weight}
        outputs, final = run_parts(tape, self.parts, *admitted.whole(), budget=self.budget, **at_once)
        if self.weight is not None:
            outputs = tape.make_loss(weighed_sum(outputs, self.weight))
        result = Tree.of((outputs, final))
        self.reads, self.makes = tape.numbers(admitted), tape.numbers(result)
        tape.close()
        return result

    def backward(self, values: list[Tensor | None], grads: Iterable[Tensor | None]) -> tuple[Grads, list[Totals]]:
        """From gradients of the result's tensors: those of the given tensors, and sums of the parameters'. `values` are
        the tape's."""
        table = _Table(zip(self.makes, grads, strict=True))
        totals = _go_back(self.tape, values, table)
        return [table.take(n) for n in self.reads], totals


def differentiable(passes: Passes, versions: dict[Tensor, int], given: Tree) -> tuple[Any, Any]:
    """A rollout of `(segments, state)` as one node of the autograd graph: outputs and last state."""
    with passes.surroundings.kept_if_raises():
        result = passes.forward(given, versions)
    returned = _Replay.apply(passes, result.tensors(), *given.tensors(), *passes.tape.parameters)
    return result.replace(returned).whole()


class _Replay(torch.autograd.Function):
    """The node of one rollout. Inputs: tensors of the segments and of the state, parameters; outputs: `tensors`."""

    @staticmethod
    def forward(ctx, passes: Passes, tensors: list[Tensor], *inputs):
        ctx.set_materialize_grads(False)
        returned = [t.detach() for t in tensors]
        ctx.mark_non_differentiable(*(r for r, t in zip(returned, tensors, strict=True) if not t.requires_grad))
        # through save_for_backward, so that PyTorch frees these after the backward, notices edits before it, and
        # offers them to its hooks. Not the parameters: their identity matters, and a hook may return a copy
        values, passes.tape.values = passes.tape.values, []
        ctx.save_for_backward(*(value for value in values if value is not None))
        ctx.flags = [None if value is None else value.requires_grad for value in values]
        ctx.passes = passes
        return tuple(returned)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                'memory_replay: a replayed rollout has no second derivative (create_graph=True); method="bptt" has'
            )
        rule = "memory_replay: parameters, segments and state must not change between forward and backward"
        passes: Passes = ctx.passes
        parameters, versions = passes.tape.parameters, passes.tape.versions
        for parameter, version in zip(parameters, versions_of(parameters), strict=True):
            if version != versions[parameter] or not parameter.requires_grad:
                change = "modified" if parameter.requires_grad else "frozen"
                raise RuntimeError(f"{rule}, got a {change} parameter of shape {list(parameter.shape)}")
        try:
            saved = iter(ctx.saved_tensors)
        except RuntimeError as error:
            raise RuntimeError(f"{rule}, and backward runs once unless retain_graph=True: {error}") from error
        values = [None if needs_grad is None else as_leaf(next(saved), needs_grad) for needs_grad in ctx.flags]
        with passes.surroundings.random.kept():
            of_given, totals = passes.backward(values, grads)
        return None, None, *of_given, *gradients(totals, parameters)


class _Table:
    """Gradients of values, by number."""

    def __init__(self, grads: Iterable[tuple[int, Tensor | None]]):
        self._grads: dict[int, Tensor] = {}
        self.add(grads)

    def add(self, grads: Iterable[tuple[int, Tensor | None]]) -> None:
        for number, grad in grads:
            if grad is not None:
                self._grads[number] = self._grads[number] + grad if number in self._grads else grad

    def take(self, number: int) -> Tensor | None:
        return self._grads.pop(number, None)


def _go_back(tape: Tape, values: list[Tensor | None], table: _Table) -> list[Totals]:
    """Calls last to first; sums of the parameters' gradients, which nobody sees before the end."""
    totals: dict[int, Totals] = defaultdict(Totals)  # of each part
    of_loss = None if tape.loss is None else table.take(tape.loss)
    for call in reversed(tape.calls):
        if call.early is not None:
            if of_loss is not None:
                scaled = [None if n is None else _scaled(values[n], of_loss) for n in call.early]
                table.add(zip(call.reads, scaled, strict=True))
            continue
        grads = [table.take(n) for n in call.makes]
        if any(g is not None for g in grads):
            arguments = call.arguments.replace([as_leaf(values[n], values[n].requires_grad) for n in call.reads])
            found = call.part.pull(call.record, arguments, grads, totals[id(call.part)])
            table.add(zip(call.reads, found, strict=True))
    early = {} if of_loss is None else {p: _scaled(values[n], of_loss) for p, n in tape.early_sums.items()}
    return [*totals.values(), Totals(early)]


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    return grad * factor.to(grad.dtype)
