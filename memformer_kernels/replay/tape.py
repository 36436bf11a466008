"""What a rollout is made of: parts that can be run again, calls of them, and the values between the calls.

A call reads values and makes values; the values that calls read are kept, and nothing else. How a call is run, and run
again, its part knows: `python_part` in Python, `captured` from CUDA graphs.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from memformer_kernels.replay.budget import LARGE_GROUP
from memformer_kernels.replay.surroundings import unmodified
from memformer_kernels.replay.totals import Totals
from memformer_kernels.replay.tree import Tree, as_leaf

Grads = list[Tensor | None]


class Part(Protocol):
    """A function of pytrees that can be run again."""

    parameters: list[Tensor]  # leaves in use, as far as they are known
    bytes_each: int | None  # what the graph of one segment holds, once one was made
    expected_bytes: int | None  # the same, if it is known before

    def run_only(self, arguments: Tree) -> Tree:
        """The result, never to be run again."""

    def run(self, label: str, arguments: Tree, left: int) -> tuple[Tree, Any]:
        """The result, cut off its graph, and a record for `pull`. `label` names the call in messages; `left` segments
        come after it."""

    def pull(self, record: Any, arguments: Tree, grads: Grads, totals: Totals) -> Grads:
        """Runs again, and back-propagates gradients of the result's tensors to those of the arguments' tensors; those
        of the parameters go to `totals`."""

    def run_ahead(self, record: Any, arguments: Tree) -> bool:
        """Runs again what `pull` would; whether there was a need to."""

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

    def sizes(self) -> dict[str, int | None]:
        """What the graph of one segment holds, of each part."""
        parts = dict(advance=self.advance, prepare=self.prepare, readout=self.readout)
        return {name: part.expected_bytes for name, part in parts.items() if part is not None}

    def allowed(self, budget: int | None) -> int | None:
        """The budget of a group: by default the graph of one segment, if that is not large."""
        if budget is not None or self.advance.bytes_each is None:  # which its first call measures
            return budget
        return min(self.advance.bytes_each, LARGE_GROUP)


@dataclass
class Call:
    part: Part
    arguments: Tree  # hollow: its tensors are the values `reads`
    reads: list[int]
    makes: list[int]
    record: Any
    early: list[int | None] | None = None  # values: gradients of what it reads, where the forward made them

    def arguments_of(self, values: list[Tensor | None]) -> Tree:
        return self.arguments.replace([as_leaf(values[n], values[n].requires_grad) for n in self.reads])


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
        """The tree's tensors, without their graphs, as values: each a tensor of its own, also where one stands there
        twice or is a value already."""
        own = []
        for tensor in (tree := tree.cut()).tensors():
            if id(tensor) in self._numbers:
                tensor = tensor.detach().requires_grad_(tensor.requires_grad)
            self._numbers[id(tensor)] = len(self.values)
            self.values.append(tensor)
            own.append(tensor)
        return tree.replace(own)

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
        of_reads = any(n is not None for call in self.calls for n in call.early or ())
        (loss,) = self.admit(Tree.of([loss.detach().requires_grad_(of_reads or bool(self.early))])).tensors()
        self.loss = self._numbers[id(loss)]
        return loss

    def close(self, *, own_sums: bool) -> None:
        """The forward is over: keeps the values that the backward needs; early sums with memory of their own."""
        parts = {id(call.part): call.part for call in self.calls}.values()
        self.parameters = list({id(p): p for part in parts for p in part.parameters}.values())
        for parameter in self.parameters:
            self.versions.setdefault(parameter, parameter._version)
        if own_sums:
            self.early.own()
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
        given = Tree.of(arguments)
        with unmodified(given.tensors(), label):
            return part.run_only(given).whole()
