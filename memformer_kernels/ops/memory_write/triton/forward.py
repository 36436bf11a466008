"""Forward kernels of `memory_write`: slots stay on chip, the segment's tokens stream past them.

s0 = rowdot(query, own_key)     s = query @ key^T, -inf where hidden     w0, w = softmax(scale * [s0 ; s])
u  = w0 * heads(slots) + w @ value                        output = normalise(merge(u) + bias), or merge(u)

The online softmax of the first chunk of tokens starts from the slot's own entry, so it never is empty. The chunks'
partial results are merged, in order, where all heads of a slot come together for the norm: those of a group of chunks
first, then the groups. Large batches merge a group where its chunks are made, small ones need a program for each chunk.
Chunks and groups depend on L alone: a row of the batch has the same bits in any batch.
"""

import triton
import triton.language as tl

from memformer_kernels.triton_helpers import (
    at_head,
    attend,
    load_mask,
    load_tile,
    merge,
    normalise,
    store_tile,
    wait_for_kernels_before,
)


@triton.jit
def _own_value(slots, rows, strides, keep, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loaded once more where no token is seen, it is exact to the sign of zero, which a sum with 0 is not."""
    return load_tile(slots, rows, strides[1], strides[2], keep, D, BLOCK_D).to(tl.float32)


@triton.jit
def _nothing(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The state of the online softmax that has seen no key."""
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    return top, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)


