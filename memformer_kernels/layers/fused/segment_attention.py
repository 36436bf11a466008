"""Self-attention over a segment that fits one tile, straight from the projection to what the output projection takes.

s = query @ key^T     p = softmax(scale * s)     dp = grad @ value^T     ds = p * (dp - rowsum(p * dp))
grad_value = p^T @ grad     grad_key = scale * ds^T @ query     grad_query = scale * ds @ key

Query, key and value of all heads lie side by side in one tensor, and their gradients are written side by side into one.
With all keys on chip a row of p is complete at once: nothing but the projection is kept for the backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memformer_kernels import launch
from memformer_kernels.triton_helpers import LOG2_E, load_tile, store_tile, wait_for_kernels_before

MOST_TOKENS = 128  # of a segment in one tile
MOST_CHANNELS = 64  # of a head: wider ones fill the shared memory of smaller GPUs


@triton.jit
def _weights(q, k, tokens, others, L, log2_scale, CAUSAL: tl.constexpr):
    """p [tokens, others]; a row past the end sees what the last token sees."""
    s = tl.dot(q, tl.trans(k))
    visible = (others < L)[None, :]
    if CAUSAL:
        visible = visible & (others[None, :] <= tl.minimum(tokens, L - 1)[:, None])
    s = tl.where(visible, s, float("-inf"))
    p = tl.exp2((s - tl.max(s, 1)[:, None]) * log2_scale)
    return p, 1.0 / tl.sum(p, 1)


@triton.jit(do_not_specialize=["L", "H"])
def _segment_attention_forward_kernel(
    projected,  # [B, L, 3, H, D], contiguous
    output,  # [B, L, H, D], contiguous
    log2_scale,  # scale * log2(e)
    L,
    H,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    CAUSAL: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_kernels_before(OVERLAPS)
    parts: tl.constexpr = BLOCK_L // BLOCK_Q
    head = tl.program_id(0) // parts
    row = 3 * H * D
    projected += (head // H).to(tl.int64) * L * row + head % H * D
    output += (head // H).to(tl.int64) * L * H * D + head % H * D
    tokens = tl.program_id(0) % parts * BLOCK_Q + tl.arange(0, BLOCK_Q)
    others = tl.arange(0, BLOCK_L)
    q = load_tile(projected, tokens, row, 1, tokens < L, D, BLOCK_D)
    k = load_tile(projected + H * D, others, row, 1, others < L, D, BLOCK_D)
    v = load_tile(projected + 2 * H * D, others, row, 1, others < L, D, BLOCK_D)
    p, inverse = _weights(q, k, tokens, others, L, log2_scale, CAUSAL)
    out = tl.dot(p.to(v.dtype), v) * inverse[:, None]
    store_tile(output, tokens, H * D, out, tokens < L, D, BLOCK_D)


@triton.jit(do_not_specialize=["L", "H"])
def _segment_attention_backward_kernel(
    grad,  # [B, L, H, D], contiguous
    projected,  # [B, L, 3, H, D], contiguous
    grad_projected,  # [B, L, 3, H, D], contiguous
    log2_scale,  # scale * log2(e)
    scale,
    L,
    H,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    CAUSAL: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_kernels_before(OVERLAPS)
    head = tl.program_id(0)
    row = 3 * H * D
    projected += (head // H).to(tl.int64) * L * row + head % H * D
    grad_projected += (head // H).to(tl.int64) * L * row + head % H * D
    grad += (head // H).to(tl.int64) * L * H * D + head % H * D
    tokens = tl.arange(0, BLOCK_L)
    inside = tokens < L
    q = load_tile(projected, tokens, row, 1, inside, D, BLOCK_D)
    k = load_tile(projected + H * D, tokens, row, 1, inside, D, BLOCK_D)
    v = load_tile(projected + 2 * H * D, tokens, row, 1, inside, D, BLOCK_D)
    g = load_tile(grad, tokens, H * D, 1, inside, D, BLOCK_D)  # 0 past the end: these rows give nothing
    p, inverse = _weights(q, k, tokens, tokens, L, log2_scale, CAUSAL)
    p *= inverse[:, None]
    dp = tl.dot(g, tl.trans(v))
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(k.dtype)
    p = p.to(v.dtype)
    store_tile(grad_projected, tokens, row, tl.dot(ds, k) * scale, inside, D, BLOCK_D)
    store_tile(grad_projected + H * D, tokens, row, tl.dot(tl.trans(ds), q) * scale, inside, D, BLOCK_D)
    store_tile(grad_projected + 2 * H * D, tokens, row, tl.dot(tl.trans(p), g), inside, D, BLOCK_D)


def fits(length: int, width: int, dtype: torch.dtype) -> bool:
    """Whether segments of `length` tokens and heads of `width` channels can be taken."""
    return 0 < length <= MOST_TOKENS and width <= MOST_CHANNELS and dtype.itemsize == 2


def _tile(length: int, width: int) -> dict[str, int]:
    return {
        "D": width,
        "BLOCK_D": max(16, triton.next_power_of_2(width)),
        "BLOCK_L": max(16, triton.next_power_of_2(length)),
    }


@launch.planned
def _forward_plan(batch, length, heads, width, causal, dtype, device) -> launch.Launcher:
    tile = _tile(length, width)
    block_q = min(64, tile["BLOCK_L"])
    programs = batch * heads * (tile["BLOCK_L"] // block_q)
    arguments = width**-0.5 * LOG2_E, length, heads
    options = dict(BLOCK_Q=block_q, CAUSAL=causal, num_warps=4)
    return launch.Launcher(_segment_attention_forward_kernel, programs, arguments, **tile, **options)


def forward(projected: Tensor, length: int, heads: int, causal: bool) -> Tensor:
    """Query, key and value side by side, contiguous [B * L, 3 C], to [B * L, C]."""
    rows, width = projected.shape[0], projected.shape[1] // 3
    output = projected.new_empty(rows, width)
    if rows:
        plan = rows // length, length, heads, width // heads, causal, projected.dtype, projected.device
        _forward_plan(*plan)(projected, output)
    return output


@launch.planned
def _backward_plan(batch, length, heads, width, causal, dtype, device) -> launch.Launcher:
    tile, scale = _tile(length, width), width**-0.5
    warps = 8 if tile["BLOCK_L"] == MOST_TOKENS else 4
    arguments = scale * LOG2_E, scale, length, heads
    options = dict(CAUSAL=causal, num_warps=warps)
    return launch.Launcher(_segment_attention_backward_kernel, batch * heads, arguments, **tile, **options)


def backward(grad: Tensor, projected: Tensor, length: int, heads: int, causal: bool) -> Tensor:
    """Gradient of `projected`; grad contiguous [B * L, C]."""
    grad_projected = torch.empty_like(projected)
    if projected.numel():
        width = grad.shape[1] // heads
        plan = grad.shape[0] // length, length, heads, width, causal, projected.dtype, projected.device
        _backward_plan(*plan)(grad, projected, grad_projected)
    return grad_projected
