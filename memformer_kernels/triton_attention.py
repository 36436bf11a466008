"""Backward of attention over any number of rows and keys, which `memory_read` and `memory_write` share when the slots
do not fit one tile.

s = query @ key^T    p = exp2(log2_scale * (s - lse))    ds = p * (grad @ value^T - delta)
grad_query = scale * ds @ key   grad_key = scale * ds^T @ query   grad_value = p^T @ grad   delta = rowdot(grad, output)

Two kernels, each with its own side resident and the other streaming past, compute p and ds twice between them: seven
products a tile instead of five, but no sum over memory, no atomics, and a program for every tile of either side.
`log_sum_exp` is that of the scaled logits, over the scale.
"""

import triton
import triton.language as tl

from memformer_kernels.triton_helpers import at_head, load_mask, load_tile, store_tile, wait_for_kernels_before


@triton.jit(do_not_specialize=["rows", "keys", "H", "chunk", "part_rows"])
def attention_backward_rows_kernel(
    grad,  # [B, H, rows, D]: of the output
    output,  # [B, H, rows, D]; or None: delta is given
    rounding,  # [B, rows, H, D], contiguous, or None: what was rounded off the output
    query,  # [B, H, rows, D]
    key,  # [B, H, keys, D]
    value,  # [B, H, keys, D]
    mask,  # [B, keys] or None
    log_sum_exp,  # [B, H, rows] float32
    delta,  # [B, H, rows] float32: written where output is given
    grad_query,  # [chunks, B, rows, H, D], contiguous
    grad_strides,
    output_strides,
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    log2_scale,  # scale * log2(e)
    scale,
    rows,
    keys,
    H,
    chunk,  # keys of one program
    part_rows,  # B * rows * H
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALL_KEYS: tl.constexpr,  # keys is a multiple of BLOCK_KEYS and there is no mask
    PRECISION: tl.constexpr,
    num_stages: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_kernels_before(OVERLAPS)
    tiles = tl.cdiv(rows, BLOCK_ROWS)
    chunks = tl.cdiv(keys, chunk)
    row = tl.program_id(0) % tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    part = tl.program_id(0) // tiles % chunks
    head = tl.program_id(0) // tiles // chunks % H
    batch = (tl.program_id(0) // tiles // chunks // H).to(tl.int64)
    grad = at_head(grad, batch, head, grad_strides)
    query = at_head(query, batch, head, query_strides)
    key = at_head(key, batch, head, key_strides)
    value = at_head(value, batch, head, value_strides)
    log_sum_exp += (batch * H + head) * rows
    delta += (batch * H + head) * rows
    grad_query += (part.to(tl.int64) * part_rows + batch * rows * H + head) * D
    if mask is not None:
        mask += batch * mask_strides[0]

    inside = row < rows
    # past the end the last row is read again, with a gradient of 0
    safe_row = tl.minimum(row, rows - 1)
    q = load_tile(query, safe_row, query_strides[2], query_strides[3], None, D, BLOCK_D)
    g = load_tile(grad, row, grad_strides[2], grad_strides[3], inside, D, BLOCK_D)
    lse = tl.load(log_sum_exp + safe_row)
    if output is None:
        d = tl.load(delta + row, mask=inside, other=0.0)
    else:
        output = at_head(output, batch, head, output_strides)
        out = load_tile(output, row, output_strides[2], output_strides[3], inside, D, BLOCK_D)
        out = out.to(tl.float32)
        if rounding is not None:
            # a delta of 16 bits would cost the gradient more accuracy than all else
            rounding += (batch * rows * H + head) * D
            out += load_tile(rounding, row, H * D, 1, inside, D, BLOCK_D).to(tl.float32)
        d = tl.sum(g.to(tl.float32) * out, 1)
        tl.store(delta + row, d, mask=inside)
    dq = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for start in tl.range(part * chunk, min((part + 1) * chunk, keys), BLOCK_KEYS, num_stages=num_stages):
        key_rows = start + tl.arange(0, BLOCK_KEYS)
        visible = None
        if not ALL_KEYS:
            visible = load_mask(mask, key_rows, mask_strides[1], keys)
        k = load_tile(key, key_rows, key_strides[2], key_strides[3], visible, D, BLOCK_D)
        v = load_tile(value, key_rows, value_strides[2], value_strides[3], visible, D, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(g, tl.trans(v), input_precision=PRECISION)
        p = tl.exp2((s - lse[:, None]) * log2_scale)
        ds = p * (dp - d[:, None])
        if not ALL_KEYS:
            ds = tl.where(visible[None, :], ds, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    store_tile(grad_query, row, H * D, dq * scale, inside, D, BLOCK_D)


@triton.jit(do_not_specialize=["rows", "keys", "H", "chunk", "part_rows"])
def attention_backward_keys_kernel(
    grad,  # [B, H, rows, D]: of the output
    query,  # [B, H, rows, D]
    key,  # [B, H, keys, D]
    value,  # [B, H, keys, D]
    mask,  # [B, keys] or None
    log_sum_exp,  # [B, H, rows] float32
    delta,  # [B, H, rows] float32
    grad_key,  # [chunks, B, keys, H, D], contiguous
    grad_value,  # [chunks, B, keys, H, D], contiguous
    grad_strides,
    query_strides,
    key_strides,
    value_strides,
    mask_strides,
    log2_scale,  # scale * log2(e)
    scale,
    rows,
    keys,
    H,
    chunk,  # rows of one program
    part_rows,  # B * keys * H
    D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALL_KEYS: tl.constexpr,  # keys is a multiple of BLOCK_KEYS and there is no mask
    PRECISION: tl.constexpr,
    num_stages: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_kernels_before(OVERLAPS)
    tiles = tl.cdiv(keys, BLOCK_KEYS)
    chunks = tl.cdiv(rows, chunk)
    key_rows = tl.program_id(0) % tiles * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    part = tl.program_id(0) // tiles % chunks
    head = tl.program_id(0) // tiles // chunks % H
    batch = (tl.program_id(0) // tiles // chunks // H).to(tl.int64)
    grad = at_head(grad, batch, head, grad_strides)
    query = at_head(query, batch, head, query_strides)
    key = at_head(key, batch, head, key_strides)
    value = at_head(value, batch, head, value_strides)
    log_sum_exp += (batch * H + head) * rows
    delta += (batch * H + head) * rows
    grad_key += (part.to(tl.int64) * part_rows + batch * keys * H + head) * D
    grad_value += (part.to(tl.int64) * part_rows + batch * keys * H + head) * D
    if mask is not None:
        mask += batch * mask_strides[0]

    visible = None
    if not ALL_KEYS:
        visible = load_mask(mask, key_rows, mask_strides[1], keys)
    k = load_tile(key, key_rows, key_strides[2], key_strides[3], visible, D, BLOCK_D)
    v = load_tile(value, key_rows, value_strides[2], value_strides[3], visible, D, BLOCK_D)
    dk = tl.zeros([BLOCK_KEYS, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_KEYS, BLOCK_D], tl.float32)
    for start in tl.range(part * chunk, min((part + 1) * chunk, rows), BLOCK_ROWS, num_stages=num_stages):
        row = start + tl.arange(0, BLOCK_ROWS)
        inside = row < rows
        # past the end the last row is read again, with a gradient of 0
        safe_row = tl.minimum(row, rows - 1)
        q = load_tile(query, safe_row, query_strides[2], query_strides[3], None, D, BLOCK_D)
        g = load_tile(grad, row, grad_strides[2], grad_strides[3], inside, D, BLOCK_D)
        lse = tl.load(log_sum_exp + safe_row)
        d = tl.load(delta + row, mask=inside, other=0.0)
        # transposed, [keys, rows]: as it comes from the product it is an operand of the next
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(g), input_precision=PRECISION)
        p = tl.exp2((s - lse[None, :]) * log2_scale)
        ds = p * (dp - d[None, :])
        dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(k.dtype), q, dk, input_precision=PRECISION)
    dk *= scale
    if not ALL_KEYS:
        dk = tl.where(visible[:, None], dk, 0.0)
        dv = tl.where(visible[:, None], dv, 0.0)
    store_tile(grad_key, key_rows, H * D, dk, key_rows < keys, D, BLOCK_D)
    store_tile(grad_value, key_rows, H * D, dv, key_rows < keys, D, BLOCK_D)
