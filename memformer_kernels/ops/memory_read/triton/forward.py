"""Forward kernels of `memory_read`: every token attends over the memory's slots.

s = query @ key^T     p = softmax(scale * s), 0 in a row that sees nothing     output = p @ value

Where all slots fit one tile they stay on chip while the tokens stream past; else each tile of tokens goes over the
tiles of slots with the online softmax, and the log-sum-exp, over the scale, is kept for the backward.
"""

import triton
import triton.language as tl

from memformer_kernels.triton_helpers import at_head, attend, load_mask, load_tile, store_tile, wait_for_kernels_before


@triton.jit(do_not_specialize=["L", "M", "H", "chunk"])
def _memory_read_forward_resident_kernel(
    query,  # [B, H, L, D]
    key,  # [B, H, M, D], M <= BLOCK_M
    value,  # [B, H, M, D]
    slot_mask,  # [B, M] or None
    output,  # [B, L, H, D], contiguous
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    log2_scale,  # scale * log2(e)
    L,
    M,
    H,
    chunk,  # tokens of one program
    D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALL_SLOTS: tl.constexpr,  # M == BLOCK_M and no mask
    PRECISION: tl.constexpr,
    num_stages: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_kernels_before(OVERLAPS)
    chunks = tl.cdiv(L, chunk)
    begin = tl.program_id(0) % chunks * chunk
    head = tl.program_id(0) // chunks % H
    batch = (tl.program_id(0) // chunks // H).to(tl.int64)
    query = at_head(query, batch, head, query_strides)
    key = at_head(key, batch, head, key_strides)
    value = at_head(value, batch, head, value_strides)
    output += (batch * L * H + head) * D

    slots = tl.arange(0, BLOCK_M)
    visible = None
    seen = True
    if not ALL_SLOTS:
        if slot_mask is not None:
            slot_mask += batch * mask_strides[0]
        visible = load_mask(slot_mask, slots, mask_strides[1], M)
        seen = tl.max(visible.to(tl.int32), 0) > 0
    k = load_tile(key, slots, key_strides[2], key_strides[3], visible, D, BLOCK_D)
    v = load_tile(value, slots, value_strides[2], value_strides[3], visible, D, BLOCK_D)
    for start in tl.range(begin, min(begin + chunk, L), BLOCK_L, num_stages=num_stages):
        tokens = start + tl.arange(0, BLOCK_L)
        # past the end the last token is read again: no mask on the load, and its result is not stored
        q = load_tile(query, tl.minimum(tokens, L - 1), query_strides[2], query_strides[3], None, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if not ALL_SLOTS:
            s = tl.where(visible[None, :], s, float("-inf"))
        top = tl.max(s, 1)
        p = tl.exp2((s - top[:, None]) * log2_scale)
        total = tl.sum(p, 1)
        inv_total = 1.0 / total
        out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * inv_total[:, None]
        if not ALL_SLOTS:
            out = tl.where(seen, out, 0.0)
        store_tile(output, tokens, H * D, out, tokens < L, D, BLOCK_D)


@triton.jit(do_not_specialize=["L", "M", "H"])
def _memory_read_forward_kernel(
    query,  # [B, H, L, D]
    key,  # [B, H, M, D]
    value,  # [B, H, M, D]
    slot_mask,  # [B, M] or None
    output,  # [B, L, H, D], contiguous
    log_sum_exp,  # [B, H, L] float32: of the scaled logits, over the scale; or None
    rounding,  # [B, L, H, D], contiguous, or None: what the rounding of the output took away
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    log2_scale,  # scale * log2(e)
    L,
    M,
    H,
    D: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALL_SLOTS: tl.constexpr,  # M is a multiple of BLOCK_M and there is no mask
    PRECISION: tl.constexpr,
    num_stages: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_kernels_before(OVERLAPS)
    tiles = tl.cdiv(L, BLOCK_L)
    tokens = tl.program_id(0) % tiles * BLOCK_L + tl.arange(0, BLOCK_L)
    head = tl.program_id(0) // tiles % H
    batch = (tl.program_id(0) // tiles // H).to(tl.int64)
    query = at_head(query, batch, head, query_strides)
    key = at_head(key, batch, head, key_strides)
    value = at_head(value, batch, head, value_strides)
    output += (batch * L * H + head) * D
    if rounding is not None:
        rounding += (batch * L * H + head) * D
    if slot_mask is not None:
        slot_mask += batch * mask_strides[0]

    q = load_tile(query, tl.minimum(tokens, L - 1), query_strides[2], query_strides[3], None, D, BLOCK_D)
    top = tl.full([BLOCK_L], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_L], tl.float32)
    acc = tl.zeros([BLOCK_L, BLOCK_D], tl.float32)
    seen = tl.full([], 0, tl.int32)
    for start in tl.range(0, M, BLOCK_M, num_stages=num_stages):
        slots = start + tl.arange(0, BLOCK_M)
        visible = None
        if not ALL_SLOTS:
            visible = load_mask(slot_mask, slots, mask_strides[1], M)
            seen = tl.maximum(seen, tl.max(visible.to(tl.int32), 0))
        k = load_tile(key, slots, key_strides[2], key_strides[3], visible, D, BLOCK_D)
        v = load_tile(value, slots, value_strides[2], value_strides[3], visible, D, BLOCK_D)
        top, total, acc = attend(q, k, v, visible, top, total, acc, log2_scale, PRECISION)
    out = acc * (1.0 / total)[:, None]
    lse = top + tl.log2(total) / log2_scale
    if not ALL_SLOTS:
        out = tl.where(seen > 0, out, 0.0)
        lse = tl.where(seen > 0, lse, 0.0)
    store_tile(output, tokens, H * D, out, tokens < L, D, BLOCK_D)
    if rounding is not None:
        lost = out - out.to(output.dtype.element_ty).to(tl.float32)
        store_tile(rounding, tokens, H * D, lost, tokens < L, D, BLOCK_D)
    if log_sum_exp is not None:
        tl.store(log_sum_exp + (batch * H + head) * L + tokens, lse, mask=tokens < L)
