"""The write by way of FlashAttention: attention over the tokens, the own slot merged in by its log-sum-exp.

u = exp(lse - total) * flash + exp(s0 - total) * heads(slots)      total = log(exp(lse) + exp(s0))

FlashAttention's backward takes the weights from `exp(s - lse)` and Delta from `rowdot(grad, output)`. Handed the merged
log-sum-exp and output instead, it gives the gradients of the token part of the merged softmax.
"""

from collections.abc import Callable

import torch
from torch import Tensor

EPS = 1e-12


def make(compile: Callable) -> Callable:
    """The write as a function of its tensors; the three parts round the attention go through `compile`."""
    merge, before, after = compile(_merge), compile(_before_attention_backward), compile(_after_attention_backward)

    class Write(torch.autograd.Function):
        @staticmethod
        def forward(ctx, query, own_key, slots, key, value, bias, scale):
            attended, lse, rest = _attention(query, key, value, scale)
            output, merged, total = merge(attended, lse, query, own_key, slots, bias, scale, True)
            ctx.save_for_backward(query, own_key, slots, key, value, bias, merged, total)
            ctx.scale, ctx.rest = scale, rest
            return output

        @staticmethod
        def backward(ctx, grad):
            query, own_key, slots, key, value, bias, merged, total = ctx.saved_tensors
            grad_merged, grad_own_logit, grad_own_key, grad_slots, grad_bias = before(
                grad, query, own_key, slots, bias, merged, total, ctx.scale
            )
            grad_query, grad_key, grad_value = _attention_backward(
                grad_merged, query, key, value, merged, total, ctx.rest, ctx.scale
            )
            grad_query = after(grad_query, grad_own_logit, own_key)
            return grad_query, grad_own_key, grad_slots, grad_key, grad_value, grad_bias, None

    def memory_write(query, own_key, slots, key, value, bias=None, temperature=1.0):
        scale = query.shape[-1] ** -0.5 / temperature
        if torch.is_grad_enabled() and query.requires_grad:
            return Write.apply(query, own_key, slots, key, value, bias, scale)
        attended, lse, _ = _attention(query, key, value, scale)
        return merge(attended, lse, query, own_key, slots, bias, scale, False)[0]

    return memory_write


def _attention(query, key, value, scale) -> tuple[Tensor, Tensor, tuple]:
    """Attention over the tokens, its log-sum-exp, and what else its backward wants."""
    if query.is_cuda:
        output, lse, *rest = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
        return output, lse, tuple(rest)
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
    return output, lse, ()


def _attention_backward(grad, query, key, value, output, lse, rest, scale) -> tuple[Tensor, Tensor, Tensor]:
    if query.is_cuda:
        cum_seq_q, cum_seq_k, max_q, max_k, philox_seed, philox_offset, _ = rest
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad,
            query,
            key,
            value,
            output,
            lse,
            cum_seq_q,
            cum_seq_k,
            max_q,
            max_k,
            0.0,
            False,
            philox_seed,
            philox_offset,
            scale=scale,
        )
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, output, lse, 0.0, False, scale=scale
    )


def _merge(attended, lse, query, own_key, slots, bias, scale, saving):
    """Normalised output [B, M, C]; u [B, H, M, D] and its log-sum-exp [B, H, M] when `saving`."""
    own_logit = scale * (query.float() * own_key.float()).sum(-1)
    total = torch.logaddexp(lse, own_logit)
    own = _split(slots, query).float()
    merged = (lse - total).exp().unsqueeze(-1) * attended.float() + (own_logit - total).exp().unsqueeze(-1) * own
    output = _join(merged)
    if bias is not None:
        z = output + bias.float()
        output = z / torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min(EPS)
    # FlashAttention's backward takes the log-sum-exp as contiguous, whatever its strides
    saved = (merged.to(query.dtype), total.contiguous()) if saving else (None, None)
    return output.to(slots.dtype), *saved


def _before_attention_backward(grad, query, own_key, slots, bias, merged, total, scale):
    """Gradients of u, of the own logit (times `scale`), and of all that needs no token."""
    du, grad_bias = grad.float(), None
    if bias is not None:
        z = _join(merged).float() + bias.float()
        inv_norm = 1 / torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min(EPS)
        unit = z * inv_norm
        du = inv_norm * (du - unit * (unit * du).sum(-1, keepdim=True))
        grad_bias = du.sum(0).to(bias.dtype)
    du = _split(du, query)
    q, own = query.float(), _split(slots, query).float()
    weight = (scale * (q * own_key.float()).sum(-1) - total).exp()
    grad_own_logit = scale * weight * ((du * own).sum(-1) - (du * merged.float()).sum(-1))
    grad_own_key = (grad_own_logit.unsqueeze(-1) * q).to(own_key.dtype)
    grad_slots = _join(weight.unsqueeze(-1) * du).to(slots.dtype)
    return du.to(query.dtype), grad_own_logit, grad_own_key, grad_slots, grad_bias


def _after_attention_backward(grad_query, grad_own_logit, own_key):
    return (grad_query.float() + grad_own_logit.unsqueeze(-1) * own_key.float()).to(grad_query.dtype)


def _split(merged: Tensor, like: Tensor) -> Tensor:
    """[B, M, C] to [B, H, M, D], the shape of `like`; a view."""
    return merged.unflatten(-1, (like.shape[1], like.shape[3])).transpose(1, 2)


def _join(split: Tensor) -> Tensor:
    """[B, H, M, D] to [B, M, C]."""
    return split.transpose(1, 2).flatten(-2)
