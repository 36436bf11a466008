"""`memory_forget`: the contract, the checks, the choice of backend."""

from torch import Tensor

from memformer_kernels import backend as backends
from memformer_kernels import checks
from memformer_kernels.ops.memory_forget import autograd, eager

OP = "memory_forget"
SMALLEST_EPS = 1.2e-38  # the smallest normal float32: below it 1 / eps is not finite


def memory_forget(slots: Tensor, bias: Tensor, *, eps: float = 1e-12, backend: str = "auto") -> Tensor:
    """Biased memory normalisation: every slot turns towards its bias, at unit norm.

        z = slots + bias        output = z / max(||z||, eps)

    Args:
        slots: [B, M, C]; float16, bfloat16, float32 or float64; any strides.
        bias: [M, C], learned, in the dtype of `slots` or float32. A slot that is not written turns towards it with
            half-life `ln 2 / ln(1 + ||bias||)` calls.
        eps: smallest norm divided by. A slot with z = 0 gives exactly 0, with gradient `grad / eps`.
        backend: "auto", "cuda", "triton" or "eager". A named backend runs or raises; see `explain`.

    Returns:
        [B, M, C] in the dtype of `slots`; finite for every finite z, also where ||z|| overflows.

    Raises:
        TypeError, ValueError: an argument breaks a rule above; the message names it.
        NotImplementedError: the named backend cannot run this call.

    Precision: computed in float32 (float64 for float64), rounded once at the store; autocast leaves it alone.

    Source: Wu et al., Memformer, arXiv 2010.06891v2, section 3.3.
    """
    call = prepare(slots, bias, eps=eps)
    chosen = backends.choose(OP, backend, call)
    if chosen == "eager":
        return eager.memory_forget(*call)
    return autograd.apply(*call, chosen)


def prepare(slots, bias, *, eps=1e-12) -> tuple:
    """Checks the arguments and returns them as every backend takes them."""
    _check(slots, bias, eps)
    return slots, bias, float(eps)


@checks.once
def _check(slots, bias, eps) -> None:
    checks.tensor(OP, slots=slots, bias=bias)
    checks.shape(OP, "[B, M, C]", (-1, -1, -1), slots=slots)
    checks.shape(OP, "[M, C]", tuple(slots.shape[1:]), bias=bias)
    checks.floating(OP, slots=slots, bias=bias)
    checks.carried_dtype(OP, "bias", bias, slots.dtype)
    checks.same_device(OP, "slots", slots=slots, bias=bias)
    checks.at_least(OP, SMALLEST_EPS, eps=eps)
