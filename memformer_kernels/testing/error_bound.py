"""How far a right result may be from the float64 answer: `error_bound`.

The formulas of `ops/memory_*/eager.py` in running error analysis (`running_error.py`), for any order of summation,
accumulated in float32. Where plain propagation would give away too much, what is known of the operation is used.

Softmax: logits off by d give weights between those of the logits moved apart the most, so that a saturated weight is as
    exact as it is. The weights' errors add up to 0: an output is off by sum |dp| |value - c|, for any c that is the
    same for all keys; c is the mean. In the backward, from a stored log-sum-exp, they need not add up to 0.
16 bits: before they enter a product on the matrix units, weights, their gradients and what arrives for them are rounded
    to the dtype of the query; the own entry of a slot never is.
Delta: rowsum(p * dp) or rowdot(grad, output), whichever is worse; what cancels in dp - delta leaves their errors.
Norm: it moves by at most the norm of the error of z. Where that may cross eps, the gradient is off by what the floor
    leaves out.
"""

import math

import torch
from torch import Tensor

from memformer_kernels import checks
from memformer_kernels.testing.cases import Case, Result, cotangent, to_float64
from memformer_kernels.testing.running_error import SMALLEST, TINY, UNIT, Computed, rowdot

EXP = 4 * UNIT  # relative error of an exponential: 2 units in the last place, as the CUDA manual has it for `exp2`


def error_bound(case: Case, grad_output: Tensor | None = None, device: str | torch.device = "cpu") -> Result:
    """How far the output and each gradient may be from `oracle(case, grad_output)`, element by element.

    Holds, as `abs(result - oracle) <= 2 * error_bound`, for the eager and every fused backend, unless TF32 is allowed.
    Inputs must be finite; infinite where the result, or what it is rounded to on the way, may overflow.

    Args:
        case: in float32, float16 or bfloat16.
        grad_output: gradient of the output; `cotangent(case)` by default.
        device: where it is computed.

    Returns:
        The bounds in the shape of the results, float64 on the CPU.

    Raises:
        TypeError: the case is in float64, in which the answer itself is computed.
    """
    dtypes = {name: t.dtype for name, t in case.tensors.items() if t.is_floating_point()}
    for name, dtype in dtypes.items():
        if dtype not in SMALLEST:
            checks.fail("error_bound", name, "be float32, float16 or bfloat16", dtype, TypeError)
    grad = Computed.exact(to_float64(cotangent(case) if grad_output is None else grad_output).to(device))
    tensors = case.map(lambda t: to_float64(t).to(device)).tensors
    output, grads = {"memory_read": _read, "memory_write": _write, "memory_forget": _forget}[case.op](
        tensors, grad, dtypes, **case.options
    )
    output = output.rounded(dtypes["query" if case.op == "memory_read" else "slots"])
    grads = {name: grads[name].rounded(dtype) for name, dtype in dtypes.items()}
    return Result(_bound(output), {name: _bound(grad) for name, grad in grads.items()})


def shares_of_bound(result: Result, reference: Result, bound: Result) -> dict[str, float]:
    """Of the output and each gradient, the largest `abs(result - reference) / (2 * bound)`: above 1 it is wrong."""
    expected, bounds = reference.tensors(), bound.tensors()
    return {name: _share(t, expected[name], bounds[name]) for name, t in result.tensors().items()}


def _share(tensor: Tensor, expected: Tensor, bound: Tensor) -> float:
    if tensor.numel() == 0:
        return 0.0
    share = (to_float64(tensor) - to_float64(expected)).abs() / (2 * bound)
    return share.where(bound.isfinite(), 0).nan_to_num(nan=math.inf).max().item()


def _bound(result: Computed) -> Tensor:
    return result.error.nan_to_num(nan=math.inf, posinf=math.inf).cpu()


def _read(tensors, grad, dtypes, scale=None, allow_tf32=False):
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    visible = tensors.get("slot_mask", key.new_ones(key.shape[0], key.shape[2], dtype=torch.bool))
    scale = scale or max(query.shape[-1], 1) ** -0.5
    attention = _Attention(query, key, value, visible, scale, dtypes["query"])
    return attention.output, attention.backward(grad)


