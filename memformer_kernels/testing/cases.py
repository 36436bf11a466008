"""Random calls of the ops, and the float64 answer to them."""

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memformer_kernels import backend as backends
from memformer_kernels import checks


@dataclass(frozen=True)
class Case:
    """One call of an op: `op(**tensors, **options)`. An argument that the call leaves out is not in `tensors`."""

    op: str
    tensors: dict[str, Tensor]
    options: dict[str, object] = field(default_factory=dict)

    def replace(self, **tensors: Tensor) -> "Case":
        """The case with some of its tensors replaced or added."""
        return dataclasses.replace(self, tensors={**self.tensors, **tensors})

    def map(self, function: Callable[[Tensor], Tensor]) -> "Case":
        """The case with `function` applied to each of its tensors."""
        return self.replace(**{name: function(tensor) for name, tensor in self.tensors.items()})


@dataclass(frozen=True)
class Result:
    """The output of a call, and the gradient of each of its floating-point tensors."""

    output: Tensor
    grads: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """Output and gradients by name, `grad_<name>` for the gradients."""
        return {"output": self.output, **{f"grad_{name}": grad for name, grad in self.grads.items()}}


def make_case(
    op: str,
    *,
    batch: int = 2,
    heads: int = 3,
    slots: int = 5,
    tokens: int = 7,
    width: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    amplitude: float = 1.0,
    masked: float = 0.0,
    bias: bool = True,
    temperature: float = 0.25,
    carried_dtype: torch.dtype | None = None,
    requires_grad: bool = False,
) -> Case:
    """A random call of `op`; the same values, rounded, for every dtype and device.

    Args:
        batch, heads, slots, tokens, width: B, H, M, L, D; any of them may be 0.
        seed: of a private generator, which draws in float64 on the CPU.
        amplitude: standard deviation of every floating-point value.
        masked: chance of each slot (`memory_read`) or token (`memory_write`) to be hidden; 0 passes no mask.
        bias, temperature: of `memory_write`.
        carried_dtype: of what is carried from segment to segment, slots and bias; `dtype` by default.
        requires_grad: of every floating-point tensor. `run` takes gradients in any case.
    """
    if op not in backends.OPS:
        checks.fail("make_case", "op", f"be one of {', '.join(backends.OPS)}", repr(op))
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        values = amplitude * torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(device, dtype).requires_grad_(requires_grad)

    def visible(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) >= masked).to(device)

    carried_dtype = carried_dtype or dtype
    per_token, per_slot = (batch, heads, tokens, width), (batch, heads, slots, width)
    memory = (batch, slots, heads * width)
    options = {}
    if op == "memory_read":
        tensors = {"query": normal(*per_token), "key": normal(*per_slot), "value": normal(*per_slot)}
        if masked:
            tensors["slot_mask"] = visible(batch, slots)
    elif op == "memory_write":
        tensors = {
            "query": normal(*per_slot),
            "own_key": normal(*per_slot),
            "slots": normal(*memory, dtype=carried_dtype),
            "key": normal(*per_token),
            "value": normal(*per_token),
        }
        if masked:
            tensors["token_mask"] = visible(batch, tokens)
        if bias:
            tensors["bias"] = normal(*memory[1:], dtype=carried_dtype)
        options["temperature"] = temperature
    else:
        tensors = {"slots": normal(*memory, dtype=carried_dtype), "bias": normal(*memory[1:], dtype=carried_dtype)}
    return Case(op, tensors, options)


def call(case: Case, backend: str = "auto") -> Tensor:
    """The op's public function on the case."""
    return _on_backend(case.op, backend)(**case.tensors, **case.options)


def cotangent(case: Case, seed: int = 1) -> Tensor:
    """A random gradient of the case's output, on its device; the same values, rounded, for every dtype and device."""
    like = case.tensors["query" if case.op == "memory_read" else "slots"]
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def run(
    case: Case,
    backend: str = "auto",
    grad_output: Tensor | None = None,
    *,
    function: Callable[..., Tensor] | None = None,
) -> Result:
    """Output and gradients of the case.

    Args:
        backend: of the op's public function.
        grad_output: gradient of the output; `cotangent(case)` by default.
        function: called on the case's tensors and options, by name, instead of the public function.
    """
    if function is None:
        function = _on_backend(case.op, backend)
    leaves = case.map(lambda t: t.detach().requires_grad_(t.is_floating_point()))
    differentiable = {name: t for name, t in leaves.tensors.items() if t.requires_grad}
    output = function(**leaves.tensors, **leaves.options)
    grad_output = cotangent(case) if grad_output is None else grad_output
    grads = torch.autograd.grad(output, differentiable.values(), grad_output, allow_unused=True, materialize_grads=True)
    return Result(output.detach(), dict(zip(differentiable, grads, strict=True)))


def oracle(case: Case, grad_output: Tensor | None = None) -> Result:
    """The answer: the eager definition in float64 on the CPU, on the case's own, already rounded, values."""
    grad_output = cotangent(case) if grad_output is None else grad_output
    return run(case.map(to_float64), "eager", to_float64(grad_output))


def relative_error(a: Tensor, reference: Tensor) -> float:
    """`max|a - reference| / max|reference|`, in float64; 0 when the two are equal, empty ones included."""
    if a.shape != reference.shape:
        checks.fail("relative_error", "a", f"have the shape of reference {list(reference.shape)}", list(a.shape))
    a, reference = to_float64(a), to_float64(reference)
    if torch.equal(a, reference):
        return 0.0
    return ((a - reference).abs().max() / reference.abs().max()).item()


def errors(result: Result, reference: Result) -> dict[str, float]:
    """The relative error of the output and of each gradient."""
    expected = reference.tensors()
    return {name: relative_error(tensor, expected[name]) for name, tensor in result.tensors().items()}


def _on_backend(op: str, backend: str) -> Callable[..., Tensor]:
    function = getattr(importlib.import_module(f"memformer_kernels.ops.{op}"), op)
    return lambda **arguments: function(**arguments, backend=backend)


def to_float64(tensor: Tensor) -> Tensor:
    """The values on the CPU, in float64 unless they are a mask."""
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor
