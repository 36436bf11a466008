"""Parameters' gradients of many products at once: in a segment of few tokens, each alone is a launch that fills a part
of the GPU.

    total += grad' input    [N, K], of grad [rows, N] and input [rows, K]
    total += column sums    [C], of terms [rows, C]

All problems of a launch have the same number of rows, one dtype, and totals of their own. A program finds its problem
by its number, takes one tile of it, and adds the rows up in order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from memformer_kernels import launch, tiles
from memformer_kernels.triton_helpers import wait_for_kernels_before

MOST_WORK = 2**32  # multiplications of a product, which with more fills the GPU alone
MOST_ROWS = 4096  # of a column sum, likewise

# Measured on an H200: 24 products of a segment of 1,024 rows and width 512 in 84 us, one by one in 145; of 256 rows 53
# and 112
PRODUCT_TILES = {90: {"BLOCK_N": 128, "BLOCK_K": 128, "BLOCK_R": 64, "num_warps": 4, "num_stages": 3}}
ANY_PRODUCT_TILE = {"BLOCK_N": 128, "BLOCK_K": 64, "BLOCK_R": 64, "num_warps": 4, "num_stages": 3}
SUM_TILE = {"BLOCK": 32, "ROWS": 64, "num_warps": 8}


@triton.jit
def _select(program, first: tl.constexpr, chosen, other):
    """`chosen` for programs from `first` on."""
    return tl.where(program >= first, chosen, other)


@triton.jit(do_not_specialize=["rows"])
def _grouped_products_kernel(
    grads,  # of each problem [rows, N], 16 bits, as all tensors here contiguous
    inputs,  # [rows, K]
    totals,  # [N, K] float32
    rows,
    SIZES: tl.constexpr,  # of each problem N, K and the number of its first program
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_kernels_before(OVERLAPS)
    program = tl.program_id(0)
    grad, x, total = grads[0].to(tl.int64), inputs[0].to(tl.int64), totals[0].to(tl.int64)
    N, K, first = program * 0 + SIZES[0][0], program * 0 + SIZES[0][1], program * 0
    for i in tl.static_range(1, len(SIZES)):
        grad = _select(program, SIZES[i][2], grads[i].to(tl.int64), grad)
        x = _select(program, SIZES[i][2], inputs[i].to(tl.int64), x)
        total = _select(program, SIZES[i][2], totals[i].to(tl.int64), total)
        N = _select(program, SIZES[i][2], SIZES[i][0], N)
        K = _select(program, SIZES[i][2], SIZES[i][1], K)
        first = _select(program, SIZES[i][2], SIZES[i][2], first)
    # 16 bytes at a time
    N, K = tl.multiple_of(N, 8), tl.multiple_of(K, 8)
    grad = tl.multiple_of(grad.to(grads[0].dtype), 16)
    x = tl.multiple_of(x.to(inputs[0].dtype), 16)
    total = tl.multiple_of(total.to(totals[0].dtype), 16)

    blocks = tl.cdiv(K, BLOCK_K)
    tile = program - first
    n = tile // blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tile % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    product = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, rows, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        inside = (row < rows)[:, None]
        g = tl.load(grad + row[:, None] * N + n[None, :], mask=inside & (n < N)[None, :], other=0.0)
        value = tl.load(x + row[:, None] * K + k[None, :], mask=inside & (k < K)[None, :], other=0.0)
        product = tl.dot(tl.trans(g), value, product)
    places = total + n.to(tl.int64)[:, None] * K + k[None, :]
    inside = (n < N)[:, None] & (k < K)[None, :]
    tl.store(places, tl.load(places, mask=inside, other=0.0) + product, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _grouped_column_sums_kernel(
    terms,  # of each problem [rows, C]
    totals,  # [C] float32
    rows,
    SIZES: tl.constexpr,  # of each problem C, the stride of its rows and the number of its first program
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    wait_for_kernels_before(OVERLAPS)
    program = tl.program_id(0)
    x, total = terms[0].to(tl.int64), totals[0].to(tl.int64)
    C, stride, first = program * 0 + SIZES[0][0], program * 0 + SIZES[0][1], program * 0
    for i in tl.static_range(1, len(SIZES)):
        x = _select(program, SIZES[i][2], terms[i].to(tl.int64), x)
        total = _select(program, SIZES[i][2], totals[i].to(tl.int64), total)
        C = _select(program, SIZES[i][2], SIZES[i][0], C)
        stride = _select(program, SIZES[i][2], SIZES[i][1], stride)
        first = _select(program, SIZES[i][2], SIZES[i][2], first)
    C, stride = tl.multiple_of(C, 8), tl.multiple_of(stride, 8)
    x = tl.multiple_of(x.to(terms[0].dtype), 16)
    total = tl.multiple_of(total.to(totals[0].dtype), 16)

    column = (program - first) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < C)[None, :]
        places = row.to(tl.int64)[:, None] * stride + column[None, :]
        sums += tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    before = tl.load(total + column, mask=column < C, other=0.0)
    tl.store(total + column, before + tl.sum(sums, 0), mask=column < C)


@launch.planned
def _products_plan(rows: int, shapes: tuple, dtype: torch.dtype, device: torch.device) -> launch.Launcher:
    tile = PRODUCT_TILES.get(tiles.architecture(device), ANY_PRODUCT_TILE)
    sizes, programs = [], 0
    for n, k in shapes:
        sizes.append((n, k, programs))
        programs += -(-n // tile["BLOCK_N"]) * -(-k // tile["BLOCK_K"])
    return launch.Launcher(_grouped_products_kernel, programs, (rows,), SIZES=tuple(sizes), **tile)


@launch.planned
def _column_sums_plan(rows: int, shapes: tuple, dtype: torch.dtype, device: torch.device) -> launch.Launcher:
    sizes, programs = [], 0
    for width, stride in shapes:
        sizes.append((width, stride, programs))
        programs += -(-width // SUM_TILE["BLOCK"])
    return launch.Launcher(_grouped_column_sums_kernel, programs, (rows,), SIZES=tuple(sizes), **SUM_TILE)


def products(problems: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    """`total += grad' input` for every `(grad, input, total)`, of one number of rows."""
    grads, inputs, totals = zip(*problems, strict=True)
    shapes = tuple(tuple(total.shape) for total in totals)
    _products_plan(len(grads[0]), shapes, grads[0].dtype, grads[0].device)(grads, inputs, totals)


def column_sums(problems: Sequence[tuple[Tensor, Tensor]]) -> None:
    """`total += terms.sum(0)` for every `(terms, total)`, of one number of rows."""
    terms, totals = zip(*problems, strict=True)
    shapes = tuple((x.shape[1], x.stride(0)) for x in terms)
    _column_sums_plan(len(terms[0]), shapes, terms[0].dtype, terms[0].device)(terms, totals)


def product_takes(grad: Tensor, x: Tensor, total: Tensor) -> bool:
    """Whether the product may wait for others: 16 bits, little work, 16 bytes at a time."""
    same = grad.dtype == x.dtype and grad.dtype.itemsize == 2
    little = 0 < len(grad) * total.numel() <= MOST_WORK
    wide = total.dtype == torch.float32
    return same and little and wide and all(t.is_contiguous() and _aligned(t) for t in (grad, x, total))


def sums_take(terms: Tensor, totals: Sequence[Tensor | None]) -> bool:
    """Whether the column sums of terms [rows, n, C] may wait for others, each for its total."""
    if any(total is None or total.dtype != torch.float32 for total in totals) or not 0 < len(terms) <= MOST_ROWS:
        return False
    return terms.stride()[1:] == (terms.shape[2], 1) and all(map(_aligned, (terms, *totals)))


def _aligned(tensor: Tensor) -> bool:
    """Rows begin at 16 bytes, for elements of 2 bytes and more."""
    return tensor.data_ptr() % 16 == 0 and tensor.shape[-1] % 8 == 0 and all(s % 8 == 0 for s in tensor.stride()[:-1])
