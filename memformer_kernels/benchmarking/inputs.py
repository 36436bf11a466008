"""The calls that are measured, and the answers in float64 that they are held to."""

import torch
from torch import Tensor

from memformer_kernels import testing
from memformer_kernels.benchmarking.suite import Shape
from memformer_kernels.testing import Case, Result

LAYOUTS = ("contiguous", "transposed")
# Of the float64 scores of a chunk of the reference; about six tensors of their size are alive at the peak.
CHUNK_BYTES = 2**30


def make_input(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    layout: str,
    temperature: float,
    seed: int,
    hidden: float = 0.0,
) -> tuple[Case, Tensor]:
    """Standard normal tensors of a call, and a gradient of its output.

    Args:
        layout: of the [B, H, L, D] tensors: "contiguous", or "transposed", a view of [B, L, H, D] as a projection
            gives it.
        hidden: share of the slots (`memory_read`) or tokens (`memory_write`) that a mask hides; 0 passes no mask.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=torch.float32).to(dtype)

    def heads(length: int) -> Tensor:
        if layout == "transposed":
            return normal(shape.B, length, shape.H, shape.D).transpose(1, 2)
        return normal(shape.B, shape.H, length, shape.D)

    B, L, M, C = shape.B, shape.L, shape.M, shape.H * shape.D

    def mask(name: str, length: int) -> dict[str, Tensor]:
        if hidden == 0:
            return {}
        return {name: torch.rand(shape.B, length, generator=generator, device=device) >= hidden}

    if shape.op == "memory_read":
        tensors = {"query": heads(L), "key": heads(M), "value": heads(M), **mask("slot_mask", M)}
        return Case(shape.op, tensors), heads(L)
    if shape.op == "memory_forget":
        return Case(shape.op, {"slots": normal(B, M, C), "bias": normal(M, C)}), normal(B, M, C)
    tensors = {
        "query": heads(M),
        "own_key": heads(M),
        "slots": normal(B, M, C),
        "key": heads(L),
        "value": heads(L),
        "bias": normal(M, C),
        **mask("token_mask", L),
    }
    return Case(shape.op, tensors, {"temperature": temperature}), normal(B, M, C)


def without_bias(case: Case) -> Case:
    return Case(case.op, {name: t for name, t in case.tensors.items() if name != "bias"}, case.options)


def bytes_of(case: Case) -> int:
    return sum(t.nbytes for t in case.tensors.values())


def reference(case: Case, grad: Tensor, shape: Shape) -> Result:
    """Output and gradients by the eager definition in float64, on the device of the case, some batch rows at a time."""
    rows = max(1, CHUNK_BYTES // (8 * shape.H * shape.M * max(shape.L, shape.D)))
    outputs, parts = [], {name: [] for name, tensor in case.tensors.items() if tensor.is_floating_point()}
    for start in range(0, shape.B, rows):
        part = slice(start, start + rows)
        rows_of = {n: t if n == "bias" else t[part] for n, t in case.tensors.items()}
        chunk = case.replace(**{n: t.double() if t.is_floating_point() else t for n, t in rows_of.items()})
        result = testing.run(chunk, "eager", grad[part].double())
        outputs.append(result.output)
        for name, gradient in result.grads.items():
            parts[name].append(gradient)
    grads = {name: sum(some) if name == "bias" else torch.cat(some) for name, some in parts.items()}
    return Result(torch.cat(outputs), grads)


def errors(result: Result, expected: Result) -> dict[str, float]:
    """`max|a - b| / max|b|` of the output and of each gradient; NaN where a value is."""
    wanted = expected.tensors()
    return {name: relative_error(tensor, wanted[name]) for name, tensor in result.tensors().items()}


def relative_error(a: Tensor, b: Tensor) -> float:
    """As `testing.relative_error`, but on the device of the tensors: these are large."""
    if a.shape != b.shape:
        raise ValueError(f"shape {list(a.shape)}, not {list(b.shape)}")
    return ((a.double() - b).abs().max() / b.abs().max()).item()