def _write(tensors, grad, dtypes, temperature=1.0, scale=None, eps=1e-12, allow_tf32=False):
    query, key = tensors["query"], tensors["key"]
    visible = tensors.get("token_mask", key.new_ones(key.shape[0], key.shape[2], dtype=torch.bool))
    scale = (scale or max(query.shape[-1], 1) ** -0.5) / temperature

    def split(merged: Tensor) -> Tensor:
        return merged.unflatten(-1, (query.shape[1], query.shape[3])).transpose(1, 2)

    def merge(heads: Tensor) -> Tensor:
        return heads.transpose(1, 2).flatten(-2)

    own = tensors["own_key"], split(tensors["slots"])
    attention = _Attention(query, key, tensors["value"], visible, scale, dtypes["query"], own)
    output = attention.output.map(merge)
    if "bias" in tensors:
        output, grad = _normalised(output + Computed.exact(tensors["bias"]), grad, eps)
    grads = attention.backward(grad.map(split))
    return output, grads | {"slots": grads["slots"].map(merge), "bias": grad.sum(0)}


def _forget(tensors, grad, dtypes, eps=1e-12):
    z = Computed.exact(tensors["slots"]) + Computed.exact(tensors["bias"])
    output, grad = _normalised(z, grad, eps)
    return output, {"slots": grad, "bias": grad.sum(0)}


def _normalised(z: Computed, grad: Computed, eps: float) -> tuple[Computed, Computed]:
    """`(unit, grad_z)` of `ops/normalisation.py`."""
    norm, spread = (t.norm(dim=-1, keepdim=True) for t in (z.value, z.error))
    floored = norm.clamp(min=eps)
    least = (floored - spread).clamp(min=eps)
    rounding = (z.value.shape[-1] / 2 + 8) * UNIT  # of the sum of squares, halved by the root, and what follows it
    unit = z.value / floored
    error = (z.error + unit.abs() * spread) / least + rounding * unit.abs()
    output = Computed(unit, error.clamp(max=2))  # no unit vector is further from another

    inverse = Computed(1 / floored, (spread / least + rounding) / floored + TINY)
    unit = z * inverse
    along = rowdot(unit, grad).map(lambda t: t.unsqueeze(-1))
    across, alone = inverse * (grad - unit * along), inverse * grad
    at_floor, unsure = norm <= eps, (norm - eps).abs() <= spread + rounding * norm
    error = alone.error.where(at_floor, across.error) + unsure * (across.value - alone.value).abs()
    return output, Computed(alone.value.where(at_floor, across.value), error)


