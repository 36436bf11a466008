"""What a rollout will keep: `explain("memory_replay", ...)`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from memformer_kernels.replay.budget import Keeper, budget_in_bytes, check_budget, groups_of
from memformer_kernels.replay.captured import CapturedCell
from memformer_kernels.replay.python_part import PythonPart
from memformer_kernels.replay.rollout import Passes
from memformer_kernels.replay.stages import functions_of
from memformer_kernels.replay.surroundings import Surroundings, modules_of
from memformer_kernels.replay.tape import Parts
from memformer_kernels.replay.tree import Tree

MIB = 2**20


@dataclass(frozen=True)
class Estimate:
    """Bytes and counts of one rollout, told by its first segment; printed, a few lines.

    Attributes:
        segments, budget: of the rollout; the budget in bytes, or None.
        graph: of each part, what autograd keeps of one segment.
        state, inputs, features: of one state, and of what `prepare` and `advance` hand on for one segment.
        sums: of the parameters' gradients while they are added up.
        kept: how many of the last segments keep their graph; the others are replayed.
        groups: how many segments `prepare` and `readout` take at once, at most.
    """

    segments: int
    budget: int | None
    graph: dict[str, int]
    state: int
    inputs: int
    features: int
    sums: int
    kept: int
    groups: dict[str, int]

    @property
    def stored(self) -> int:
        """What stands between the passes whatever the budget."""
        return self.segments * (self.state + self.inputs + self.features)

    @property
    def of_back_propagation(self) -> int:
        """All graphs: the budget from which on nothing is replayed."""
        return self.segments * sum(self.graph.values())

    def __str__(self) -> str:
        each = ", ".join(f"{name} {size / MIB:.1f}" for name, size in self.graph.items())
        budget = "by default" if self.budget is None else f"within {self.budget / MIB:.1f} MiB"
        groups = ", ".join(f"{name} up to {size}" for name, size in self.groups.items()) or "none"
        return "\n".join(
            (
                f"memory_replay of {self.segments} segments, MiB",
                f"  stored between the passes  {self.stored / MIB:.1f}: of a segment its state {self.state / MIB:.1f}, "
                f"input {self.inputs / MIB:.1f}, features {self.features / MIB:.1f}",
                f"  graph of one segment       {sum(self.graph.values()) / MIB:.1f}: {each}",
                f"  {budget:<26} the last {self.kept} keep their graph, {self.segments - self.kept} are replayed",
                f"  full back-propagation      {self.of_back_propagation / MIB:.1f}",
                f"  segments at once           {groups}",
                f"  sums of gradients          {self.sums / MIB:.1f}",
            )
        )


def estimate(
    cell: Callable, segments: Sequence[Any], state: Any, *, activation_budget: int | float | None = None
) -> Estimate:
    """Runs the first segment once, with its graph; nothing of it stays. Arguments as `memory_replay` has them."""
    cell = cell.cell if isinstance(cell, CapturedCell) else cell
    if not segments:
        raise ValueError("explain: segments must hold at least one segment, got none")
    check_budget("explain", activation_budget)
    given = Tree.of(([segments[0]], state))
    surroundings = Surroundings.of(modules_of(cell), given.tensors())
    modules, budget = surroundings.modules, budget_in_bytes(activation_budget, surroundings.devices)
    keeper = Keeper(None, count=True)
    parts = Parts(**{name: PythonPart(f, surroundings, keeper) for name, f in functions_of(cell).items()})
    passes = Passes(parts, surroundings, None, None)
    with surroundings.random.kept(), modules.swapped(modules.record()), torch.enable_grad():
        passes.forward(given, {})
    (advance,) = (call for call in passes.tape.calls if call.part is parts.advance)
    values = passes.tape.values
    before, after = (sum(_bytes(values[n]) for n in numbers) for numbers in (advance.reads, advance.makes))
    carried = sum(map(_bytes, Tree.of(state).tensors()))
    graph = {name: size for name, size in parts.sizes().items() if size is not None}
    allowed = parts.allowed(budget)
    return Estimate(
        segments=len(segments),
        budget=budget,
        graph=graph,
        state=carried,
        inputs=max(before - carried, 0) if parts.prepare is not None else 0,
        features=after,
        sums=sum(p.numel() * max(p.element_size(), 4) for p in passes.tape.parameters),
        kept=1 if budget is None else min(len(segments), budget // max(graph["advance"], 1)),
        groups={n: groups_of(len(segments), graph[n], allowed) for n in ("prepare", "readout") if n in graph},
    )


def _bytes(value: torch.Tensor | None) -> int:
    return 0 if value is None else value.numel() * value.element_size()