@triton.jit(do_not_specialize=["L", "M", "H", "chunk", "at_once", "part_rows"])
def _memory_write_forward_attend_kernel(
    query,  # [B, H, M, D]
    own_key,  # [B, H, M, D]
    slots,  # [B, M, H * D]
    key,  # [B, H, L, D]
    value,  # [B, H, L, D]
    token_mask,  # [B, L] or None
    acc_out,  # [parts, B, M, H, D] float32: sum of weight * value
    statistics,  # [2 * parts + 1, B, H, M] float32: each part's largest logit, its sum of weights; the own logit
    query_strides,
    own_key_strides,
    slots_strides,
    key_strides,
    value_strides,
    mask_strides,
    log2_scale,  # scale * log2(e)
    L,
    M,
    H,
    chunk,  # tokens
    at_once,  # chunks of one program, which are a part
    part_rows,  # B * M * H
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALL_TOKENS: tl.constexpr,  # L is a multiple of BLOCK_L and there is no mask
    GROUPED: tl.constexpr,  # a program may take several chunks
    PRECISION: tl.constexpr,
    num_stages: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_kernels_before(OVERLAPS)
    tiles = tl.cdiv(M, BLOCK_M)
    parts = max(tl.cdiv(L, chunk * at_once), 1)
    rows = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    part = tl.program_id(0) // tiles % parts
    head = tl.program_id(0) // tiles // parts % H
    batch = (tl.program_id(0) // tiles // parts // H).to(tl.int64)
    query = at_head(query, batch, head, query_strides)
    own_key = at_head(own_key, batch, head, own_key_strides)
    slots += batch * slots_strides[0] + head.to(tl.int64) * D * slots_strides[2]
    key = at_head(key, batch, head, key_strides)
    value = at_head(value, batch, head, value_strides)
    if token_mask is not None:
        token_mask += batch * mask_strides[0]
    acc_out += (part.to(tl.int64) * part_rows + batch * M * H + head) * D
    statistics += (batch * H + head) * M
    top_out = statistics + part.to(tl.int64) * part_rows
    total_out = statistics + tl.cast(parts + part, tl.int64) * part_rows
    own_out = statistics + tl.cast(parts, tl.int64) * 2 * part_rows

    is_first = part == 0
    has_own = rows < tl.where(is_first, M, 0)
    q = load_tile(query, tl.minimum(rows, M - 1), query_strides[2], query_strides[3], None, D, BLOCK_D)
    own_k = load_tile(own_key, rows, own_key_strides[2], own_key_strides[3], has_own, D, BLOCK_D)
    own = _own_value(slots, rows, slots_strides, has_own, D, BLOCK_D)
    own_logit = tl.sum(q.to(tl.float32) * own_k.to(tl.float32), 1)
    tl.store(own_out + rows, own_logit, mask=has_own)
    top = tl.where(is_first, own_logit, float("-inf"))
    total = tl.where(is_first, 1.0, tl.zeros([BLOCK_M], tl.float32))
    acc = own
    begin = part * chunk * at_once
    end = min(begin + chunk * at_once, L)
    tail = begin
    seen = tl.full([], 0, tl.int32)
    if GROUPED:
        all_top, all_total, all_acc = _nothing(BLOCK_M, BLOCK_D)  # of the chunks before this one
    if token_mask is None:
        tail = end - (end - begin) % BLOCK_L  # tiles before it are whole: no mask to look at
        for start in tl.range(begin, tail, BLOCK_L, num_stages=num_stages):
            if GROUPED:
                if (start > begin) & ((start - begin) % chunk == 0):
                    all_top, all_total, all_acc = merge(all_top, all_total, all_acc, top, total, acc, log2_scale)
                    top, total, acc = _nothing(BLOCK_M, BLOCK_D)
            tokens = start + tl.arange(0, BLOCK_L)
            k = load_tile(key, tokens, key_strides[2], key_strides[3], None, D, BLOCK_D)
            v = load_tile(value, tokens, value_strides[2], value_strides[3], None, D, BLOCK_D)
            top, total, acc = attend(q, k, v, None, top, total, acc, log2_scale, PRECISION)
    if not ALL_TOKENS:
        for start in tl.range(tail, end, BLOCK_L, num_stages=num_stages):
            if GROUPED:
                if (start > begin) & ((start - begin) % chunk == 0):
                    if token_mask is not None:
                        if (seen == 0) & is_first:
                            acc = _own_value(slots, rows, slots_strides, has_own, D, BLOCK_D)
                        seen = tl.full([], 1, tl.int32)  # later chunks do not start from the own slot
                    all_top, all_total, all_acc = merge(all_top, all_total, all_acc, top, total, acc, log2_scale)
                    top, total, acc = _nothing(BLOCK_M, BLOCK_D)
            tokens = start + tl.arange(0, BLOCK_L)
            visible = load_mask(token_mask, tokens, mask_strides[1], L)
            if token_mask is not None:
                seen = tl.maximum(seen, tl.max(visible.to(tl.int32), 0))
            k = load_tile(key, tokens, key_strides[2], key_strides[3], visible, D, BLOCK_D)
            v = load_tile(value, tokens, value_strides[2], value_strides[3], visible, D, BLOCK_D)
            top, total, acc = attend(q, k, v, visible, top, total, acc, log2_scale, PRECISION)
    if token_mask is not None:
        if (seen == 0) & is_first:
            acc = _own_value(slots, rows, slots_strides, has_own, D, BLOCK_D)
    if GROUPED:
        top, total, acc = merge(all_top, all_total, all_acc, top, total, acc, log2_scale)
    store_tile(acc_out, rows, H * D, acc, rows < M, D, BLOCK_D)
    tl.store(top_out + rows, top, mask=rows < M)
    tl.store(total_out + rows, total, mask=rows < M)


@triton.jit(do_not_specialize=["M", "H", "parts", "group", "part_rows"])
def _memory_write_forward_combine_kernel(
    acc,  # [parts, B, M, H, D] float32
    statistics,  # [2 * parts + 1, B, H, M] float32
    bias,  # [M, H * D] or None
    output,  # [B, M, H, D], contiguous
    attended,  # [B, M, H, D] float32: the parts' sum, which one part is itself; or None: nothing is saved
    inv_total,  # [B, H, M] float32: 1 / the sum of weights
    log_sum_exp,  # [B, H, M] float32: of the scaled logits, over the scale
    own_weight,  # [B, H, M] float32
    inv_norm,  # [B, M] float32
    bias_strides,
    log2_scale,
    eps,
    inv_eps,
    M,
    H,
    parts,
    group,  # parts of a group
    part_rows,  # B * M * H
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ONE_PART: tl.constexpr,
    GROUPED: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """One program a slot, all its heads."""
    wait_for_kernels_before(OVERLAPS)
    row = tl.program_id(0)
    slot = row % M
    heads = tl.arange(0, BLOCK_H)
    channels = tl.arange(0, BLOCK_D)
    in_heads = heads < H
    inside = in_heads[:, None] & (channels < D)[None, :]
    places = (row.to(tl.int64) * H + heads)[:, None] * D + channels[None, :]
    per_head = ((row // M).to(tl.int64) * H + heads) * M + slot

    top = statistics
    total = statistics + tl.cast(parts, tl.int64) * part_rows
    own_logit = statistics + tl.cast(parts, tl.int64) * 2 * part_rows
    best = tl.load(top + per_head, mask=in_heads, other=0.0)
    weight = tl.load(total + per_head, mask=in_heads, other=1.0)
    u = tl.load(acc + places, mask=inside, other=0.0, eviction_policy="evict_first")
    if not ONE_PART:
        if GROUPED:  # of the groups before this one
            all_best = tl.full([BLOCK_H], float("-inf"), tl.float32)
            all_weight = tl.zeros([BLOCK_H], tl.float32)
            all_u = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
        for part in tl.range(1, parts, num_stages=STAGES):
            top += part_rows
            total += part_rows
            acc += tl.cast(part_rows, tl.int64) * D
            here = tl.load(top + per_head, mask=in_heads, other=0.0)
            count = tl.load(total + per_head, mask=in_heads, other=0.0)
            attended_here = tl.load(acc + places, mask=inside, other=0.0, eviction_policy="evict_first")
            if GROUPED:  # without a branch, which would keep the loads apart
                new = part % group == 0
                with_group = merge(all_best, all_weight, all_u, best, weight, u, log2_scale)
                all_best = tl.where(new, with_group[0], all_best)
                all_weight = tl.where(new, with_group[1], all_weight)
                all_u = tl.where(new, with_group[2], all_u)
                best = tl.where(new, float("-inf"), best)
                weight = tl.where(new, 0.0, weight)
            best, weight, u = merge(best, weight, u, here, count, attended_here, log2_scale)
        if GROUPED:
            best, weight, u = merge(all_best, all_weight, all_u, best, weight, u, log2_scale)
    inverse_weight = 1.0 / weight
    if attended is not None:
        if not ONE_PART:
            tl.store(attended + places, u, mask=inside)
        tl.store(inv_total + per_head, inverse_weight, mask=in_heads)
        own = tl.load(own_logit + per_head, mask=in_heads, other=0.0)
        tl.store(own_weight + per_head, tl.exp2((own - best) * log2_scale) / weight, mask=in_heads)
        tl.store(log_sum_exp + per_head, best + tl.log2(weight) / log2_scale, mask=in_heads)
    u = u * inverse_weight[:, None]
    inverse = 1.0
    if bias is not None:
        places_in_bias = slot.to(tl.int64) * bias_strides[0] + (heads * D)[:, None].to(tl.int64) * bias_strides[1]
        b = tl.load(bias + places_in_bias + channels[None, :] * bias_strides[1], mask=inside, other=0.0)
        u, inverse = normalise(u + b.to(tl.float32), eps, inv_eps)
    if attended is not None:
        tl.store(inv_norm + row, inverse)
    tl.store(output + places, u.to(output.dtype.element_ty), mask=inside)
