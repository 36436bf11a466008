"""`memory_write` in plain PyTorch: the definition, and the forward and backward that every kernel mirrors.

s0 = scale * rowdot(query, own_key)      s = scale * query @ key^T, -inf where hidden     [B, H, M], [B, H, M, L]
p0, p = softmax([s0 ; s])                u = p0 * heads(slots) + p @ value                lse = log sum exp [s0 ; s]
output = normalise(merge(u) + bias), or merge(u) without a bias

du    = heads(grad through the normalisation)     Delta = rowdot(du, u)
ds0   = p0 * (rowdot(du, heads(slots)) - Delta)   ds    = p * (du @ value^T - Delta)
grad_query   = scale * (ds @ key + ds0 * own_key) grad_own_key = scale * ds0 * query
grad_key     = scale * ds^T @ query               grad_value   = p^T @ du
grad_slots   = merge(p0 * du)                     grad_bias    = sum over B of du, merged
"""

import torch
from torch import Tensor

from memformer_kernels.ops.autocast import outside_autocast
from memformer_kernels.ops.normalisation import normalise, normalise_backward
from memformer_kernels.ops.precision import wide


@outside_autocast
def memory_write(
    query: Tensor,
    own_key: Tensor,
    slots: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    token_mask: Tensor | None,
    scale: float,
    eps: float,
    allow_tf32: bool,
) -> Tensor:
    """The definition; autograd differentiates it, to any order. `scale` includes the temperature; TF32 is up to
    PyTorch's own setting."""
    attended = _attend(query, own_key, slots, key, value, token_mask, scale)[0]
    if bias is None:
        return attended.to(slots.dtype)
    return normalise(attended + wide(bias), eps)[0].to(slots.dtype)


@outside_autocast
def forward(
    query: Tensor,
    own_key: Tensor,
    slots: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    token_mask: Tensor | None,
    scale: float,
    eps: float,
    allow_tf32: bool,
    save: bool,
) -> tuple[Tensor | None, ...]:
    """`(output, attended, inv_total, log_sum_exp, own_weight, inv_norm)`: u / inv_total, [B, M, C]; a factor, lse and
    p0, [B, H, M]; 1 / norm, [B, M].

    All but the output are in float32, and None unless `save`. A kernel may keep the log-sum-exp in another unit, and
    what it attends to over any factor; here it is 1.
    """
    with torch.no_grad():
        attended, log_sum_exp, own_weight = _attend(query, own_key, slots, key, value, token_mask, scale)
        output, inv_norm = attended, attended.new_ones(attended.shape[:2])
        if bias is not None:
            output, inv_norm = normalise(attended + wide(bias), eps)
        saved = attended, torch.ones_like(own_weight), log_sum_exp, own_weight, inv_norm
        return output.to(slots.dtype, copy=True), *(saved if save else (None,) * 5)


@outside_autocast
def backward(
    grad: Tensor,
    query: Tensor,
    own_key: Tensor,
    slots: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    token_mask: Tensor | None,
    attended: Tensor,
    inv_total: Tensor,
    log_sum_exp: Tensor,
    own_weight: Tensor,
    inv_norm: Tensor,
    scale: float,
    eps: float,
    allow_tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, own_key, slots, key, value and bias (None when there is none)."""
    grad_z = wide(grad)
    grad_bias = None
    u = _split(wide(attended), query) * inv_total.unsqueeze(-1)
    if bias is not None:
        grad_z = normalise_backward(grad_z, _merge(u) + wide(bias), inv_norm, eps)
        grad_bias = grad_z.sum(0).to(bias.dtype)
    q, k0, k, v = wide(query), wide(own_key), wide(_visible(key, token_mask)), wide(_visible(value, token_mask))
    m, du = (_split(wide(t), query) for t in (slots, grad_z))
    delta = (du * u).sum(-1)
    p = _hide(scale * (q @ k.mT), token_mask).sub(log_sum_exp.unsqueeze(-1)).exp()
    p0 = own_weight
    ds0 = (scale * p0 * ((du * m).sum(-1) - delta)).unsqueeze(-1)
    ds = scale * p * (du @ v.mT - delta.unsqueeze(-1))
    grad_slots = _keep_own(p0.unsqueeze(-1) * du, du, token_mask)
    grad_query, grad_own_key = ds @ k + ds0 * k0, ds0 * q
    if token_mask is not None:
        nothing_seen = ~token_mask.any(-1)[:, None, None, None]
        grad_query, grad_own_key = grad_query.masked_fill(nothing_seen, 0), grad_own_key.masked_fill(nothing_seen, 0)
    return (
        grad_query.to(query.dtype),
        grad_own_key.to(own_key.dtype),
        _merge(grad_slots).to(slots.dtype),
        _visible(ds.mT @ q, token_mask).to(key.dtype),
        _visible(p.mT @ du, token_mask).to(value.dtype),
        grad_bias,
    )


def _attend(
    query: Tensor, own_key: Tensor, slots: Tensor, key: Tensor, value: Tensor, token_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`(u, lse, p0)`: what the slots attend to, [B, M, C]; of its 1 + L logits, the log-sum-exp and the own weight."""
    q, k0, k, v = wide(query), wide(own_key), wide(_visible(key, token_mask)), wide(_visible(value, token_mask))
    own = _split(wide(slots), query)
    own_logit = scale * (q * k0).sum(-1, keepdim=True)
    logits = torch.cat([own_logit, _hide(scale * (q @ k.mT), token_mask)], -1)
    weights = logits.softmax(-1)
    attended = weights[..., :1] * own
    if k.shape[2]:
        attended = attended + weights[..., 1:] @ v  # without tokens no sum: -0 + 0 is 0
    return _merge(_keep_own(attended, own, token_mask)), logits.logsumexp(-1), weights[..., 0]


def _keep_own(written: Tensor, own: Tensor, token_mask: Tensor | None) -> Tensor:
    """`own` where a batch row has no visible token: exact to the sign of zero, which a sum with 0 is not."""
    if token_mask is None:
        return written
    return own.where(~token_mask.any(-1)[:, None, None, None], written)


def _visible(tokens: Tensor, token_mask: Tensor | None) -> Tensor:
    """Hidden tokens as zeros: their weight is 0, but 0 * NaN is not."""
    return tokens if token_mask is None else tokens.masked_fill(~token_mask[:, None, :, None], 0)


def _hide(logits: Tensor, token_mask: Tensor | None) -> Tensor:
    return logits if token_mask is None else logits.masked_fill(~token_mask[:, None, None, :], float("-inf"))


def _split(merged: Tensor, like: Tensor) -> Tensor:
    """[B, M, C] to [B, H, M, D], the shape of `like`; head h takes chunk h."""
    return merged.unflatten(-1, (like.shape[1], like.shape[3])).transpose(1, 2)


def _merge(split: Tensor) -> Tensor:
    return split.transpose(1, 2).flatten(-2)
