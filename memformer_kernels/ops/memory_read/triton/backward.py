"""Backward kernels of `memory_read`.

s = query @ key^T     p = softmax(scale * s)     dp = grad @ value^T     ds = p * (dp - rowsum(p * dp))
grad_value = p^T @ grad     grad_key = scale * ds^T @ query     grad_query = scale * ds @ key

Where all slots fit one tile, a token's whole row of p is computed anew while the tokens stream past once: neither the
output nor the log-sum-exp is needed, and the gradients of the slots stay in registers. More slots take the
two kernels of `triton_attention`, with delta = rowsum(p * dp) = rowdot(grad, output).
"""

import triton
import triton.language as tl

from memformer_kernels.triton_helpers import at_head, load_mask, load_tile, store_tile, wait_for_kernels_before


@triton.jit(do_not_specialize=["L", "M", "H", "chunk", "part_rows"])
def _memory_read_backward_resident_kernel(
    grad,  # [B, H, L, D]
    query,  # [B, H, L, D]
    key,  # [B, H, M, D], M <= BLOCK_M
    value,  # [B, H, M, D]
    slot_mask,  # [B, M] or None
    grad_query,  # [B, L, H, D], contiguous
    grad_key,  # [chunks, B, M, H, D], contiguous
    grad_value,  # [chunks, B, M, H, D], contiguous
    grad_strides,
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    log2_scale,  # scale * log2(e)
    scale,
    L,
    M,
    H,
    chunk,  # tokens of one program
    part_rows,  # B * M * H
    D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALL_SLOTS: tl.constexpr,  # M == BLOCK_M and no mask
    WIDE: tl.constexpr,  # gradients of the slots are kept as [D, M]: D fills the matrix units better than M
    PRECISION: tl.constexpr,
    num_stages: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_kernels_before(OVERLAPS)
    chunks = tl.cdiv(L, chunk)
    part = tl.program_id(0) % chunks
    head = tl.program_id(0) // chunks % H
    batch = (tl.program_id(0) // chunks // H).to(tl.int64)
    grad = at_head(grad, batch, head, grad_strides)
    query = at_head(query, batch, head, query_strides)
    key = at_head(key, batch, head, key_strides)
    value = at_head(value, batch, head, value_strides)
    grad_query += (batch * L * H + head) * D
    grad_key += (part.to(tl.int64) * part_rows + batch * M * H + head) * D
    grad_value += (part.to(tl.int64) * part_rows + batch * M * H + head) * D

    slots = tl.arange(0, BLOCK_M)
    visible = None
    if not ALL_SLOTS:
        if slot_mask is not None:
            slot_mask += batch * mask_strides[0]
        visible = load_mask(slot_mask, slots, mask_strides[1], M)
    k = load_tile(key, slots, key_strides[2], key_strides[3], visible, D, BLOCK_D)
    v = load_tile(value, slots, value_strides[2], value_strides[3], visible, D, BLOCK_D)
    if WIDE:
        dk = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
        dv = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
    else:
        dk = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin = part * chunk
    for start in tl.range(begin, min(begin + chunk, L), BLOCK_L, num_stages=num_stages):
        tokens = start + tl.arange(0, BLOCK_L)
        inside = tokens < L
        # past the end the last token is read again, with a gradient of 0
        q = load_tile(query, tl.minimum(tokens, L - 1), query_strides[2], query_strides[3], None, D, BLOCK_D)
        g = load_tile(grad, tokens, grad_strides[2], grad_strides[3], inside, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if not ALL_SLOTS:
            s = tl.where(visible[None, :], s, float("-inf"))
        p = tl.exp2((s - tl.max(s, 1)[:, None]) * log2_scale)
        p = p * (1.0 / tl.sum(p, 1))[:, None]
        if slot_mask is not None:  # NaN in a row that sees nothing
            p = tl.where(visible[None, :], p, 0.0)
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        delta = tl.sum(p * dp, 1)
        ds = p * (dp - delta[:, None])
        if slot_mask is not None:  # where the gradient is NaN, 0 * NaN
            ds = tl.where(visible[None, :], ds, 0.0)
        ds = ds.to(k.dtype)
        p = p.to(v.dtype)
        if WIDE:
            dv = tl.dot(tl.trans(g), p, dv, input_precision=PRECISION)
            dk = tl.dot(tl.trans(q), ds, dk, input_precision=PRECISION)
        else:
            dv = tl.dot(tl.trans(p), g, dv, input_precision=PRECISION)
            dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
        dq = tl.dot(ds, k, input_precision=PRECISION) * scale
        store_tile(grad_query, tokens, H * D, dq, inside, D, BLOCK_D)
    if WIDE:
        dk = tl.trans(dk)
        dv = tl.trans(dv)
    dk *= scale
    if not ALL_SLOTS:
        dk = tl.where(visible[:, None], dk, 0.0)
        dv = tl.where(visible[:, None], dv, 0.0)
    store_tile(grad_key, slots, H * D, dk, slots < M, D, BLOCK_D)
    store_tile(grad_value, slots, H * D, dv, slots < M, D, BLOCK_D)
