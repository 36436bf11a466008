"""Memory-replay back-propagation, exactly, as one autograd node.

    forward    m_0 given; for t = 0 .. S-1:  o_t, m_{t+1} = cell(x_t, m_t); keep m_0 .. m_{S-1}
    backward   g = dLoss/dm_S; for t = S-1 .. 0:  run cell(x_t, m_t) again; back-propagate dLoss/do_t and g through it;
               add up the parameters' gradients; g = dLoss/dm_t

Each segment of the forward has a graph for a moment, as each of the backward has: it is walked to find the leaves that
need a gradient, and thrown away. So the caller declares no parameters; a tensor that cannot be replayed is refused; the
node's inputs are the leaves in use and no others, as full back-propagation would have it; and both passes run the same
kernels, where PyTorch has others for a forward without a graph.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from memformer_kernels.replay.graph import graph_mark, leaves_of
from memformer_kernels.replay.surroundings import (
    Autocast,
    ModuleState,
    RandomState,
    hooks_replaced,
    modules_of,
    same_bits,
    versions_of,
)
from memformer_kernels.replay.tree import Tree


@dataclass
class Segment:
    """What is kept of one segment between the passes."""

    segment: Tree
    state: Tree
    random: tuple
    modules: tuple[list[Tensor], list[bool]]
    outputs: int = 0  # tensors in its output; in `needs_grad` and `result` those of the next state follow
    needs_grad: list[bool] = field(default_factory=list)
    result: list[Tensor] | None = None  # when strict


@dataclass
class Rollout:
    """One call: the cell, its surroundings, and what the forward keeps for the backward."""

    cell: Callable
    random: RandomState
    autocast: Autocast
    modules: ModuleState
    strict: bool
    versions: dict[Tensor, int]  # of the parameters before the forward
    parameters: list[Tensor] = field(default_factory=list)  # those in use
    segments: list[Segment] = field(default_factory=list)

    def run(self, segment: Tree, state: Tree) -> tuple[Tree, Tree]:
        with self.autocast.again():
            result = self.cell(segment.whole(), state.whole())
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(f"memory_replay: cell must return (output, next_state), got {type(result).__name__}")
        return Tree.of(result[0]), Tree.of(result[1])

    def forward(self, segments: list[Tree], state: Tree, step: Callable) -> tuple[list[Tree], Tree]:
        """Outputs and final state, by `step(segment, state)`. All or nothing."""
        outputs = []
        with self.random.kept_if_raises(), self.modules.kept_if_raises():
            for segment in segments:
                output, state = step(segment, state)
                outputs.append(output)
        return outputs, state

    def run_and_keep(self, segment: Tree, state: Tree) -> tuple[Tree, Tree]:
        """The next segment; keeps what the backward needs, and lets go of its graph."""
        t, kept = len(self.segments), Segment(segment.cut(), state.cut(), self.random.get(), self.modules.record())
        given = [*kept.segment.tensors(), *kept.state.tensors()]
        versions, mark = versions_of(given), graph_mark()
        output, next_state = self.run(kept.segment, kept.state)
        if versions_of(given) != versions:
            raise RuntimeError(
                f"memory_replay: cell must not modify its segment or its state in place, got a change in segment {t}"
            )
        if hiding := [*output.hides_graph(), *next_state.hides_graph()]:
            raise TypeError(
                f"memory_replay: cell must return pytrees, got tensors inside {type(hiding[0]).__name__}; "
                f"make it known with torch.utils._pytree.register_pytree_node"
            )
        made = [*output.tensors(), *next_state.tensors()]
        for leaf in leaves_of(made, [*given, *self.parameters], mark):
            self.parameters.append(leaf)
            self.versions.setdefault(leaf, leaf._version)
        kept.outputs, kept.needs_grad = len(output.tensors()), [m.requires_grad for m in made]
        # copies, as the caller may modify what is returned
        kept.result = [m.detach().clone() for m in made] if self.strict else None
        self.segments.append(kept)
        return output.cut(), next_state.cut()


def replay(cell: Callable, segments: list, state: Any, *, strict: bool, random_sources: tuple) -> tuple[list, Any]:
    """See `memory_replay`."""
    if not segments:
        return [], state
    trees, state_tree = [Tree.of(s) for s in segments], Tree.of(state)
    inputs = [t for tree in (*trees, state_tree) for t in tree.tensors()]
    modules = modules_of(cell)
    parameters = [p for m in modules for p in m.parameters() if not is_lazy(p)]
    devices = sorted({t.device for t in (*inputs, *parameters)}, key=str)
    rollout = Rollout(
        cell,
        RandomState(devices, random_sources),
        Autocast.now(devices),
        ModuleState(modules),
        strict,
        dict(zip(parameters, versions_of(parameters), strict=True)),
    )
    if not torch.is_grad_enabled():
        outputs, final = rollout.forward(trees, state_tree, rollout.run)
    else:
        outputs, final = rollout.forward(trees, state_tree, rollout.run_and_keep)
        made = [t for tree in (*outputs, final) for t in tree.tensors()]
        made = iter(_Replay.apply(rollout, made, *inputs, *rollout.parameters))
        *outputs, final = [tree.replace([next(made) for _ in tree.tensors()]) for tree in (*outputs, final)]
    return [o.whole() for o in outputs], final.whole()


class _Replay(torch.autograd.Function):
    """The node of one rollout. Inputs: tensors of the segments, of the state, parameters; outputs: `made`."""

    @staticmethod
    def forward(ctx, rollout: Rollout, made: list[Tensor], *inputs: Tensor):
        ctx.set_materialize_grads(False)
        returned = [m.detach() for m in made]
        ctx.mark_non_differentiable(*(r for r, m in zip(returned, made, strict=True) if not m.requires_grad))
        # through save_for_backward, so that PyTorch frees these after the backward, notices edits before it, and
        # offers them to its hooks. Not the parameters: their identity matters, and a hook may return a copy
        ctx.save_for_backward(*(t for s in rollout.segments for tree in (s.segment, s.state) for t in tree.tensors()))
        for s in rollout.segments:
            s.segment, s.state = s.segment.hollow(), s.state.hollow()
        ctx.rollout = rollout
        return tuple(returned)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        if torch.is_grad_enabled():
            raise NotImplementedError(
                'memory_replay: a replayed rollout has no second derivative (create_graph=True); method="bptt" has'
            )
        rule = "memory_replay: parameters, segments and state must not change between forward and backward"
        rollout: Rollout = ctx.rollout
        for parameter, version in zip(rollout.parameters, versions_of(rollout.parameters), strict=True):
            if version != rollout.versions[parameter] or not parameter.requires_grad:
                change = "modified" if parameter.requires_grad else "frozen"
                raise RuntimeError(f"{rule}, got a {change} parameter of shape {list(parameter.shape)}")
        try:
            saved = iter(ctx.saved_tensors)
        except RuntimeError as error:
            raise RuntimeError(f"{rule}, and backward runs once unless retain_graph=True: {error}") from error
        trees = [
            tuple(tree.filled([next(saved) for _ in tree.tensors()]) for tree in (s.segment, s.state))
            for s in rollout.segments
        ]
        return None, None, *_Backward(rollout, trees).run(iter(grads))


class _Backward:
    """One run of the backward: segments last to first, into accumulators that nobody sees before the end."""

    def __init__(self, rollout: Rollout, trees: list[tuple[Tree, Tree]]):
        self.rollout, self.trees = rollout, trees
        self.totals = [_Total() for _ in rollout.parameters]
        self.segment_grads: list[list[Tensor | None]] = [[] for _ in trees]

    def run(self, grads: Iterator[Tensor | None]) -> list[Tensor | None]:
        """Gradients of outputs and final state to those of segments, state and parameters."""
        rollout = self.rollout
        output_grads = [[next(grads) for _ in range(s.outputs)] for s in rollout.segments]
        carried = list(grads)
        with rollout.random.kept():
            for t in reversed(range(len(self.trees))):
                carried = self._segment(t, output_grads[t], carried)
        parameter_grads = [total.of_dtype(p.dtype) for total, p in zip(self.totals, rollout.parameters, strict=True)]
        return [*(g for grads in self.segment_grads for g in grads), *carried, *parameter_grads]

    def _segment(self, t: int, output_grads: list[Tensor | None], carried: list[Tensor | None]) -> list[Tensor | None]:
        """Replays segment t and back-propagates through it; returns the gradient of its state."""
        segment, state = self.trees[t]
        given = [*segment.tensors(), *state.tensors()]
        arriving = [*output_grads, *carried]
        if all(g is None for g in arriving):
            self.segment_grads[t] = [None] * len(segment.tensors())
            return [None] * len(state.tensors())
        made = self._replay(t, segment, state)
        roots = [(m, g) for m, g in zip(made, arriving, strict=True) if g is not None]
        wanted = [x for x in given if x.requires_grad]
        parameters = self.rollout.parameters
        with hooks_replaced(parameters, self.totals):  # which take the parameters' gradients
            grads = torch.autograd.grad(
                [m for m, _ in roots], [*wanted, *parameters], [g for _, g in roots], allow_unused=True
            )
        grad_of = {id(x): g for x, g in zip(wanted, grads, strict=False)}
        self.segment_grads[t] = [grad_of.get(id(x)) for x in segment.tensors()]
        return [grad_of.get(id(s)) for s in state.tensors()]

    def _replay(self, t: int, segment: Tree, state: Tree) -> list[Tensor]:
        """The tensors of segment t's output and next state again, now with their graph."""
        rollout, kept = self.rollout, self.rollout.segments[t]
        rollout.random.set(kept.random)
        with rollout.modules.swapped(kept.modules), torch.enable_grad():
            mark = graph_mark()
            output, next_state = rollout.run(segment, state)
        made = [*output.tensors(), *next_state.tensors()]
        if len(output.tensors()) != kept.outputs or [m.requires_grad for m in made] != kept.needs_grad:
            raise RuntimeError(f"memory_replay: segment {t} made other outputs when it was replayed")
        if kept.result is not None and not all(map(same_bits, kept.result, made)):
            raise RuntimeError(
                f"memory_replay: segment {t} gave another result when it was replayed (strict=True); the cell draws on "
                f"randomness or a state that is not replayed: hand generators over in random_sources"
            )
        known = [*segment.tensors(), *state.tensors(), *rollout.parameters]
        if unknown := leaves_of(made, known, mark):
            raise RuntimeError(
                f"memory_replay: segment {t} used a parameter of shape {list(unknown[0].shape)} when it was replayed "
                f"that the forward did not"
            )
        return made


class _Total:
    """A sum of gradients: in float32 at least, in the order they come, owning its tensor from the second on.

    As a hook it takes each gradient at once, so that those of one segment never stand beside the totals all together.
    """

    def __init__(self):
        self._sum: Tensor | None = None
        self._owned = False

    def __call__(self, grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        wide = grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad
        if self._sum is None:
            self._sum = wide
        elif self._owned:
            self._sum += wide
        else:
            self._sum, self._owned = self._sum + wide, True
        # what is left for the caller of autograd.grad, who drops it: nothing, in a shape that PyTorch accepts
        return grad if grad.is_sparse else grad.new_zeros(()).expand_as(grad)

    def of_dtype(self, dtype: torch.dtype) -> Tensor | None:
        return None if self._sum is None else self._sum.to(dtype)
