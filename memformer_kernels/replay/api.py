"""`memory_replay`: a rollout of a cell over segments, by one of three methods with the same gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from memformer_kernels import checks
from memformer_kernels.replay.rollout import replay

OP = "memory_replay"
METHODS = ("replay", "checkpoint", "bptt")


@torch.compiler.disable
def memory_replay(
    cell: Callable[[Any, Any], tuple[Any, Any]],
    segments: Sequence[Any],
    state: Any,
    *,
    method: str = "replay",
    strict: bool = False,
    random_sources: Sequence[Any] = (),
) -> tuple[list[Any], Any]:
    """Runs `output, state = cell(segment, state)` over the segments; gradients equal full back-propagation.

        outputs, state = [], state
        for segment in segments:
            output, state = cell(segment, state)
            outputs.append(output)

    Args:
        cell: a module, a bound method or a function; called with one segment and the state. Every tensor that needs
            a gradient must be a leaf (a parameter), or come in through the segments or the state; what it returns is
            all that a loss may be made of. A gradient that the cell itself takes ends at the segment.
        segments: a sequence of pytrees. The engine does not look into them except for tensors that need a gradient.
        state: a pytree; its floating-point tensors carry gradients from segment to segment.
        method: how the backward gets what it needs.
            "replay": memory-replay back-propagation. The forward keeps the state before each segment and nothing
                else; the backward runs each segment again, last to first. Memory: S states and one segment. Without
                grad mode the segments are run as they are.
            "checkpoint": `torch.utils.checkpoint` of each segment.
            "bptt": everything is kept. Memory: S segments.
        strict: replay also compares the output and next state of every replayed segment with those of the forward,
            bit for bit, and raises where they differ: the cell then draws on a source of randomness or a state that
            the engine does not know.
        random_sources: generators besides PyTorch's default ones that the cell draws from: `torch.Generator`,
            `random.Random` or the module `random`, `numpy.random.Generator`, `RandomState` or the module
            `numpy.random`. Replay puts them back to where each segment began, and afterwards to where they stood.

    Returns:
        `(outputs, state)`: one output per segment, and the state after the last.

    What replay keeps: PyTorch's CPU and CUDA random state (dropout masks are the same bits), autocast, buffers
    (updated once) and the train or eval mode of the modules that the cell is or refers to, gradients of a subset of
    parameters, parameter hooks: called once, with None where the loss does not reach a parameter in use. The rollout is
    one node of the autograd graph: DistributedDataParallel, GradScaler, gradient accumulation need no special code. An
    exception in any segment, forward or backward, leaves `.grad`, buffers, random state and the given state as they
    were. Hooks of modules inside the cell run in both passes.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.
        RuntimeError: a parameter, segment or state was modified in place between the passes, or by the cell; the cell
            uses a tensor with a graph from outside it; with `strict`, a segment did not replay bit for bit.
        NotImplementedError: a second derivative was asked for; "bptt" has one.

    Source: Wu et al., Memformer, arXiv 2010.06891v2, algorithm 1.
    """
    if not callable(cell):
        checks.fail(OP, "cell", "be callable as cell(segment, state)", type(cell).__name__, TypeError)
    for argument, given in (("segments", segments), ("random_sources", random_sources)):
        if not isinstance(given, Sequence):
            checks.fail(OP, argument, "be a sequence, such as a list or a tuple", type(given).__name__, TypeError)
    if method not in METHODS:
        checks.fail(OP, "method", f"be one of {', '.join(METHODS)}", repr(method))
    if method == "replay":
        return replay(cell, list(segments), state, strict=strict, random_sources=tuple(random_sources))
    for option, given in (("strict", strict), ("random_sources", random_sources)):
        if given:
            checks.fail(OP, option, 'be left out unless method="replay"', repr(given))
    outputs = []
    for segment in segments:
        if method == "checkpoint":
            output, state = checkpoint(cell, segment, state, use_reentrant=False)
        else:
            output, state = cell(segment, state)
        outputs.append(output)
    return outputs, state
