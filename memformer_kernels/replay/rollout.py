"""Memory-replay back-propagation, exactly, as one autograd node.

    forward    m_0 given; for t = 0 .. S-1:  o_t, m_{t+1} = cell(x_t, m_t); keep m_0 .. m_{S-1}
    backward   g = dLoss/dm_S; for t = S-1 .. 0:  run cell(x_t, m_t) again; back-propagate dLoss/do_t and g through it;
               add up the parameters' gradients; g = dLoss/dm_t

A rollout is a list of calls of the cell's parts: of the cell itself, one a segment, or of the three parts of a
`StagedCell`. The backward goes through the calls from the last to the first with a table of the values' gradients.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from memformer_kernels.replay.budget import LARGE_GRAPH
from memformer_kernels.replay.lanes import Lanes
from memformer_kernels.replay.surroundings import Surroundings, versions_of
from memformer_kernels.replay.tape import Call, Grads, NoTape, Part, Parts, Tape
from memformer_kernels.replay.totals import Totals, gradients
from memformer_kernels.replay.tree import Tree, as_leaf


def run_parts(
    tape: Tape | NoTape,
    parts: Parts,
    segments: Sequence[Any],
    state: Any,
    *,
    budget: int | None,
    lanes: Lanes | None = None,
    **at_once: float,
) -> tuple[list[Any], Any]:
    """The rollout itself: `advance` from segment to segment, `prepare` and `readout` of many segments at once, the
    latter aside where there are lanes."""
    lanes = lanes or Lanes()
    inputs, features, outputs = list(segments) if parts.prepare is None else [], [], []

    def read_out() -> None:
        """As many segments as are there, in the groups that all of them make."""
        while (t := len(outputs)) < len(segments):
            size = parts.readout.group(len(segments) - t, parts.allowed(budget))
            if t + size > len(features):
                return
            with lanes.aside(features[t:]):
                outputs.extend(_run_group(tape, parts.readout, "readout", [features, segments], t, size, **at_once))
            features[: len(outputs)] = [None] * len(outputs)

    for t in range(len(segments)):
        if t == len(inputs):
            size = parts.prepare.group(len(segments) - t, parts.allowed(budget))
            inputs += _run_group(tape, parts.prepare, "prepare", [segments], t, size)
        result = tape.call(parts.advance, f"segment {t}", len(segments) - 1 - t, inputs[t], state)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(f"memory_replay: cell must return (output, next_state), got {type(result).__name__}")
        features.append(result[0])
        state = result[1]
        lanes.done(0)
        if lanes.many and parts.readout is not None:
            read_out()
    if parts.readout is None:
        return features, state
    read_out()
    lanes.join()
    return outputs, state


def _run_group(
    tape: Tape | NoTape, part: Part, name: str, lists: list[Sequence[Any]], t: int, size: int, **at_once: float
) -> list[Any]:
    """A part that takes lists, over so many segments from t on."""
    label, left = f"{name} of segments {t} to {t + size - 1}", len(lists[-1]) - t - size
    result = tape.call(part, label, left, *(list(one[t : t + size]) for one in lists), **at_once)
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
    """The two passes of one rollout with gradients. With `weight`, the outputs' sum times it is in their place.

    lanes: of the pass that runs. Where there are many, calls are run again ahead of their turn in the backward; without
        a budget those of `prepare`, and in a forward with `weight` those of `readout`, run aside.
    once: whether no backward runs twice on the values of one forward, so that it may modify sums among them.
    """

    parts: Parts
    surroundings: Surroundings
    budget: int | None
    weight: float | None
    lanes: Lanes = field(default_factory=Lanes)
    once: bool = False
    places: list[tuple[int, str, int]] = field(default_factory=list)  # of the parameters, after the forward

    def forward(self, given: Tree, versions: dict[Tensor, int]) -> Tree:
        """Of `(segments, state)`: outputs and last state, without a graph. `versions` are the parameters'."""
        self.tape = tape = Tape(versions)
        admitted = tape.admit(given)
        tape.given = len(tape.values)
        at_once = {} if self.weight is None else {"weight": self.weight}
        lanes = self.lanes if self.weight is not None and self._runs_aside() else None  # for the readout
        outputs, final = run_parts(tape, self.parts, *admitted.whole(), budget=self.budget, lanes=lanes, **at_once)
        if self.weight is not None:
            outputs = tape.make_loss(weighed_sum(outputs, self.weight))
        result = Tree.of((outputs, final))
        self.reads, self.makes = tape.numbers(admitted), tape.numbers(result)
        tape.close(own_sums=self.once)
        return result

    def backward(self, values: list[Tensor | None], grads: Iterable[Tensor | None]) -> tuple[Grads, list[Totals]]:
        """From gradients of the result's tensors: those of the given tensors, and sums of the parameters'. `values` are
        the tape's."""
        table = _Table(zip(self.makes, grads, strict=True))
        early = self._scale_early(values, table)
        totals: dict[int, Totals] = defaultdict(Totals)  # of each part, which nobody sees before the end
        self._go_back(values, table, totals)
        return [table.take(n) for n in self.reads], [*totals.values(), early]

    def _scale_early(self, values: list[Tensor | None], table: "_Table") -> Totals:
        """The gradients that the forward made, times that of the loss: to the table, and the parameters' sums. Each
        leaves `values` as it is scaled, so that all of them never stand there twice."""
        tape, of_loss = self.tape, None if self.tape.loss is None else table.take(self.tape.loss)
        if of_loss is None:
            return Totals()

        def scaled(number: int, *, where_it_lies: bool = False) -> Tensor:
            grad, values[number] = values[number], None
            if grad.dtype == torch.float16:  # which a gradient scaler's factor may not fit
                return (grad.float() * of_loss).to(grad.dtype)
            factor = of_loss.to(grad.dtype)
            return grad.mul_(factor) if where_it_lies else grad * factor

        for call in reversed(tape.calls):
            if call.early is not None:
                found = [None if n is None else scaled(n) for n in call.early]
                table.add(zip(call.reads, found, strict=True))
        return Totals({p: scaled(n, where_it_lies=self.once) for p, n in tape.early_sums.items()})

    def _go_back(self, values: list[Tensor | None], table: "_Table", totals: dict[int, Totals]) -> None:
        """Calls last to first."""
        lanes, lane_of = self.lanes, {}
        lanes.done(0)
        calls = [call for call in reversed(self.tape.calls) if call.early is None]
        aside = self._runs_aside()
        chain = [call for call in calls if call.part is self.parts.advance] if aside else calls
        following = dict(zip(map(id, chain), chain[1:], strict=False)) if self._runs_ahead() else {}

        def pull(call: Call, grads: Grads) -> None:
            found = call.part.pull(call.record, call.arguments_of(values), grads, totals[id(call.part)])
            table.add(zip(call.reads, found, strict=True))

        for call in calls:
            grads = [table.take(n) for n in call.makes]
            if all(g is None for g in grads):
                continue
            if aside and call.part is self.parts.prepare:
                with lanes.aside((grads, table.of(call.reads))):
                    pull(call, grads)
                continue
            lane = lane_of.pop(id(call), 0)
            after = following.get(id(call))
            if after is not None and after.part is self.parts.advance:
                with lanes.on(1 - lane):
                    if after.part.run_ahead(after.record, after.arguments_of(values)):
                        lane_of[id(after)] = 1 - lane
            with lanes.on(lane):
                pull(call, grads)
                del grads
            lanes.done(lane)
        lanes.join()

    def _runs_aside(self) -> bool:
        """Whether other parts run beside `advance`: the budget counts one graph at a time."""
        return self.budget is None and self._leaves_room()

    def _runs_ahead(self) -> bool:
        """Whether the next segment runs again beside the backward of this one: two graphs of `advance` at a time."""
        return self._leaves_room() and (self.budget is None or 2 * self._sizes()["advance"] <= self.budget)

    def _leaves_room(self) -> bool:
        """Whether there are lanes, and segments leave room on the GPU: they are not large, nor is their readout."""
        sizes = self._sizes()
        return self.lanes.many and sizes["advance"] <= LARGE_GRAPH and 2 * sizes["advance"] >= sum(sizes.values())

    def _sizes(self) -> dict[str, int]:
        return {name: size or 0 for name, size in self.parts.sizes().items()}


def differentiable(passes: Passes, versions: dict[Tensor, int], given: Tree) -> tuple[Any, Any]:
    """A rollout of `(segments, state)` as one node of the autograd graph: outputs and last state."""
    with passes.surroundings.kept_if_raises():
        result = passes.forward(given, versions)
    passes.places = passes.surroundings.modules.parameter_places()
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
        frozen = [p for p in versions if not p.requires_grad]
        for parameter, version in zip(frozen, versions_of(frozen), strict=True):
            if version != versions[parameter]:
                raise RuntimeError(f"{rule}, got a modified parameter of shape {list(parameter.shape)}")
        if passes.surroundings.modules.parameter_places() != passes.places:
            raise RuntimeError(f"{rule}, got a parameter in the place of another")
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

    def of(self, numbers: Iterable[int]) -> list[Tensor | None]:
        return [self._grads.get(number) for number in numbers]

    def take(self, number: int) -> Tensor | None:
        return self._grads.pop(number, None)
