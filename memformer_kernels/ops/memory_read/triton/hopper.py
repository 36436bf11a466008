"""Forward of `memory_read` for Hopper, in Gluon: the slots stay in shared memory, and the matrix unit does not wait.

The same arithmetic as `forward.py`, to the bit. What Triton cannot say and Gluon can is when a product is waited for:
the logits of a tile and the product of the weights before them are issued together, and the softmax of the logits runs
while the other is under way.

    s(0); softmax(0)
    for each tile of tokens, for each tile of slots i:
        issue s(i+1) and p(i) v(i); wait for s; softmax(i+1); wait for the other

After the last tile of slots comes the first one, for the next tokens. Every warp has its own 16 rows of each 64, and
meets the others only where a tile of tokens has arrived; the one after it is on its way.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

# names that changed between Triton 3.6 and 3.9
async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.jit
def _copy_tile(target, base, first, stride, keep, D: gl.constexpr, layout: gl.constexpr):
    """Rows from `first` on of a matrix at unit channel stride, 0 where `keep` is false: asynchronously."""
    rows = gl.arange(0, target.shape[0], gl.SliceLayout(1, layout))
    channels = gl.arange(0, target.shape[1], gl.SliceLayout(0, layout))
    base += gl.to_tensor(first).to(gl.int64) * stride
    mask = keep[:, None] & (channels < D)[None, :]
    async_load(target, base + (rows[:, None] * stride + channels[None, :]), mask=mask)


@gluon.jit
def _visible(slot_mask, stride, first, M, count: gl.constexpr, layout: gl.constexpr):
    """Which of `count` slots from `first` on are there, and not hidden."""
    slots = first + gl.arange(0, count, layout)
    keep = slots < M
    if slot_mask is not None:
        keep = gl.load(slot_mask + slots.to(gl.int64) * stride, mask=keep, other=0).to(gl.int1)
    return keep


@gluon.jit
def _weigh(logits, keep, top, total, scale, HIDES: gl.constexpr):
    """One tile of slots of the online softmax: `(weights, top, total, what is left of earlier weights)`."""
    if HIDES:
        logits = gl.where(keep[None, :], logits, float("-inf"))
    new_top = gl.maximum(top, gl.max(logits, 1))
    reference = new_top
    if HIDES:
        reference = gl.where(new_top == float("-inf"), 0.0, new_top)  # nothing visible so far: weights of 0, not NaN
    shrink = gl.exp2((top - reference) * scale)
    weights = gl.exp2((logits - reference[:, None]) * scale)
    return weights, new_top, total * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _store_rows(target, first, count, values):
    """One value of each row from `first` on, of `count`."""
    rows = first + gl.arange(0, values.shape[0], values.type.layout)
    gl.store(target + rows, values, mask=rows < count)


@gluon.jit(do_not_specialize=["L", "M", "H", "chunk"])
def _memory_read_forward_hopper_kernel(
    query,  # [B, H, L, D]; this, key and value at unit channel stride, everything else a multiple of 16
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
    chunk,  # tokens of one program
    D: gl.constexpr,
    BLOCK_L: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_D: gl.constexpr,
    TILES: gl.constexpr,  # of slots
    ALL_SLOTS: gl.constexpr,  # M == TILES * BLOCK_M and no mask
    num_warps: gl.constexpr,
):
    dtype: gl.constexpr = query.dtype.element_ty
    HIDES: gl.constexpr = not ALL_SLOTS
    shared: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    loaded: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [num_warps, 1], [1, 0])
    # rows stay in the warp to which the matrix unit gives them
    stored: gl.constexpr = gl.BlockedLayout([BLOCK_D // 16, 8], [256 // BLOCK_D, BLOCK_D // 8], [num_warps, 1], [1, 0])
    of_logits: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_M, 16])
    of_output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_D, 16])
    of_weights: gl.constexpr = gl.DotOperandLayout(0, of_output, 2)
    output_rows: gl.constexpr = gl.SliceLayout(1, of_output)
    logit_rows: gl.constexpr = gl.SliceLayout(1, of_logits)
    logit_slots: gl.constexpr = gl.SliceLayout(0, of_logits)

    chunks = (L + chunk - 1) // chunk
    begin = gl.program_id(0) % chunks * chunk
    head = gl.program_id(0) // chunks % H
    batch = (gl.program_id(0) // chunks // H).to(gl.int64)
    left = gl.minimum(L - begin, chunk)
    query += batch * query_strides[0] + head.to(gl.int64) * query_strides[1] + begin.to(gl.int64) * query_strides[2]
    key += batch * key_strides[0] + head.to(gl.int64) * key_strides[1]
    value += batch * value_strides[0] + head.to(gl.int64) * value_strides[1]
    output += ((batch * L + begin) * H + head) * D
    if log_sum_exp is not None:
        log_sum_exp += (batch * H + head) * L + begin
    if rounding is not None:
        rounding += ((batch * L + begin) * H + head) * D
    if slot_mask is not None:
        slot_mask += batch * mask_strides[0]

    q = gl.allocate_shared_memory(dtype, [2, BLOCK_L, BLOCK_D], shared)
    k = gl.allocate_shared_memory(dtype, [TILES, BLOCK_M, BLOCK_D], shared)
    v = gl.allocate_shared_memory(dtype, [TILES, BLOCK_M, BLOCK_D], shared)
    tokens = gl.arange(0, BLOCK_L, gl.SliceLayout(1, loaded))
    _copy_tile(q.index(0), query, 0, query_strides[2], tokens < left, D, loaded)
    seen = 0
    for t in gl.static_range(TILES):
        keep = _visible(slot_mask, mask_strides[1], t * BLOCK_M, M, BLOCK_M, gl.SliceLayout(1, loaded))
        if HIDES:
            seen = gl.maximum(seen, gl.max(keep.to(gl.int32), 0))
        _copy_tile(k.index(t), key, t * BLOCK_M, key_strides[2], keep, D, loaded)
        _copy_tile(v.index(t), value, t * BLOCK_M, value_strides[2], keep, D, loaded)
    async_copy.commit_group()
    _copy_tile(q.index(1), query, BLOCK_L, query_strides[2], BLOCK_L + tokens < left, D, loaded)
    async_copy.commit_group()

    zero = gl.zeros([BLOCK_L, BLOCK_M], gl.float32, of_logits)
    lowest = gl.full([BLOCK_L], float("-inf"), gl.float32, logit_rows)
    nothing = gl.zeros([BLOCK_L], gl.float32, logit_rows)
    rows = gl.arange(0, BLOCK_L, gl.SliceLayout(1, stored))
    channels = gl.arange(0, BLOCK_D, gl.SliceLayout(0, stored))
    offsets = rows[:, None] * (H * D) + channels[None, :]

    async_copy.wait_group(1)
    barrier()
    s = warpgroup_mma(q.index(0), k.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, [s])
    keep = _visible(slot_mask, mask_strides[1], 0, M, BLOCK_M, logit_slots)
    p, top, total, shrink = _weigh(s, keep, lowest, nothing, log2_scale, HIDES)
    weights = gl.convert_layout(p.to(dtype), of_weights)
    for tile in range(0, (left + BLOCK_L - 1) // BLOCK_L):
        first = tile * BLOCK_L
        acc = gl.zeros([BLOCK_L, BLOCK_D], gl.float32, of_output)
        if TILES > 1:
            barrier()  # here, or the compiler puts one between tiles of slots
        for i in range(1, TILES):
            s_next = warpgroup_mma(q.index(tile % 2), k.index(i).permute((1, 0)), zero, use_acc=False, is_async=True)
            summed = warpgroup_mma(weights, v.index(i - 1), acc, is_async=True)
            s = warpgroup_mma_wait(1, [s_next])
            keep = _visible(slot_mask, mask_strides[1], i * BLOCK_M, M, BLOCK_M, logit_slots)
            p, top, total, shrink = _weigh(s, keep, top, total, log2_scale, HIDES)
            weights = gl.convert_layout(p.to(dtype), of_weights)
            if first < left:  # always, which the compiler cannot know: it must not move the wait before the softmax
                warpgroup_mma_wait(0, [top])
            acc = warpgroup_mma_wait(0, [summed]) * gl.convert_layout(shrink, output_rows)[:, None]

        async_copy.wait_group(0)
        barrier()
        # after the last tokens old ones follow, whose weights nobody takes
        s_next = warpgroup_mma(q.index((tile + 1) % 2), k.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
        summed = warpgroup_mma(weights, v.index(TILES - 1), acc, use_acc=TILES > 1, is_async=True)
        ahead = first + 2 * BLOCK_L
        if ahead < left:
            _copy_tile(q.index(tile % 2), query, ahead, query_strides[2], ahead + tokens < left, D, loaded)
        async_copy.commit_group()
        s = warpgroup_mma_wait(1, [s_next])
        inv_total = 1.0 / total
        if slot_mask is not None:
            inv_total = gl.where(seen > 0, inv_total, 0.0)
        if log_sum_exp is not None:
            lse = top + gl.log2(total) / log2_scale
            if HIDES:
                lse = gl.where(seen > 0, lse, 0.0)
            else:  # here, or below beside the output: where it took less time
                _store_rows(log_sum_exp, first, left, lse)
        keep = _visible(slot_mask, mask_strides[1], 0, M, BLOCK_M, logit_slots)
        p, top, total, shrink = _weigh(s, keep, lowest, nothing, log2_scale, HIDES)
        weights = gl.convert_layout(p.to(dtype), of_weights)
        if first < left:  # always, as above
            out = warpgroup_mma_wait(0, [summed]) * gl.convert_layout(inv_total, output_rows)[:, None]
            rounded = out.to(dtype)
            keep_rows = (first + rows < left)[:, None] & (channels < D)[None, :]
            offset = first.to(gl.int64) * (H * D)
            gl.store(output + offset + offsets, gl.convert_layout(rounded, stored), mask=keep_rows)
            if log_sum_exp is not None:
                if HIDES:
                    _store_rows(log_sum_exp, first, left, lse)
            if rounding is not None:
                if HIDES:  # as in `forward.py`: there the product is not fused with the difference
                    out = gl.where(seen > 0, out, 0.0)
                lost = (out - rounded.to(gl.float32)).to(dtype)
                gl.store(rounding + offset + offsets, gl.convert_layout(lost, stored), mask=keep_rows)
