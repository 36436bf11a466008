"""What Triton kernels of several ops share: tiles, steps of attention, normalisation, sums of partial results.

Logits are kept as the matrix product gives them, and scaled after the maximum is taken from them: the largest weight
is then exactly exp2(0) = 1, however large the logits are. `scale` is that of the logits times log2(e).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

LOG2_E = 1.4426950408889634


@triton.jit
def wait_for_kernels_before(OVERLAPS: tl.constexpr):
    """How a kernel begins that may be launched while the one before it ends: nothing is read or written sooner."""
    if OVERLAPS:
        gdc_wait()


@triton.jit
def at_head(base, batch, head, strides):
    """Where the rows of one head begin in a [B, H, rows, D]; `batch` is an int64."""
    return base + batch * strides[0] + head.to(tl.int64) * strides[1]


@triton.jit
def load_tile(base, rows, row_stride, channel_stride, keep, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] of a matrix with D channels. Rows where `keep` is false are never read; these, and the channels
    from D on, are 0. `keep` None reads every row."""
    channels = tl.arange(0, BLOCK_D)
    # 64 bits: a view may stride over more than 2^31 elements
    pointers = base + rows.to(tl.int64)[:, None] * row_stride + channels.to(tl.int64)[None, :] * channel_stride
    if keep is None:
        if BLOCK_D == D:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(channels < D)[None, :], other=0.0)
    else:
        if BLOCK_D == D:
            tile = tl.load(pointers, mask=keep[:, None], other=0.0)
        else:
            tile = tl.load(pointers, mask=keep[:, None] & (channels < D)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(base, rows, row_stride, tile, keep, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores [rows, BLOCK_D] where `keep`, in the dtype of `base`, at unit channel stride."""
    channels = tl.arange(0, BLOCK_D)
    pointers = base + rows.to(tl.int64)[:, None] * row_stride + channels[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=keep[:, None] & (channels < D)[None, :])


@triton.jit
def load_mask(mask, rows, stride, count):
    """Which of `rows` are below `count` and, where a mask is given, visible. None `mask` hides nothing."""
    keep = rows < count
    if mask is not None:
        keep = tl.load(mask + rows.to(tl.int64) * stride, mask=keep, other=0).to(tl.int1)
    return keep


@triton.jit
def attend(query, key, value, keep, top, total, acc, scale, PRECISION: tl.constexpr):
    """One tile of keys of the online softmax: the new (top, total, acc) of each query row.

    top: largest logit so far, unscaled; total: sum of the weights relative to it; acc: sum of weight * value.
    """
    logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    if keep is not None:
        logits = tl.where(keep[None, :], logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    reference = tl.where(new_top == float("-inf"), 0.0, new_top)  # nothing visible so far: weights of 0, not NaN
    shrink = tl.exp2((top - reference) * scale)
    weights = tl.exp2((logits - reference[:, None]) * scale)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
    return new_top, total, acc


@triton.jit
def merge(top, total, acc, next_top, next_total, next_acc, scale):
    """Two states of the online softmax, each of keys of its own, as one. What saw no key changes no bit of the other.

    Multiply-adds are fused by name: the same bits in whichever kernel this stands.
    """
    new_top = tl.maximum(top, next_top)
    reference = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = tl.exp2((top - reference) * scale)
    next_shrink = tl.exp2((next_top - reference) * scale)
    total = tl.fma(total, shrink, next_total * next_shrink)
    merged = tl.fma(acc, tl.broadcast_to(shrink[:, None], acc.shape), next_acc * next_shrink[:, None])
    merged = tl.where((next_top == float("-inf"))[:, None], acc, merged)  # saw nothing: exact to the sign of zero
    return new_top, total, tl.where((top == float("-inf"))[:, None], next_acc, merged)


@triton.jit
def normalise(z, eps, inv_eps):
    """`(unit, inv_norm)` of all of `z`, as `ops/normalisation.py` defines them; `inv_norm` is a scalar.

    Squares are taken of z over a power of two near its largest entry: that is exact, and they can neither overflow nor
    vanish.
    """
    exponent = tl.max(tl.max(tl.abs(z), 1), 0).to(tl.int32, bitcast=True) & 0x7F800000
    exponent = tl.minimum(tl.maximum(exponent, 0x00800000), 0x7E800000)  # 2^-126 to 2^126: both inverses are normal
    power = exponent.to(tl.float32, bitcast=True)
    inv_power = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    scaled = z * inv_power
    norm = tl.sqrt_rn(tl.sum(tl.sum(scaled * scaled, 1), 0))
    at_floor = norm * power <= eps
    inverse = tl.div_rn(1.0, tl.where(at_floor, 1.0, norm))
    unit = tl.where(at_floor, z * inv_eps, scaled * inverse)
    return unit, tl.where(at_floor, inv_eps, inverse * inv_power)


@triton.jit
def normalise_backward(grad, z, inv_norm, inv_eps):
    """Gradient of `z` through `normalise`."""
    unit = z * inv_norm
    along = tl.sum(tl.sum(unit * grad, 1), 0)
    along = tl.where(inv_norm >= inv_eps, 0.0, along)  # at the floor the norm is a constant
    return inv_norm * (grad - unit * along)


@triton.jit
def sum_partials_kernel(partial, target, parts, size, BLOCK: tl.constexpr, OVERLAPS: tl.constexpr):
    """target[i] = sum over p of partial[p, i], always in the same order."""
    wait_for_kernels_before(OVERLAPS)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keep = offsets < size
    total = tl.zeros([BLOCK], tl.float32)
    for _ in tl.range(0, parts, num_stages=5):  # four loads under way at a time
        total += tl.load(partial + offsets, mask=keep, other=0.0, eviction_policy="evict_first")
        partial += size
    tl.store(target + offsets, total.to(target.dtype.element_ty), mask=keep)
