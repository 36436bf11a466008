"""A part of a rollout that is run again in Python.

Each call of the forward has a graph for a moment, as each of the backward has: it is walked to find the leaves that
need a gradient, and thrown away, or kept where the budget allows. So the caller declares no parameters; a tensor that
cannot be replayed is refused; the node's inputs are the leaves in use and no others, as full back-propagation would
have it; and both passes run the same kernels, where PyTorch has others for a forward without a graph.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from memformer_kernels.replay.budget import Keeper, counting, groups_of
from memformer_kernels.replay.graph import graph_mark, leaves_of
from memformer_kernels.replay.stages import StagedCell, functions_of
from memformer_kernels.replay.surroundings import Surroundings, same_bits, unmodified, versions_of
from memformer_kernels.replay.tape import Grads, Parts
from memformer_kernels.replay.totals import Totals
from memformer_kernels.replay.tree import Tree


@dataclass
class Graph:
    """A call's graph, kept for the backward: it need not run again."""

    leaves: list[Tensor]
    made: list[Tensor]
    buffers: list[int]  # their versions


@dataclass
class Record:
    """What is kept of one call between the passes, besides its arguments."""

    label: str
    random: tuple
    modules: tuple[list[Tensor], list[bool]]
    needs_grad: list[bool]
    result: list[Tensor] | None  # when strict
    graph: Graph | None = None


