"""Memory-replay back-propagation, exactly, as one autograd node.

    forward    m_0 given; for t = 0 .. S-1:  o_t, m_{t+1} = cell(x_t, m_t), without a graph; keep m_0 .. m_{S-1}
    backward   g = dLoss/dm_S; for t = S-1 .. 0:  run cell(x_t, m_t) again, with a graph;
               back-propagate dLoss/do_t and g through it; add up the parameters' gradients; g = dLoss/dm_t

The first segment of the forward does have a graph for a moment: it is walked to find the leaves that need a gradient,
and thrown away. So the caller declares no parameters, and a tensor that cannot be replayed is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from memformer_kernels.replay.graph import graph_mark, leaves_of
from memformer_kernels.replay.surroundings import Autocast, Buffers, RandomState, hooks_of, modules_of, same_bits
from memformer_kernels.replay.tree import Tree, differentiable, never, requires_grad


@dataclass
class Segment:
    """What is kept of one segment between the passes."""

    segment: Tree
    state: Tree
    random: tuple
    buffers: list[Tensor]
    result: tuple[Tree, Tree] | None = None  # kept when strict


@dataclass
class Rollout:
    """One call: the cell, its surroundings, and what the forward keeps for the backward."""

    cell: Callable
    random: RandomState
    autocast: Autocast
    buffers: Buffers
    parameters: list[Tensor]
    strict: bool
    segments: list[Segment] = field(default_factory=list)
    outputs: list[Tree] = field(default_factory=list)
    final: Tree | None = None
    differentiable_outputs: list[bool] = field(default_factory=list)

    def run(self, segment: Tree, state: Tree) -> tuple[Tree, Tree]:
        with self.autocast.again():
            result = self.cell(segment.whole(), state.whole())
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(f"memory_replay: cell must return (output, next_state), got {type(result).__name__}")
        return Tree.of(result[0]), Tree.of(result[1])

    def forward(self, segments: list[Tree], state: Tree, keep: bool) -> None:
        """Fills `outputs` and `final`, and with `keep` what the backward needs. All or nothing."""
        random, buffers, originals = self.random.get(), self.buffers.record(), self.buffers.originals()
        try:
            for t, segment in enumerate(segments):
                state = self._forward_segment(t, segment, state, keep)
        except BaseException:
            self.random.set(random)
            self.buffers.restore(buffers, originals)
            raise
        self.final = state

    def _forward_segment(self, t: int, segment: Tree, state: Tree, keep: bool) -> Tree:
        kept = Segment(segment.detached(requires_grad), state.detached(never), self.random.get(), self.buffers.record())
        versions = [s._version for s in kept.state.tensors()]
        find_leaves = keep and t == 0
        with torch.set_grad_enabled(find_leaves):
            mark = graph_mark()
            given = kept.state.detached(differentiable) if find_leaves else kept.state
            output, next_state = self.run(kept.segment, given)
        if find_leaves:
            self._find_leaves(output, next_state, [*kept.segment.tensors(), *given.tensors()], mark)
        if keep and [s._version for s in kept.state.tensors()] != versions:
            raise RuntimeError(f"memory_replay: cell must not modify its state in place, got a change in segment {t}")
        output, next_state = output.detached(never), next_state.detached(never)
        self.outputs.append(output)
        if keep:
            kept.result = (output, next_state) if self.strict else None
            self.segments.append(kept)
        return next_state

    def _find_leaves(self, output: Tree, next_state: Tree, given: list[Tensor], mark: int) -> None:
        made = [*output.tensors(), *next_state.tensors()]
        self.parameters += leaves_of(made, [*given, *self.parameters], mark)
        self.differentiable_outputs = [o.requires_grad for o in output.tensors()]

    def output_is_differentiable(self, t: int) -> list[bool]:
        """For each tensor of output t. Segment 0 was seen with a graph; others are alike if they look alike."""
        tensors = self.outputs[t].tensors()
        if len(tensors) == len(self.differentiable_outputs):
            return self.differentiable_outputs
        return [differentiable(o) for o in tensors]


def replay(cell: Callable, segments: list, state: Any, *, strict: bool, random_sources: tuple) -> tuple[list, Any]:
    """See `memory_replay`."""
    if not segments:
        return [], state
    keep = torch.is_grad_enabled()
    segment_trees, state_tree = [Tree.of(s) for s in segments], Tree.of(state)
    inputs = [t for tree in (*segment_trees, state_tree) for t in tree.tensors()]
    modules = modules_of(cell)
    parameters = list({id(p): p for m in modules for p in m.parameters() if p.requires_grad}.values())
    devices = sorted({t.device for t in (*inputs, *parameters)}, key=str)
    rollout = Rollout(
        cell, RandomState(devices, random_sources), Autocast.now(devices), Buffers(modules), parameters, strict
    )
    rollout.forward(segment_trees, state_tree, keep)
    outputs, final = rollout.outputs, rollout.final
    if keep:
        made = iter(_Replay.apply(rollout, *inputs, *rollout.parameters))
        outputs = [o.replace([next(made) for _ in o.tensors()]) for o in outputs]
        final = final.replace(list(made))
    return [o.whole() for o in outputs], final.whole()


class _Replay(torch.autograd.Function):
    """The node of one rollout. Inputs: tensors of the segments, of the state, parameters; outputs: all outputs, the state."""

    @staticmethod
    def forward(ctx, rollout: Rollout, *inputs: Tensor):
        ctx.set_materialize_grads(False)
        made = [t for tree in (*rollout.outputs, rollout.final) for t in tree.tensors()]
        needs = [n for t in range(len(rollout.outputs)) for n in rollout.output_is_differentiable(t)]
        needs += [differentiable(s) for s in rollout.final.tensors()]
        made = [t.detach() for t in made]
        ctx.mark_non_differentiable(*(t for t, n in zip(made, needs, strict=True) if not n))
        # through save_for_backward, so that PyTorch frees these after the backward and notices edits before it
        saved = [t for s in rollout.segments for tree in (s.segment, s.state) for t in tree.tensors()]
        ctx.save_for_backward(*saved, *rollout.parameters)
        for s in rollout.segments:
            s.segment, s.state = s.segment.hollow(), s.state.hollow()
        ctx.rollout = rollout
        ctx.output_sizes = [len(o.tensors()) for o in rollout.outputs]
        ctx.output_differentiable = [rollout.output_is_differentiable(t) for t in range(len(rollout.outputs))]
        rollout.outputs, rollout.final, rollout.parameters = [], None, []
        return tuple(made)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                'memory_replay: a replayed rollout has no second derivative (create_graph=True); method="bptt" has'
            )
        try:
            saved = iter(ctx.saved_tensors)
        except RuntimeError as error:
            raise RuntimeError(
                f"memory_replay: parameters, segments and state must not change between forward and backward, "
                f"and backward runs once unless retain_graph=True: {error}"
            ) from error
        trees = []
        for s in ctx.rollout.segments:
            trees.append(tuple(tree.replace([next(saved) for _ in tree.tensors()]) for tree in (s.segment, s.state)))
        return None, *_Backward(ctx, trees, list(saved)).run(iter(grads))


class _Backward:
    """One run of the backward: segments last to first, into accumulators that nobody sees before the end."""

    def __init__(self, ctx, trees: list[tuple[Tree, Tree]], parameters: list[Tensor]):
        self.rollout: Rollout = ctx.rollout
        self.output_sizes, self.output_differentiable = ctx.output_sizes, ctx.output_differentiable
        self.trees, self.parameters = trees, parameters
        self.totals: list[_Total] = [_Total() for _ in parameters]
        self.segment_grads: list[list[Tensor | None]] = [[] for _ in trees]

    def run(self, grads) -> list[Tensor | None]:
        rollout = self.rollout
        output_grads = [[next(grads) for _ in range(size)] for size in self.output_sizes]
        carried = [_carry(g) for g in grads]
        random = rollout.random.get()
        try:
            with hooks_of(self.parameters):
                for t in reversed(range(len(self.trees))):
                    carried = self._segment(t, output_grads[t], carried)
        finally:
            rollout.random.set(random)
        state_grads = [_as(g, s) for g, s in zip(carried, self.trees[0][1].tensors(), strict=True)]
        parameter_grads = [_as(total.value, p) for total, p in zip(self.totals, self.parameters, strict=True)]
        return [*(g for grads in self.segment_grads for g in grads), *state_grads, *parameter_grads]

    def _segment(self, t: int, output_grads: list[Tensor | None], carried: list[Tensor | None]) -> list[Tensor | None]:
        """Replays segment t and back-propagates through it; returns the gradient of its state."""
        segment, state = self.trees[t]
        if all(g is None for g in (*output_grads, *carried)):
            self.segment_grads[t] = [None] * len(segment.tensors())
            return [None] * len(state.tensors())
        state = state.detached(differentiable)
        wanted = [x for x in (*segment.tensors(), *state.tensors()) if x.requires_grad]
        output, next_state = self._replay(t, segment, state, [*wanted, *self.parameters])

        made = [*output.tensors(), *next_state.tensors()]
        roots = [(m, g) for m, g in zip(made, (*output_grads, *carried), strict=True) if g is not None and m.requires_grad]
        grads = [None] * (len(wanted) + len(self.parameters))
        if roots:
            tensors, root_grads = zip(*((m, g.to(m.dtype)) for m, g in roots), strict=True)
            grads = torch.autograd.grad(tensors, [*wanted, *self.parameters], root_grads, allow_unused=True)
        for total, grad in zip(self.totals, grads[len(wanted) :], strict=True):
            total.add(grad)
        grad_of = {id(x): g for x, g in zip(wanted, grads, strict=False)}
        self.segment_grads[t] = [grad_of.get(id(x)) for x in segment.tensors()]
        return [_carry(grad_of.get(id(s))) for s in state.tensors()]

    def _replay(self, t: int, segment: Tree, state: Tree, known: list[Tensor]) -> tuple[Tree, Tree]:
        rollout, kept = self.rollout, self.rollout.segments[t]
        rollout.random.set(kept.random)
        with rollout.buffers.swapped(kept.buffers), torch.enable_grad():
            mark = graph_mark()
            output, next_state = rollout.run(segment, state)
        if kept.result is not None:
            _check_same(t, kept.result, (output, next_state))
        if len(output.tensors()) != self.output_sizes[t]:
            raise RuntimeError(f"memory_replay: segment {t} made other outputs when it was replayed")
        if any(o.requires_grad and not d for o, d in zip(output.tensors(), self.output_differentiable[t], strict=True)):
            raise RuntimeError(f"memory_replay: an output of segment {t} needs a gradient, that of segment 0 did not")
        if unknown := leaves_of((*output.tensors(), *next_state.tensors()), known, mark):
            raise RuntimeError(
                f"memory_replay: segment {t} uses a parameter of shape {list(unknown[0].shape)} that segment 0 did not, "
                f"and that is in no module of the cell; use it in every segment, or make it part of a module"
            )
        return output, next_state


class _Total:
    """A sum of gradients: in float32 at least, in the order they come, owning its tensor from the second on."""

    def __init__(self):
        self.value: Tensor | None = None
        self._owned = False

    def add(self, grad: Tensor | None) -> None:
        if grad is None:
            return
        grad = _carry(grad)
        if self.value is None:
            self.value = grad
        elif self._owned:
            self.value += grad
        else:
            self.value, self._owned = self.value + grad, True


def _carry(grad: Tensor | None) -> Tensor | None:
    return grad.float() if grad is not None and grad.dtype in (torch.float16, torch.bfloat16) else grad


def _as(grad: Tensor | None, like: Tensor) -> Tensor | None:
    return grad if grad is None else grad.to(like.dtype)


def _check_same(t: int, forward: tuple[Tree, Tree], replayed: tuple[Tree, Tree]) -> None:
    for name, first, again in zip(("output", "next state"), forward, replayed, strict=True):
        pairs = list(zip(first.tensors(), again.tensors(), strict=False))
        if len(first.tensors()) != len(again.tensors()) or not all(same_bits(a, b) for a, b in pairs):
            raise RuntimeError(
                f"memory_replay: the {name} of segment {t} differs when it is replayed (strict=True); the cell draws on "
                f"randomness or a state that is not replayed: hand generators over in random_sources"
            )
