"""Residual addition with layer normalisation, and the derivative of GELU, in Triton.

    sum = x + branch     normalised = (sum - mean) / std * weight + bias
    unit = (sum - mean) / std     g = grad_normalised * weight
    grad_x = grad_branch = grad_sum + (g - mean(g) - unit * mean(g * unit)) / std

One program holds rows of channels in registers. The gradients of weight and bias are added up over the rows of a
program, then over the programs, always in the same order. The backwards also make again what the forward did not keep.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from memformer_kernels import launch
from memformer_kernels.triton_helpers import wait_for_kernels_before

MOST_CHANNELS = 8192  # of a row in registers
MOST_PARTS = 512  # terms of the sum over programs
MOST_STAGED_BYTES = 4096  # of a row of which copies are on their way to shared memory
ELEMENTS = 1024  # of a program of GELU and its derivative

# Sums of rows, measured on an H200: programs that add up all rows of a few columns, and, of many rows, so many programs
# that each add up a part
MOST_ROWS = 2048
ALL_ROWS = {"BLOCK": 16, "ROWS": 256, "num_warps": 16}
PART_OF_ROWS = {"BLOCK": 64, "ROWS": 32, "num_warps": 4}
PART_PROGRAMS = 1024


@triton.jit(do_not_specialize=["rows"])
def _residual_norm_forward_kernel(
    x,  # [rows, C], as all tensors here contiguous
    branch,  # [rows, C] or None
    weight,  # [C]
    bias,  # [C] or None
    total,  # [rows, C] or None, x + branch
    normalised,  # [rows, C]
    mean,  # [rows] float32, or None
    inv_std,  # [rows] float32, or None
    eps,
    rows,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_kernels_before(OVERLAPS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (channels < C)[None, :]
    places = row.to(tl.int64)[:, None] * C + channels[None, :]
    value = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    if branch is not None:
        value += tl.load(branch + places, mask=inside, other=0.0).to(tl.float32)
        value = value.to(total.dtype.element_ty)  # what is normalised is what is stored
        tl.store(total + places, value, mask=inside)
        value = value.to(tl.float32)
    middle = tl.sum(value, 1) / C
    centred = tl.where(inside, value - middle[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    if mean is not None:
        tl.store(mean + row, middle, mask=row < rows)
        tl.store(inv_std + row, inverse, mask=row < rows)
    w = tl.load(weight + channels, mask=channels < C, other=0.0).to(tl.float32)
    result = centred * inverse[:, None] * w[None, :]
    if bias is not None:
        result += tl.load(bias + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
    tl.store(normalised + places, result.to(normalised.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "part"])
def _residual_norm_backward_kernel(
    grad_normalised,  # [rows, C]
    grad_total,  # [rows, C] or None
    total,  # [rows, C]
    mean,  # [rows] float32
    inv_std,  # [rows] float32
    weight,  # [C]
    bias,  # [C] or None
    grad_x,  # [rows, C]
    normalised,  # [rows, C] or None, made again
    partial,  # [parts, 2, C] float32
    rows,
    part,  # rows of a program
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_kernels_before(OVERLAPS)
    channels = tl.arange(0, BLOCK_C)
    w = tl.load(weight + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
    if bias is not None and normalised is not None:
        b = tl.load(bias + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]
    grad_weight = tl.zeros([ROWS, BLOCK_C], tl.float32)
    grad_bias = tl.zeros([ROWS, BLOCK_C], tl.float32)
    first = tl.program_id(0) * part
    last = tl.minimum(first + part, rows)
    for start in tl.range(first, last, ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & (channels < C)[None, :]
        places = row.to(tl.int64)[:, None] * C + channels[None, :]
        middle = tl.load(mean + row, mask=row < last, other=0.0)[:, None]
        inverse = tl.load(inv_std + row, mask=row < last, other=0.0)[:, None]
        value = tl.load(total + places, mask=inside, other=0.0).to(tl.float32)
        unit = tl.where(inside, (value - middle) * inverse, 0.0)
        grad = tl.load(grad_normalised + places, mask=inside, other=0.0).to(tl.float32)
        grad_weight += grad * unit
        grad_bias += grad
        g = grad * w
        along = tl.sum(g * unit, 1)[:, None] / C
        result = (g - tl.sum(g, 1)[:, None] / C - unit * along) * inverse
        if grad_total is not None:
            result += tl.load(grad_total + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + places, result.to(grad_x.dtype.element_ty), mask=inside)
        if normalised is not None:
            again = unit * w
            if bias is not None:
                again += b
            tl.store(normalised + places, again.to(normalised.dtype.element_ty), mask=inside)
    places = tl.program_id(0) * 2 * C + channels
    tl.store(partial + places, tl.sum(grad_weight, 0), mask=channels < C)
    tl.store(partial + places + C, tl.sum(grad_bias, 0), mask=channels < C)


@triton.jit
def _normal(h, EXACT: tl.constexpr):
    """`(mass below h, density at h)` of the normal distribution. Where not EXACT, to 3e-7, and the mass far below 0 to
    1e-3 of itself, at half the cost. Source: Abramowitz and Stegun, 7.1.26."""
    density = tl.exp2(h * h * -0.7213475204444817)
    if EXACT:
        below = 0.5 + 0.5 * tl.math.erf(h * 0.7071067811865476)
    else:
        root = tl.rsqrt(1.0 + 0.23164189 * tl.abs(h))
        t = root * root  # a division looks at the range of what it divides by first, in eight instructions
        series = t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
        tail = t * (0.127414796 + series) * density
        below = tl.where(h < 0, tail, 1.0 - tail)
    return below, 0.3989422804014327 * density


@triton.jit
def _gelu_forward_kernel(hidden, activated, size, EXACT: tl.constexpr, ELEMENTS: tl.constexpr, OVERLAPS: tl.constexpr):
    wait_for_kernels_before(OVERLAPS)
    places = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = places < size
    h = tl.load(hidden + places, mask=inside, other=0.0).to(tl.float32)
    below, _ = _normal(h, EXACT)
    tl.store(activated + places, (h * below).to(activated.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_backward_kernel(
    grad,  # [size]
    hidden,  # [size]
    grad_hidden,  # [size]
    activated,  # [size] or None, gelu(hidden) made again
    size,
    EXACT: tl.constexpr,
    ELEMENTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_kernels_before(OVERLAPS)
    places = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = places < size
    h = tl.load(hidden + places, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
    below, density = _normal(h, EXACT)
    tl.store(grad_hidden + places, (g * (below + h * density)).to(grad_hidden.dtype.element_ty), mask=inside)
    if activated is not None:
        tl.store(activated + places, (h * below).to(activated.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "part"])
def _column_sums_kernel(
    x,  # [rows, WIDTH]
    first,  # [parts, SPLIT] float32, sums of the columns before SPLIT
    second,  # [parts, WIDTH - SPLIT] float32, of the others; None where there are none
    row_stride,
    rows,
    part,  # rows of a program
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_kernels_before(OVERLAPS)
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    number = (tl.program_id(0) // blocks).to(tl.int64)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    last = tl.minimum(number.to(tl.int32) * part + part, rows)
    for start in range(number.to(tl.int32) * part, last, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < last)[:, None] & (column < WIDTH)[None, :]
        places = row.to(tl.int64)[:, None] * row_stride + column[None, :]
        total += tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    sums = tl.sum(total, 0)
    first += number * SPLIT + column
    before = column < SPLIT
    if ADD:
        tl.store(first, tl.load(first, mask=before, other=0.0) + sums, mask=before)
    else:
        tl.store(first, sums, mask=before)
    if second is not None:
        second += number * (WIDTH - SPLIT) + column - SPLIT
        after = (column >= SPLIT) & (column < WIDTH)
        if ADD:
            tl.store(second, tl.load(second, mask=after, other=0.0) + sums, mask=after)
        else:
            tl.store(second, sums, mask=after)


def unsupported_reason(x: Tensor) -> str | None:
    if x.shape[-1] > MOST_CHANNELS:
        return f"x must have at most {MOST_CHANNELS} channels, got {x.shape[-1]}"
    return launch.unsupported_reason(x=x)


def row_tile(width: int) -> dict[str, int]:
    """Eight elements, 16 bytes of a 16-bit row, a thread. Not a function of the rows: a row has the same bits in any
    batch."""
    block = triton.next_power_of_2(width)
    rows = max(1, 1024 // block)
    return {"BLOCK_C": block, "ROWS": rows, "num_warps": max(1, min(16, block * rows // 256))}


@launch.planned
def _forward_plan(rows, width, dtypes, parts_given, eps, device) -> launch.Launcher:
    tile = row_tile(width)
    programs = -(-rows // tile["ROWS"])
    return launch.Launcher(_residual_norm_forward_kernel, programs, (eps, rows), C=width, **tile)


def residual_norm_forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype, save: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """`(total, normalised, mean, inv_std)` of contiguous [rows, C]; normalised in `dtype`; the last two with `save`."""
    rows, width = x.shape
    total = x if branch is None else torch.empty_like(x, dtype=torch.promote_types(x.dtype, branch.dtype))
    normalised = torch.empty_like(x, dtype=dtype)
    mean, inv_std = (x.new_empty(rows, dtype=torch.float32) if save else None for _ in range(2))
    if x.numel():
        dtypes = tuple(None if t is None else t.dtype for t in (x, branch, weight, bias, normalised))
        run = _forward_plan(rows, width, dtypes, save, eps, x.device)
        run(x, branch, weight, bias, None if branch is None else total, normalised, mean, inv_std)
    return total, normalised, mean, inv_std


@launch.planned
def _backward_plan(rows, width, dtypes, device) -> tuple[int, launch.Launcher]:
    # a row in one warp, 32 channels a thread: its sums need no shared memory, which costs more than the loads
    block = triton.next_power_of_2(width)
    tile = {"BLOCK_C": block, "ROWS": 1, "num_warps": max(1, block // 1024)}
    # the next rows come while one is computed: 45 us for 50 of 16,384 rows of 1,024 channels
    tile["STAGES"] = 3 if block * dtypes[2].itemsize <= MOST_STAGED_BYTES else 1
    part = max(2, -(-rows // MOST_PARTS))
    parts = -(-rows // part)
    return parts, launch.Launcher(_residual_norm_backward_kernel, parts, (rows, part), C=width, **tile)


def residual_norm_backward(
    grad_normalised: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    again: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """`(grad_x, normalised, partial)`: the second with `again`; the third [parts, 2, C] in float32, whose sum over the
    parts is the gradient of weight and bias."""
    rows, width = total.shape
    grad_x = torch.empty_like(total)
    normalised = torch.empty_like(grad_normalised) if again else None
    if not total.numel():
        return grad_x, normalised, total.new_zeros(1, 2, width, dtype=torch.float32)
    given = grad_normalised, grad_total, total, mean, inv_std, weight, bias
    dtypes = tuple(None if t is None else t.dtype for t in (*given, normalised))
    parts, run = _backward_plan(rows, width, dtypes, total.device)
    partial = total.new_empty(parts, 2, width, dtype=torch.float32)
    run(*given, grad_x, normalised, partial)
    return grad_x, normalised, partial


@launch.planned
def _gelu_plan(kernel, size, dtypes, device) -> launch.Launcher:
    exact = dtypes[0].itemsize > 2
    programs = triton.cdiv(size, ELEMENTS)
    return launch.Launcher(kernel, programs, (size,), EXACT=exact, ELEMENTS=ELEMENTS, num_warps=4)


def gelu_forward(hidden: Tensor) -> Tensor:
    """gelu(hidden) of a contiguous tensor."""
    activated = torch.empty_like(hidden)
    if hidden.numel():
        _gelu_plan(_gelu_forward_kernel, hidden.numel(), (hidden.dtype,), hidden.device)(hidden, activated)
    return activated


def gelu_backward(grad: Tensor, hidden: Tensor, again: bool) -> tuple[Tensor, Tensor | None]:
    """`(grad_hidden, gelu(hidden))` of contiguous tensors; the second with `again`, the bits of the forward's."""
    grad_hidden = torch.empty_like(hidden)
    activated = torch.empty_like(hidden) if again else None
    if hidden.numel():
        dtypes = hidden.dtype, grad.dtype, again
        run = _gelu_plan(_gelu_backward_kernel, hidden.numel(), dtypes, hidden.device)
        run(grad, hidden, grad_hidden, activated)
    return grad_hidden, activated


