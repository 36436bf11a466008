"""Measures one implementation of one shape: checked against float64 first, then timed, pass by pass."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from memformer_kernels import testing
from memformer_kernels.benchmarking import inputs, timing
from memformer_kernels.benchmarking.peers import Implementation, compile_afresh
from memformer_kernels.benchmarking.suite import BACKWARD, FORWARD, NO_BIAS, Shape
from memformer_kernels.testing import Case, Result

MOST_BYTES = 20e9  # of input sets, and again of what their calls keep
# Largest error over largest value that is called right; float32 may multiply in TF32.
LIMITS = {torch.bfloat16: 0.03, torch.float16: 0.01, torch.float32: 0.005}
INFERENCE = (FORWARD, NO_BIAS)
REPEATS = 3  # of a call that must give the same bits

InputSet = tuple[Case, Tensor]  # a call and the gradient of its output


@dataclass(frozen=True)
class Settings:
    dtype: torch.dtype = torch.bfloat16
    layout: str = "contiguous"
    hidden: float = 0.0  # share of slots that are not read, of tokens that are not written
    replays: int = 20
    peers: bool = True
    skip: str = ""  # leave out peers whose name contains this
    backend: str = "auto"  # of ours
    deterministic: bool = False  # PyTorch's mode in which a call that may give other bits the next time fails


class DeviceLost(RuntimeError):
    """The GPU answers nothing any more, as after an illegal address."""


class References:
    """The float64 answers to the first input set; computed where asked for, and kept."""

    def __init__(self, first: InputSet, shape: Shape):
        self.first, self.shape, self.answers = first, shape, {}

    def __getitem__(self, which: str) -> Result:
        key = which == NO_BIAS
        if key not in self.answers:
            case, grad = self.first
            self.answers[key] = inputs.reference(inputs.without_bias(case) if key else case, grad, self.shape)
        return self.answers[key]


def measure(
    implementation: Implementation,
    shape: Shape,
    passes: list[str],
    sets: list[InputSet],
    references: References,
    settings: Settings,
) -> Iterator[tuple[str, dict]]:
    """Yields (pass, figures)."""
    if implementation.compiled:
        torch._dynamo.reset()
    device = sets[0][1].device
    try:
        with implementation.context():
            function = implementation.make(shape, device, compile_afresh)
    except Exception as error:
        check_device(error)
        for which in passes:
            yield which, _no_figures(timing.one_line(error))
        return
    for which in passes:
        figures = _no_figures(None)
        try:
            with implementation.context():
                _check_and_time(function, which, sets, references, settings, figures)
        except Exception as error:
            check_device(error)
            figures |= {"ms": None, "problem": timing.one_line(error)}
        yield which, figures


def _no_figures(problem: str | None) -> dict:
    measured = ("ms", "method", "note", "host_us", "wall_us", "error", "errors", "same_bits")
    return {**dict.fromkeys((*measured, "sets", "calls", "first_call_s")), "problem": problem}


def _check_and_time(
    function: Callable, which: str, sets: list[InputSet], references: References, settings: Settings, figures: dict
) -> None:
    """Fills in `figures`; an implementation that is wrong gets no time."""
    started = time.perf_counter()
    result = _result(function, which, sets[0])
    torch.cuda.synchronize()
    figures["first_call_s"] = round(time.perf_counter() - started, 2)
    figures["errors"] = inputs.errors(result, references[which])
    figures["error"] = max(figures["errors"].values(), key=lambda e: (e != e, e))  # NaN is the largest
    if not figures["error"] <= LIMITS[settings.dtype]:
        figures["problem"] = f"wrong: error of {figures['error']:.2g} of the largest value"
        return
    figures["same_bits"] = all(_same_bits(which, result, _result(function, which, sets[0])) for _ in range(REPEATS))
    del result
    calls = _calls(function, which, sets)
    figures |= {"sets": len(calls), **asdict(timing.device_time(calls, settings.replays))}
    figures |= timing.eager_time(calls, repeats=3 if settings.replays > 10 else 1)


def _result(function: Callable, which: str, first: InputSet) -> Result:
    case, grad = first
    if which not in INFERENCE:
        return testing.run(case, grad_output=grad, function=function)
    with torch.no_grad():
        return Result(_inference(function, which, case)(), {})


def _same_bits(which: str, result: Result, again: Result) -> bool:
    """Of what the pass is for: the gradients, or the output."""
    if which == BACKWARD:
        return all(torch.equal(grad, again.grads[name]) for name, grad in result.grads.items())
    return torch.equal(result.output, again.output)


def _inference(function: Callable, which: str, case: Case) -> Callable[[], Tensor]:
    case = inputs.without_bias(case) if which == NO_BIAS else case
    return partial(_without_grad, partial(function, **case.tensors, **case.options))


def _without_grad(call: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return call()


def _calls(function: Callable, which: str, sets: list[InputSet]) -> timing.Calls:
    """One call over each set, or over fewer where what the calls keep would take too much memory.

    The forward of a backward runs here, once; autograd runs each node on the stream of its forward, which is the one
    stream of the whole run.
    """
    if which in INFERENCE:
        return [_inference(function, which, case) for case, _ in sets]
    calls, before = [], torch.cuda.memory_allocated()
    for case, grad in sets:
        case = case.map(lambda t: t.detach().requires_grad_(t.is_floating_point()))
        forward = partial(function, **case.tensors, **case.options)
        output = forward()
        wanted = tuple(t for t in case.tensors.values() if t.requires_grad)
        backward = partial(torch.autograd.grad, output, wanted, grad, retain_graph=True)
        calls.append(backward if which == BACKWARD else forward)
        kept = (torch.cuda.memory_allocated() - before) / (len(calls) if which == BACKWARD else 1)
        del output, backward
        if (len(calls) + 1) * kept > MOST_BYTES:
            break
    return calls


def check_device(error: Exception) -> None:
    try:
        torch.cuda.synchronize()
    except Exception:
        raise DeviceLost(f"the GPU answers nothing any more, after {timing.one_line(error)}") from error


def host_time(implementation: Implementation, shape: Shape, first: InputSet) -> dict:
    """Host microseconds of a forward in inference, and of a forward with its backward."""
    figures = dict.fromkeys(("forward_us", "forward_and_backward_us", "problem"))
    try:
        with implementation.context():
            function = implementation.make(shape, first[1].device, compile_afresh)
            figures["forward_us"] = timing.host_us(_inference(function, FORWARD, first[0]))
            figures["forward_and_backward_us"] = timing.host_us(_step(function, *first))
    except Exception as error:
        check_device(error)
        figures["problem"] = timing.one_line(error)
    return figures


def _step(function: Callable, case: Case, grad: Tensor) -> Callable[[], object]:
    case = case.map(lambda t: t.detach().requires_grad_(t.is_floating_point()))
    leaves = tuple(t for t in case.tensors.values() if t.requires_grad)
    return lambda: torch.autograd.grad(function(**case.tensors, **case.options), leaves, grad)
