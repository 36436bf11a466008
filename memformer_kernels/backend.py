"""Which implementation of an op runs, and why each other does not.

An op lives in `ops/<op>/`. A fused backend is a module or package there, named `cuda` or `triton`, that offers
`unsupported_reason(*call) -> str | None`, `forward` and `backward`; `eager.py` is the definition and runs
everywhere. The choice is a function of the tensors of the call and of nothing that is stored here.
"""

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from memformer_kernels import checks
from memformer_kernels.compiling import constant

if TYPE_CHECKING:
    from memformer_kernels.replay.estimate import Estimate

FUSED = ("cuda", "triton")  # in order of preference
BACKENDS = (*FUSED, "eager")
OPS = ("memory_read", "memory_write", "memory_forget")


# Per op and backend its module, the reason why it cannot be imported, or None where there is none: what the package's
# files say, looked up once. All at once, because `torch.compile` sees a dictionary as it was at its first look.
_implementations: dict[tuple[str, str], ModuleType | str | None] = {}


def implementation(op: str, backend: str) -> ModuleType | str | None:
    """The module `ops/<op>/<backend>`; a string that says why it cannot be imported; None where there is none."""
    _look_up_implementations()
    return _implementations[op, backend]


@constant  # an import cannot be traced, nor can this hand out a module
def _look_up_implementations() -> bool:
    if not _implementations:
        _implementations.update({(op, backend): _import(op, backend) for op in OPS for backend in BACKENDS})
    return True


def _import(op: str, backend: str) -> ModuleType | str | None:
    name = f"memformer_kernels.ops.{op}.{backend}"
    if importlib.util.find_spec(name) is None:
        return None
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever a broken installation raises, the other backends still run
        return f"cannot be imported ({error})"


def unsupported_reason(op: str, backend: str, call: tuple) -> str | None:
    """Why `backend` cannot run `op` on the arguments `call`; None when it can."""
    if backend == "eager":
        return None
    module = implementation(op, backend)
    if module is None:
        return f"{op} has no {backend} kernel in this version"
    if isinstance(module, str):
        return module
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms are active; only eager composes with them"
    return module.unsupported_reason(*call)


def choose(op: str, requested: str, call: tuple) -> str:
    """The backend that runs. A named backend runs or raises; "auto" takes the first fused one that can."""
    _check(op, requested)
    if requested != "auto":
        reason = unsupported_reason(op, requested, call)
        if reason is not None:
            raise NotImplementedError(f"{op}: backend {requested!r} cannot run this call: {reason}")
        return requested
    for backend in FUSED:
        if unsupported_reason(op, backend, call) is None:
            return backend
    if not torch.compiler.is_compiling() and any(isinstance(a, Tensor) and a.is_cuda for a in call):
        _warn_eager_on_gpu(op)
    return "eager"


def _check(op: str, requested: str) -> None:
    if requested not in ("auto", *BACKENDS):
        checks.fail(op, "backend", f"be one of {', '.join(('auto', *BACKENDS))}", repr(requested))


@functools.cache
def _warn_eager_on_gpu(op: str) -> None:
    warnings.warn(
        f"{op}: no fused kernel can run this call on the GPU, so the eager reference does; "
        f"memformer_kernels.explain({op!r}, ...) says why. This is said once.",
        RuntimeWarning,
        stacklevel=4,
    )


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns: `backend` runs; `reasons` holds, for each backend, why it cannot, or None."""

    op: str
    backend: str
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        lines = [f"{self.op} runs on {self.backend}"]
        for backend, reason in self.reasons.items():
            if backend != self.backend:
                lines.append(f"  not {backend}: {reason or 'it can run, but is not the one chosen'}")
        return "\n".join(lines)


def explain(op: str | Callable, *arguments: Any, **options: object) -> "Explanation | Estimate":
    """Says which backend `op(*arguments, **options)` would run on, and why each other does not.

    `op` is one of the ops or its name. The arguments are checked as a call would check them; nothing is computed.
    Of `"memory_replay", cell, segments, state, activation_budget=` it tells what the rollout will keep, and how many
    segments it will replay: a `replay.estimate.Estimate`, for which the first segment is run once.

    >>> print(explain("memory_forget", slots, bias))
    memory_forget runs on eager
      not cuda: slots must be on a CUDA device, got cpu
      not triton: slots must be on a CUDA device, got cpu
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name == "memory_replay":
        return importlib.import_module("memformer_kernels.replay.estimate").estimate(*arguments, **options)
    if name not in OPS:
        checks.fail("explain", "op", f"be one of {', '.join((*OPS, 'memory_replay'))}", repr(name))
    requested = options.pop("backend", "auto")
    call = importlib.import_module(f"memformer_kernels.ops.{name}.api").prepare(*arguments, **options)
    _check(name, requested)
    reasons = {backend: unsupported_reason(name, backend, call) for backend in BACKENDS}
    if requested != "auto":
        return Explanation(name, choose(name, requested, call), reasons)
    return Explanation(name, next(b for b, reason in reasons.items() if reason is None), reasons)