@launch.planned
def _column_sums_plan(rows, part, row_stride, width, split, add, kinds, device) -> launch.Launcher:
    tile = PART_OF_ROWS if part < rows else ALL_ROWS
    programs = -(-rows // part) * -(-width // tile["BLOCK"])
    arguments = row_stride, rows, part
    return launch.Launcher(_column_sums_kernel, programs, arguments, WIDTH=width, SPLIT=split, ADD=add, **tile)


def column_sums(x: Tensor, *totals: Tensor | None) -> tuple[Tensor | None, ...]:
    """`x.sum(0)` of x [rows, n, C], n 1 or 2, as n float32 tensors [C], always added up in the same order. Where there
    is a total [C] in float32, they are added to that, and None stands in their place."""
    if x.stride(2) != 1 or x.stride(1) != x.shape[2]:
        x = x.contiguous()
    rows, count, width = x.shape
    if rows > MOST_ROWS:
        whole = count * width
        part = -(-rows // max(2, PART_PROGRAMS // -(-whole // PART_OF_ROWS["BLOCK"])))
        partial = x.new_empty(-(-rows // part), count, width, dtype=torch.float32)
        _column_sums_plan(rows, part, x.stride(0), whole, whole, False, x.dtype, x.device)(x, partial, None)
        x, rows = partial, partial.shape[0]
    add = any(total is not None for total in totals)
    sums = [x.new_zeros(width, dtype=torch.float32) if total is None else total for total in totals]
    kinds = x.dtype, count
    run = _column_sums_plan(rows, max(rows, 1), x.stride(0), count * width, width, add, kinds, x.device)
    run(x, *sums, *[None] * (2 - count))
    return tuple(new if total is None else None for new, total in zip(sums, totals, strict=True))
