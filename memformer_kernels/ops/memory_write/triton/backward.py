"""Backward kernels of `memory_write`.

dz = grad through the normalisation     grad_bias = sum over B of dz     du = heads(dz)     delta = rowdot(du, u)
ds0 = w0 * (rowdot(du, heads(slots)) - delta)     grad_slots = merge(w0 * du)     grad_own_key = scale * ds0 * query
w = exp(scale * (s - lse))     ds = w * (du @ value^T - delta)
grad_value = w^T @ du     grad_key = scale * ds^T @ query     grad_query = scale * (ds @ key + ds0 * own_key)

The first kernel does what belongs to a slot, all heads together, and adds up the bias gradient over groups of batch
rows; the second streams the tokens past the slots of one head, the gradient of the query in registers. More slots than
fit one tile take the two kernels of `triton_attention` instead.
"""

import triton
import triton.language as tl

from memformer_kernels.triton_helpers import (
    at_head,
    load_mask,
    load_tile,
    normalise_backward,
    store_tile,
    wait_for_kernels_before,
)


@triton.jit(do_not_specialize=["B", "M", "H", "group", "part_stride"])
def _memory_write_backward_rows_kernel(
    grad,  # [B, M, H * D]
    query,  # [B, H, M, D]
    slots,  # [B, M, H * D]
    bias,  # [M, H * D] or None
    attended,  # [B, M, H, D] float32: u / inv_total
    inv_total,  # [B, H, M] float32
    own_weight,  # [B, H, M] float32: w0
    inv_norm,  # [B, M] float32
    grad_attended,  # [B, M, H, D], contiguous: du, in the dtype of query
    row_terms,  # [2, B, H, M] float32: delta and ds0
    grad_own_key,  # [B, M, H, D], contiguous
    grad_slots,  # [B, M, H, D], contiguous
    grad_bias,  # [groups, M, H, D] float32 or, of one group, the bias gradient
    grad_strides,
    query_strides,
    slots_strides,
    bias_strides,
    scale,
    inv_eps,
    B,
    M,
    H,
    group,  # batch rows of one program
    part_stride,  # M * H * D
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_kernels_before(OVERLAPS)
    slot = tl.program_id(0) % M
    part = tl.program_id(0) // M
    heads = tl.arange(0, BLOCK_H)
    channels = tl.arange(0, BLOCK_D)
    in_heads = heads < H
    inside = in_heads[:, None] & (channels < D)[None, :]
    merged = (heads * D)[:, None].to(tl.int64) + channels[None, :]
    b = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    db = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    if bias is not None:
        b = tl.load(bias + slot.to(tl.int64) * bias_strides[0] + merged * bias_strides[1], mask=inside, other=0.0).to(
            tl.float32
        )
    for batch in tl.range(part * group, min((part + 1) * group, B), num_stages=STAGES):
        row = tl.cast(batch, tl.int64) * M + slot
        places = row * (H * D) + merged
        per_head = (tl.cast(batch, tl.int64) * H + heads) * M + slot
        g_places = tl.cast(batch, tl.int64) * grad_strides[0] + slot.to(tl.int64) * grad_strides[1]
        g = tl.load(grad + g_places + merged * grad_strides[2], mask=inside, other=0.0).to(tl.float32)
        u = tl.load(attended + places, mask=inside, other=0.0)
        u *= tl.load(inv_total + per_head, mask=in_heads, other=0.0)[:, None]
        m_places = tl.cast(batch, tl.int64) * slots_strides[0] + slot.to(tl.int64) * slots_strides[1]
        m = tl.load(slots + m_places + merged * slots_strides[2], mask=inside, other=0.0).to(tl.float32)
        q_places = tl.cast(batch, tl.int64) * query_strides[0] + slot.to(tl.int64) * query_strides[2]
        q_offsets = heads.to(tl.int64)[:, None] * query_strides[1] + channels.to(tl.int64)[None, :] * query_strides[3]
        q = tl.load(query + q_places + q_offsets, mask=inside, other=0.0).to(tl.float32)
        w0 = tl.load(own_weight + per_head, mask=in_heads, other=0.0)
        if bias is not None:
            g = normalise_backward(g, u + b, tl.load(inv_norm + row), inv_eps)
            db += g
        d = tl.sum(g * u, 1)
        ds0 = w0 * (tl.sum(g * m, 1) - d)
        rounded = g.to(grad_attended.dtype.element_ty)
        tl.store(grad_attended + places, rounded, mask=inside)
        tl.store(grad_slots + places, (w0[:, None] * g).to(grad_slots.dtype.element_ty), mask=inside)
        own_key_grad = scale * ds0[:, None] * q
        tl.store(grad_own_key + places, own_key_grad.to(grad_own_key.dtype.element_ty), mask=inside)
        # of the du that the products take: where a weight is near 1, what du lost cancels in du @ value^T - delta
        tl.store(row_terms + per_head, tl.sum(rounded.to(tl.float32) * u, 1), mask=in_heads)
        tl.store(row_terms + tl.cast(B, tl.int64) * M * H + per_head, ds0, mask=in_heads)
    if bias is not None:
        places = slot.to(tl.int64) * (H * D) + merged
        tl.store(grad_bias + part.to(tl.int64) * part_stride + places, db.to(grad_bias.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["L", "M", "H", "chunk", "at_once", "part_rows"])
def _memory_write_backward_resident_kernel(
    grad_attended,  # [B, M, H, D], contiguous: du
    query,  # [B, H, M, D], M <= BLOCK_M
    own_key,  # [B, H, M, D]
    key,  # [B, H, L, D]
    value,  # [B, H, L, D]
    token_mask,  # [B, L] or None
    log_sum_exp,  # [B, H, M] float32: of the scaled logits, over the scale
    row_terms,  # [2, B, H, M] float32: delta and ds0
    grad_query,  # [B, M, H, D], contiguous; or [parts, B, M, H, D] float32: ds @ key
    grad_key,  # [B, L, H, D], contiguous
    grad_value,  # [B, L, H, D], contiguous
    query_strides,
    own_key_strides,
    key_strides,
    value_strides,
    mask_strides,
    log2_scale,  # scale * log2(e)
    scale,
    L,
    M,
    H,
    chunk,  # tokens
    at_once,  # chunks of one program, which are a part
    part_rows,  # B * M * H
    D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALL_TOKENS: tl.constexpr,  # L is a multiple of BLOCK_L and there is no mask
    GROUPED: tl.constexpr,  # a program may take several chunks
    WIDE: tl.constexpr,  # the gradient of the query is kept as [D, M]: D fills the matrix units better than M
    ONE_CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    num_stages: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_kernels_before(OVERLAPS)
    parts = tl.cdiv(L, chunk * at_once)
    part = tl.program_id(0) % parts
    head = tl.program_id(0) // parts % H
    batch = (tl.program_id(0) // parts // H).to(tl.int64)
    grad_attended += (batch * M * H + head) * D
    query = at_head(query, batch, head, query_strides)
    own_key = at_head(own_key, batch, head, own_key_strides)
    key = at_head(key, batch, head, key_strides)
    value = at_head(value, batch, head, value_strides)
    if token_mask is not None:
        token_mask += batch * mask_strides[0]
    grad_query += (part.to(tl.int64) * part_rows + batch * M * H + head) * D
    grad_key += (batch * L * H + head) * D
    grad_value += (batch * L * H + head) * D
    per_head = (batch * H + head) * M

    slots = tl.arange(0, BLOCK_M)
    in_slots = slots < M
    # past the last slot it is read again, with a gradient of 0
    safe_slots = tl.minimum(slots, M - 1)
    q = load_tile(query, safe_slots, query_strides[2], query_strides[3], None, D, BLOCK_D)
    du = load_tile(grad_attended, slots, H * D, 1, in_slots, D, BLOCK_D)
    lse = tl.load(log_sum_exp + per_head + safe_slots)
    d = tl.load(row_terms + per_head + slots, mask=in_slots, other=0.0)
    if WIDE:
        dq = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
    else:
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if GROUPED:
        all_dq = tl.zeros(dq.shape, tl.float32)  # of the chunks before this one
    begin = part * chunk * at_once
    for start in tl.range(begin, min(begin + chunk * at_once, L), BLOCK_L, num_stages=num_stages):
        if GROUPED:
            if (start > begin) & ((start - begin) % chunk == 0):
                all_dq += dq
                dq = tl.zeros(dq.shape, tl.float32)
        tokens = start + tl.arange(0, BLOCK_L)
        visible = None
        if not ALL_TOKENS:
            visible = load_mask(token_mask, tokens, mask_strides[1], L)
        k = load_tile(key, tokens, key_strides[2], key_strides[3], visible, D, BLOCK_D)
        v = load_tile(value, tokens, value_strides[2], value_strides[3], visible, D, BLOCK_D)
        # transposed, [tokens, slots]: as it comes from the product it is an operand of those with du and query
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        w = tl.exp2((s - lse[None, :]) * log2_scale)
        if token_mask is not None:
            w = tl.where(visible[:, None], w, 0.0)
        dp = tl.dot(v, tl.trans(du), input_precision=PRECISION)
        ds = w * (dp - d[None, :])
        if not ALL_TOKENS:  # also where the gradient is NaN, and 0 * NaN
            ds = tl.where(visible[:, None], ds, 0.0)
        ds = ds.to(k.dtype)
        dv = tl.dot(w.to(v.dtype), du, input_precision=PRECISION)
        dk = tl.dot(ds, q, input_precision=PRECISION) * scale
        if not ALL_TOKENS:
            dk = tl.where(visible[:, None], dk, 0.0)
            dv = tl.where(visible[:, None], dv, 0.0)
        store_tile(grad_value, tokens, H * D, dv, tokens < L, D, BLOCK_D)
        store_tile(grad_key, tokens, H * D, dk, tokens < L, D, BLOCK_D)
        if WIDE:
            dq = tl.dot(tl.trans(k), ds, dq, input_precision=PRECISION)
        else:
            dq = tl.dot(tl.trans(ds), k, dq, input_precision=PRECISION)
    if GROUPED:
        dq = all_dq + dq
    if WIDE:
        dq = tl.trans(dq)
    if ONE_CHUNK:
        own = load_tile(own_key, safe_slots, own_key_strides[2], own_key_strides[3], None, D, BLOCK_D).to(tl.float32)
        ds0 = tl.load(row_terms + part_rows + per_head + slots, mask=in_slots, other=0.0)
        dq = scale * (dq + ds0[:, None] * own)
    store_tile(grad_query, slots, H * D, dq, in_slots, D, BLOCK_D)


@triton.jit(do_not_specialize=["M", "H", "parts", "group", "part_rows"])
def _memory_write_backward_query_kernel(
    partial,  # [parts, B, M, H, D] float32: ds @ key, times scale / part_scale
    own_key,  # [B, H, M, D]
    row_terms,  # [2, B, H, M] float32: delta and ds0
    grad_query,  # [B, M, H, D], contiguous
    own_key_strides,
    scale,
    part_scale,
    M,
    H,
    parts,
    group,  # parts of a group
    part_rows,  # B * M * H
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """The gradient of the query from its parts, groups of them first, always in the same order. One program a slot, all
    its heads."""
    wait_for_kernels_before(OVERLAPS)
    row = tl.program_id(0)
    slot = (row % M).to(tl.int64)
    batch = (row // M).to(tl.int64)
    heads = tl.arange(0, BLOCK_H)
    channels = tl.arange(0, BLOCK_D)
    inside = (heads < H)[:, None] & (channels < D)[None, :]
    places = (row.to(tl.int64) * H + heads)[:, None] * D + channels[None, :]
    dq = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    all_dq = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)  # of the groups before this one
    for part in tl.range(0, parts, num_stages=STAGES):
        new = part % group == 0  # without a branch, which would keep the loads apart
        all_dq += tl.where(new, dq, 0.0)
        here = tl.load(partial + places, mask=inside, other=0.0, eviction_policy="evict_first")
        dq = tl.where(new, 0.0, dq) + here
        partial += tl.cast(part_rows, tl.int64) * D
    offsets = heads.to(tl.int64)[:, None] * own_key_strides[1] + channels.to(tl.int64)[None, :] * own_key_strides[3]
    base = batch * own_key_strides[0] + slot * own_key_strides[2]
    own = tl.load(own_key + base + offsets, mask=inside, other=0.0).to(tl.float32)
    ds0 = tl.load(row_terms + part_rows + (batch * H + heads) * M + slot, mask=heads < H, other=0.0)
    dq = (all_dq + dq) * part_scale + scale * ds0[:, None] * own
    tl.store(grad_query + places, dq.to(grad_query.dtype.element_ty), mask=inside)
