"""`memory_replay`: a rollout of a cell over segments, by one of three methods with the same gradients."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from memformer_kernels import checks
from memformer_kernels.compiling import never_compiled
from memformer_kernels.replay import sharded
from memformer_kernels.replay.budget import budget_in_bytes, check_budget
from memformer_kernels.replay.captured import CapturedCell, NotCapturable
from memformer_kernels.replay.python_part import python_parts
from memformer_kernels.replay.rollout import Passes, differentiable, run_parts, weighed_sum
from memformer_kernels.replay.stages import StagedCell
from memformer_kernels.replay.surroundings import Surroundings, modules_of, versions_of
from memformer_kernels.replay.tape import NoTape, Parts
from memformer_kernels.replay.tree import Tree

OP = "memory_replay"
METHODS = ("replay", "checkpoint", "bptt")
REDUCTIONS = ("none", "mean", "sum")


@never_compiled
def memory_replay(
    cell: Callable[[Any, Any], tuple[Any, Any]],
    segments: Sequence[Any],
    state: Any,
    *,
    method: str = "replay",
    reduction: str = "none",
    activation_budget: int | float | None = None,
    strict: bool = False,
    random_sources: Sequence[Any] = (),
) -> tuple[Any, Any]:
    """Runs `output, state = cell(segment, state)` over the segments; gradients equal full back-propagation.

        outputs, state = [], state
        for segment in segments:
            output, state = cell(segment, state)
            outputs.append(output)

    Args:
        cell: a module, a bound method or a function; called with one segment and the state. Every tensor that needs
            a gradient must be a leaf (a parameter), or come in through the segments or the state; what it returns is
            all that a loss may be made of. A gradient that the cell itself takes ends at the segment.
            A `StagedCell` says what of it has to run segment after segment; a `CapturedCell` runs as CUDA graphs.
        segments: a sequence of pytrees. The engine does not look into them except for tensors that need a gradient.
        state: a pytree; its floating-point tensors carry gradients from segment to segment.
        method: how the backward gets what it needs.
            "replay": memory-replay back-propagation. The forward keeps the state before each segment and nothing
                else, but for `activation_budget`; the backward runs each segment again, last to first. Memory: S
                states and one segment. Without grad mode the segments are run as they are.
            "checkpoint": `torch.utils.checkpoint` of each segment.
            "bptt": everything is kept. Memory: S segments.
        reduction: "none" returns one output a segment. "mean" or "sum": outputs are scalars, and their mean or sum is
            returned. The `readout` of a `StagedCell` is then run once instead of twice: its gradient is made in the
            forward, and scaled in the backward by what arrives there: but for float16, of tensors or autocast round
            the rollout, where that would come too late for a gradient scaler. Have such autocast round the rollout, not
            inside the cell.
        activation_budget: bytes of graphs that replay may keep (a float: that part of the GPU's free memory). The
            last segments keep their graph, as many as fit, and are not run again: from pure replay at 0 to full
            back-propagation. It also bounds how many segments `prepare` and `readout` take at once. By default
            the last segment alone keeps its graph, and groups are as large as the graph of one segment, or 64 MiB.
            With `reduction` the readout lets go of that graph first, to make room; in a `CapturedCell` it stays where
            it is at most 128 MiB and the readout's is smaller. Such small segments also run side by side there, which
            takes a second graph.
        strict: replay also compares the output and next state of every replayed segment with those of the forward,
            bit for bit, and raises where they differ: the cell then draws on a source of randomness or a state that
            the engine does not know.
        random_sources: generators besides PyTorch's default ones that the cell draws from: `torch.Generator`,
            `random.Random` or the module `random`, `numpy.random.Generator`, `RandomState` or the module
            `numpy.random`. Replay puts them back to where each segment began, and afterwards to where they stood.

    Returns:
        `(outputs, state)`: one output per segment, or with `reduction` a scalar, and the state after the last segment.

    What replay keeps: PyTorch's CPU and CUDA random state (dropout masks are the same bits), autocast, buffers
    (updated once) and the train or eval mode of the modules that the cell is or refers to, gradients of a subset of
    parameters, parameter hooks: called once, with None where the loss does not reach a parameter in use. The rollout is
    one node of the autograd graph: DistributedDataParallel, GradScaler, gradient accumulation need no special code, nor
    does `fully_shard` of one module whose forward is the rollout. An exception in any segment, forward or backward,
    leaves `.grad`, buffers and random state as they were, and the given state, unless the cell itself had modified it
    in place. Hooks of modules inside the cell run in both passes.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.
        RuntimeError: a parameter, segment or state was modified in place between the passes, or by the cell; the cell
            uses a tensor with a graph from outside it; with `strict`, a segment did not replay bit for bit.
        NotImplementedError: a second derivative was asked for; "bptt" has one. Or the cell calls a module that FSDP
            shards by itself; shard the module that the whole rollout is the forward of.

    Source: Wu et al., Memformer, arXiv 2010.06891v2, algorithm 1.
    """
    if not callable(cell):
        checks.fail(OP, "cell", "be callable as cell(segment, state)", type(cell).__name__, TypeError)
    for argument, given in (("segments", segments), ("random_sources", random_sources)):
        if not isinstance(given, Sequence):
            checks.fail(OP, argument, "be a sequence, such as a list or a tuple", type(given).__name__, TypeError)
    for argument, given, known in (("method", method, METHODS), ("reduction", reduction, REDUCTIONS)):
        if given not in known:
            checks.fail(OP, argument, f"be one of {', '.join(known)}", repr(given))
    check_budget(OP, activation_budget)
    if reduction != "none" and not segments:
        checks.fail(OP, "segments", f'hold at least one segment with reduction="{reduction}"', "none")
    weight = {"none": None, "sum": 1.0, "mean": 1 / max(len(segments), 1)}[reduction]
    if method == "replay":
        options = dict(strict=strict, random_sources=tuple(random_sources))
        return _replay(cell, list(segments), state, weight=weight, activation_budget=activation_budget, **options)
    for option, given in (
        ("strict", strict),
        ("random_sources", random_sources),
        ("activation_budget", activation_budget is not None),
    ):
        if given:
            checks.fail(OP, option, 'be left out unless method="replay"', repr(given))
    outputs = []
    for segment in segments:
        if method == "checkpoint":
            output, state = checkpoint(cell, segment, state, use_reentrant=False)
        else:
            output, state = cell(segment, state)
        outputs.append(output)
    return _reduced(outputs, weight), state


def _replay(
    cell: Callable,
    segments: list,
    state: Any,
    *,
    weight: float | None,
    activation_budget: int | float | None,
    strict: bool,
    random_sources: tuple,
) -> tuple[Any, Any]:
    if not segments:
        return [], state
    captured = None
    if isinstance(cell, CapturedCell):
        captured, modules, cell = None if strict or random_sources else cell, cell.modules, cell.cell
    else:
        modules = modules_of(cell)
    if captured is not None:
        captured.launch(segments, state, activation_budget, weight)
    given = Tree.of((segments if captured is None else captured.chunks(segments), state))
    surroundings = Surroundings.of(modules, given.tensors(), random_sources)
    parameters = surroundings.modules.parameters
    budget = budget_in_bytes(activation_budget, surroundings.devices)
    # a gradient scaler's factor arrives with the backward, too late for a gradient in float16 that is made before
    readout = isinstance(cell, StagedCell) and cell.readout is not None
    half = any(t.dtype == torch.float16 for t in (*parameters, *given.tensors()))
    half = half or surroundings.autocast.to(torch.float16)
    early = weight if readout and torch.is_grad_enabled() and not half else None
    versions = dict(zip(parameters, versions_of(parameters), strict=True))

    def rollout(parts: Parts, given: Tree, weight: float | None) -> tuple[Any, Any]:
        if torch.is_grad_enabled():
            with sharded.refused(surroundings.modules.owners):
                return differentiable(Passes(parts, surroundings, budget, weight), versions, given)
        with surroundings.kept_if_raises():
            return run_parts(NoTape(), parts, *given.whole(), budget=budget)

    if captured is not None and captured.takes(surroundings.devices):
        options = dict(budget=budget, asked=activation_budget, weight=early)
        part = captured.part(surroundings, parameters, **options)
        try:
            chunks, final = rollout(Parts(part), given, None)
        except NotCapturable as error:
            captured.give_up(error)
        else:
            if early is not None:
                return functools.reduce(torch.add, chunks), final
            return _reduced([output for chunk in chunks for output in chunk], weight), final
    if captured is not None:
        given = Tree.of((segments, state))
    parts = python_parts(cell, surroundings, budget, strict=strict)
    outputs, final = rollout(parts, given, early)
    return outputs if early is not None else _reduced(outputs, weight), final


def _reduced(outputs: list[Any], weight: float | None) -> Any:
    return outputs if weight is None else weighed_sum(outputs, weight)