class _Attention:
    """`softmax(scale * query @ key^T) @ value` and its gradients, before they are stored.

    With `own = (own_key, own_value)` each row has one more key and value, its own, before all others.
    """

    def __init__(self, query, key, value, visible, scale, dtype, own=None):
        visible = visible[:, None, :, None]
        key, value = (Computed.exact(t.masked_fill(~visible, 0)) for t in (key, value))
        self.query, self.key, self.value, self.own = Computed.exact(query), key, value, own
        self.scale, self.dtype = scale, dtype
        logits = (self.query @ key.mT).scaled(scale)
        keep = visible.mT.expand_as(logits.value)
        if own is not None:
            self.own_key, self.own_value = map(Computed.exact, own)
            own_logit = rowdot(self.query, self.own_key).map(lambda t: t.unsqueeze(-1)).scaled(scale)
            logits = _beside(own_logit, logits)
            keep = torch.cat([keep.new_ones(*keep.shape[:-1], 1), keep], -1)
        forward, self.weights = _softmax(logits, keep)
        self.output = self._weighted_mean(forward, visible)

    def _weighted_mean(self, weights: Computed, visible: Tensor) -> Computed:
        """The errors of `weights` here are those of weights that add up to 1."""
        count = visible.sum(2, keepdim=True)
        centre = self.value.value.sum(2, keepdim=True) / count.clamp(min=1)
        own, others = self._parts(weights)
        output = Computed.exact(others.value).rounded(self.dtype) @ self.value
        error = others.error @ (self.value.value - centre).abs()
        if self.own is not None:
            output = output + Computed.exact(own.value) * self.own_value
            error = error + own.error * (self.own_value.value - centre).abs()
        error = error + output.error
        # the sum of the weights, begun anew at each larger logit, and the division by it
        rounding = (weights.value.shape[-1] + 8) * UNIT
        return Computed(output.value, error + rounding * (output.value.abs() + error))

    def backward(self, grad: Computed) -> dict[str, Computed]:
        """Gradients of all inputs, those of the own key and value as `own_key` and `slots`."""
        own, weights = self._parts(self.weights)
        narrow = grad.rounded(self.dtype)
        of_weights = narrow @ self.value.mT
        if self.own is not None:
            of_own = rowdot(grad, self.own_value).map(lambda t: t.unsqueeze(-1))
            of_weights = _beside(of_own, of_weights)
        summed, dotted = rowdot(self.weights, of_weights), rowdot(grad, self.output)
        delta = Computed(summed.value, torch.maximum(summed.error, dotted.error)).map(lambda t: t.unsqueeze(-1))
        own_logit, of_logits = self._parts(self.weights * (of_weights - delta))
        of_logits = of_logits.rounded(self.dtype)
        grads = {
            "query": of_logits @ self.key,
            "key": (of_logits.mT @ self.query).scaled(self.scale),
            "value": weights.rounded(self.dtype).mT @ narrow,
        }
        if self.own is not None:
            grads["query"] = grads["query"] + own_logit * self.own_key
            grads["own_key"] = (own_logit * self.query).scaled(self.scale)
            grads["slots"] = own * grad
        return grads | {"query": grads["query"].scaled(self.scale)}

    def _parts(self, of_keys: Computed) -> tuple[Computed | None, Computed]:
        """`(own, others)` of something [B, H, rows, keys]."""
        if self.own is None:
            return None, of_keys
        return of_keys.map(lambda t: t[..., :1]), of_keys.map(lambda t: t[..., 1:])


def _beside(a: Computed, b: Computed) -> Computed:
    return Computed(torch.cat([a.value, b.value], -1), torch.cat([a.error, b.error], -1))


def _softmax(logits: Computed, visible: Tensor) -> tuple[Computed, Computed]:
    """The weights twice: made to add up to 1, and made from a log-sum-exp that was stored in float32."""
    keys = logits.value.shape[-1]
    if keys == 0:
        return logits, logits
    blind = ~visible.any(-1, keepdim=True)
    value = logits.value.masked_fill(~visible, -math.inf).masked_fill(blind, 0)
    below_top = (value.amax(-1, keepdim=True) - value).where(visible, 0)
    off = logits.error.where(visible, 0) + 3 * UNIT * below_top + EXP  # of the logit, and of its exponential
    log_sum = value.logsumexp(-1, keepdim=True)
    weights = (value - log_sum).exp()

    most, least = _apart(value + off, value - off), _apart(value - off, value + off)
    normalised = torch.maximum(most - weights, weights - least)

    log_sum_off = torch.maximum(
        (value + off).logsumexp(-1, keepdim=True) - log_sum, log_sum - (value - off).logsumexp(-1, keepdim=True)
    )
    log_sum_off = log_sum_off + UNIT * (log_sum.abs() + keys + 8)
    off = off + log_sum_off + 3 * UNIT * below_top
    most = (value - log_sum + off).clamp(max=0).exp()  # no weight is above 1
    stored = torch.maximum(most - weights, -weights * torch.expm1(-off))
    return tuple(
        Computed(weights.where(visible, 0), (error.clamp(min=0) + TINY).where(visible, 0))
        for error in (normalised, stored)
    )


def _apart(one: Tensor, others: Tensor) -> Tensor:
    """The softmax weight of each logit where it is that of `one`, and all others are those of `others`."""
    total = others.logsumexp(-1, keepdim=True)
    without = total + torch.log1p(-(others - total).clamp(max=0).exp())
    return torch.sigmoid(one - without)