class PythonPart:
    """See `tape.Part`."""

    def __init__(self, function: Callable, surroundings: Surroundings, keeper: Keeper, *, strict: bool = False):
        self.function, self.surroundings, self.keeper, self.strict = function, surroundings, keeper, strict
        self.parameters: list[Tensor] = []
        self.bytes_each: int | None = None
        self.expected_bytes: int | None = None  # in the place of what the first call measures
        self._measured: tuple[list, int] | None = None  # the last graph whose bytes were counted, and of what

    def run_only(self, arguments: Tree) -> Tree:
        with self.surroundings.autocast.again():
            return Tree.of(self.function(*arguments.whole()))

    def run(self, label: str, arguments: Tree, left: int) -> tuple[Tree, Record]:
        s = self.surroundings
        record = Record(label, s.random.get(), s.modules.record(), [], None)
        result, made, size = self._run_with_graph(label, arguments)
        record.needs_grad = [m.requires_grad for m in made]
        # copies, as the caller may modify what is returned
        record.result = [m.detach().clone() for m in made] if self.strict else None
        if not self.strict and any(record.needs_grad):
            record.graph = Graph(arguments.tensors(), made, versions_of(s.modules.buffers()))
            self.keeper.keep(record, size)
        return result.cut(), record

    def run_and_pull(self, label: str, arguments: Tree, weight: float, totals: Totals) -> tuple[Tree, Grads]:
        result, made, _ = self._run_with_graph(label, arguments, passing=True)
        grads = [torch.full_like(m, weight) if m.requires_grad else None for m in made]
        return result.cut(), self._back_propagate(arguments.tensors(), made, grads, totals)

    def pull(self, record: Record, arguments: Tree, grads: Grads, totals: Totals) -> Grads:
        graph, record.graph = record.graph, None
        if graph is not None and versions_of(self.surroundings.modules.buffers()) == graph.buffers:
            self.surroundings.random.select(record.random)
            return self._back_propagate(graph.leaves, graph.made, grads, totals)
        return self._back_propagate(arguments.tensors(), self._again(record, arguments), grads, totals)

    def run_ahead(self, record: Record, arguments: Tree) -> bool:
        if record.graph is not None:
            return False
        made = self._again(record, arguments)
        record.graph = Graph(arguments.tensors(), made, versions_of(self.surroundings.modules.buffers()))
        return True

    def group(self, left: int, budget: int | None) -> int:
        if self.bytes_each is None:
            return 1  # which measures it
        return groups_of(left, self.bytes_each, budget)

    def _run_with_graph(self, label: str, arguments: Tree, *, passing: bool = False) -> tuple[Tree, list[Tensor], int]:
        """The result, its tensors, and the bytes of its graph where the keeper counts them."""
        given, s, mark = arguments.tensors(), self.surroundings, graph_mark()
        self.keeper.expect(passing_bytes=self.expected_bytes if passing else None)
        with unmodified(given, label):
            result, size = self._run_and_measure(arguments)
        if self.bytes_each is None:
            self.bytes_each = self.expected_bytes = size if self.expected_bytes is None else self.expected_bytes
        if hiding := result.hides_graph():
            raise TypeError(
                f"memory_replay: cell must return pytrees, got tensors inside {type(hiding[0]).__name__}; "
                f"make it known with torch.utils._pytree.register_pytree_node"
            )
        made = result.tensors()
        originals = {leaf: p for p, leaf in s.modules.stand_ins.items()}
        found = leaves_of(made, [*given, *self._leaves()], mark)
        self.parameters += [originals.get(leaf, leaf) for leaf in found]
        return result, made, size

    def _run_and_measure(self, arguments: Tree) -> tuple[Tree, int]:
        """The result, and where the keeper asks the bytes of its graph: as many as the last of tensors like these."""
        if not self.keeper.counts:
            return self.run_only(arguments), 0
        given = arguments.tensors()
        form = [len(self.parameters), *((t.shape, t.dtype, t.requires_grad) for t in given)]  # known ones do not count
        if self._measured is not None and self._measured[0] == form:
            return self.run_only(arguments), self._measured[1]
        with counting([*given, *self.parameters, *self.surroundings.modules.parameters]) as count:
            result = self.run_only(arguments)
        self._measured = form, count.bytes
        return result, count.bytes

    def _leaves(self) -> list[Tensor]:
        """What graphs end in now, for each of the parameters."""
        return [self.surroundings.modules.stand_ins.get(p, p) for p in self.parameters]

    def _back_propagate(self, given: list[Tensor], made: list[Tensor], arriving: Grads, totals: Totals) -> Grads:
        roots = [(m, g) for m, g in zip(made, arriving, strict=True) if g is not None]
        wanted = [x for x in given if x.requires_grad]
        leaves = self._leaves()
        with totals.taking(self.parameters, leaves):
            grads = torch.autograd.grad(
                [m for m, _ in roots], [*wanted, *leaves], [g for _, g in roots], allow_unused=True
            )
        grad_of = {id(x): g for x, g in zip(wanted, grads, strict=False)}
        return [grad_of.get(id(x)) for x in given]

    def _again(self, record: Record, arguments: Tree) -> list[Tensor]:
        """The tensors of a call's result again, now with their graph."""
        s, label = self.surroundings, record.label
        s.random.set(record.random)
        with s.modules.swapped(record.modules), torch.enable_grad():
            mark = graph_mark()
            made = self.run_only(arguments).tensors()
        if [m.requires_grad for m in made] != record.needs_grad:
            raise RuntimeError(f"memory_replay: {label} made other outputs when it was replayed")
        if record.result is not None and not all(map(same_bits, record.result, made)):
            raise RuntimeError(
                f"memory_replay: {label} gave another result when it was replayed (strict=True); the cell draws on "
                f"randomness or a state that is not replayed: hand generators over in random_sources"
            )
        if unknown := leaves_of(made, [*arguments.tensors(), *self._leaves()], mark):
            raise RuntimeError(
                f"memory_replay: {label} used a parameter of shape {list(unknown[0].shape)} when it was replayed "
                f"that the forward did not"
            )
        return made


def python_parts(
    cell: Callable,
    surroundings: Surroundings,
    budget: int | None,
    *,
    strict: bool = False,
    count: bool = False,
    sizes: Mapping[str, int] | None = None,
) -> Parts:
    """The parts of a cell; with `sizes` their `bytes_each`, which are measured otherwise, where there is a budget, a
    staged cell, or with `count`."""
    keeper = Keeper(budget, count=count or isinstance(cell, StagedCell))
    parts = {n: PythonPart(f, surroundings, keeper, strict=strict) for n, f in functions_of(cell).items()}
    for name, size in (sizes or {}).items():
        parts[name].expected_bytes = size
    return Parts(**parts)
