"""Attention by tiles, as the fused kernels compute it, with faults that such kernels have had to be switched on.

Everything is in float64, rounded only where a kernel rounds: what is wrong is the fault alone.
"""

import torch

from memformer_kernels.testing import Case, Result, cotangent, to_float64

TILE = 16
FORWARD = (
    "last tile not read",
    "first key of each tile not read",
    "mask of the next row",
    "mask one key late",
    "padding counted",
    "accumulator not rescaled",
    "total not rescaled",
    "divided by the last tile's total",
    "weights in bfloat16",
    "operands in TF32",
    "accumulated in the storage dtype",
    "scale of the padded width",
    "values of the next head",
)
BACKWARD = (
    "no delta",
    "delta of the next row",
    "delta of the last tile",
    "no scale in the gradient of the query",
    "no scale in the gradient of the keys",
    "weights not normalised",
    "log-sum-exp in 16 bits",
    "gradient in bfloat16",
    "last rows left out of the keys' gradient",
    "hidden keys get a gradient",
)
# what kernels of other dtypes may do
FAULT_OF = {
    "operands in TF32": (torch.float32,),
    "weights in bfloat16": (torch.float32, torch.float16),
    "gradient in bfloat16": (torch.float32, torch.float16),
}
OWN = ("no own entry", "own entry in every tile", "no own key in the gradient of the query", "own entry not in delta")


def faulty(case: Case, fault: str | None) -> Result:
    """What a kernel with this fault gives for a masked `memory_read`, or a `memory_write` without bias."""
    is_write = case.op == "memory_write"
    t = case.map(to_float64).tensors
    q, k, v = t["query"], t["key"], t["value"]
    dtype, grad = case.tensors["query"].dtype, to_float64(cotangent(case))
    width, heads = q.shape[-1], q.shape[1]
    scale = case.options.get("scale", width**-0.5) / case.options.get("temperature", 1.0)
    visible = t["token_mask" if is_write else "slot_mask"]

    def split(merged):
        return merged.unflatten(-1, (heads, width)).transpose(1, 2)

    def merge(split):
        return split.transpose(1, 2).flatten(-2)

    if is_write:
        own_key, own, grad = t["own_key"], split(t["slots"]), split(grad)
    if fault == "mask of the next row":
        visible = visible.roll(1, 0)
    if fault == "mask one key late":
        visible = visible.roll(1, 1)
    if fault == "scale of the padded width":
        scale *= (width / 32) ** 0.5
    if fault == "values of the next head":
        v = v.roll(1, 1)
    if fault == "operands in TF32":
        q, k, v, grad = (_bits(x, 11) for x in (q, k, v, grad))
    if fault == "gradient in bfloat16":
        grad = _bits(grad, 8)

    visible = visible[:, None, None, :]
    if fault == "padding counted":
        k, v, visible = _pad(k, 2), _pad(v, 2), torch.nn.functional.pad(visible, (0, 1), value=True)
    keys = k.shape[2]
    tiles = [list(range(i, min(i + TILE, keys))) for i in range(0, keys, TILE)]
    if fault == "last tile not read":
        tiles = tiles[:-1]
    if fault == "first key of each tile not read":
        tiles = [tile[1:] for tile in tiles]

    s = (scale * q @ k.mT).masked_fill(~visible, -torch.inf)
    if is_write and fault != "no own entry":
        s0 = scale * (q * own_key).sum(-1, keepdim=True)
        top, total, acc = s0, torch.ones_like(s0), own.clone()
    else:
        s0 = torch.full_like(q[..., :1], -torch.inf)
        top, total, acc = s0, torch.zeros_like(s0), torch.zeros_like(q)
    for tile in tiles:
        new_top = torch.maximum(top, s[..., tile].amax(-1, keepdim=True))
        at = new_top.masked_fill(new_top == -torch.inf, 0)
        shrink, weights = (top - at).exp(), (s[..., tile] - at).exp()
        total = total * (1 if fault == "total not rescaled" else shrink) + weights.sum(-1, keepdim=True)
        if fault == "divided by the last tile's total":
            total = weights.sum(-1, keepdim=True).clamp(min=1e-3)
        if fault == "weights in bfloat16":
            weights = _bits(weights, 8)
        acc = acc * (1 if fault == "accumulator not rescaled" else shrink)
        if fault == "accumulated in the storage dtype":
            for place, key in enumerate(tile):
                acc = (acc + weights[..., place, None] * v[:, :, None, key]).to(_narrower(dtype)).double()
        else:
            acc = acc + weights @ v[:, :, tile]
        if fault == "own entry in every tile":
            acc, total = acc + (s0 - at).exp() * own, total + (s0 - at).exp()
        top = new_top
    y = acc / total
    lse = top + total.log()
    if fault == "log-sum-exp in 16 bits":
        lse = lse.to(torch.bfloat16).double()
    if fault == "weights not normalised":
        lse = top

    p, dp = (s - lse).exp(), grad @ v.mT
    delta = (grad * y).sum(-1, keepdim=True)
    p0 = (s0 - lse).exp()
    if fault == "no delta":
        delta = torch.zeros_like(delta)
    if fault == "delta of the next row":
        delta = delta.roll(1, 2)
    if fault == "delta of the last tile":
        delta = (p * dp)[..., tiles[-1]].sum(-1, keepdim=True)
    if fault == "own entry not in delta":
        delta = delta - p0 * (grad * own).sum(-1, keepdim=True)
    ds = p * (dp - delta)
    rows = q.shape[2] - 3 if fault == "last rows left out of the keys' gradient" else q.shape[2]
    grads = {
        "query": ds @ k * (1 if fault == "no scale in the gradient of the query" else scale),
        "key": ds[:, :, :rows].mT @ q[:, :, :rows] * (1 if fault == "no scale in the gradient of the keys" else scale),
        "value": p[:, :, :rows].mT @ grad[:, :, :rows],
    }
    if fault == "hidden keys get a gradient":
        grads["key"] = grads["key"] + 1e-3 * ~visible.mT
    if fault == "padding counted":
        grads |= {name: grads[name][:, :, :-1] for name in ("key", "value")}
    if fault == "values of the next head":
        grads["value"] = grads["value"].roll(-1, 1)
    if is_write:
        ds0 = scale * p0 * ((grad * own).sum(-1, keepdim=True) - delta)
        if fault != "no own key in the gradient of the query":
            grads["query"] = grads["query"] + ds0 * own_key
        grads |= {"own_key": ds0 * q, "slots": merge(p0 * grad)}
        y = merge(y)
    return Result(y, grads)


def _pad(keys, dim):
    return torch.cat([keys, torch.zeros_like(keys.narrow(dim, 0, 1))], dim)


def _narrower(dtype):
    return torch.float16 if dtype == torch.float32 else dtype


def _bits(x, bits):
    """Rounded to this many bits of significand, the leading one included."""
    fraction, exponent = torch.frexp(x)
    return torch.ldexp((fraction * 2**bits).round() / 2**bits, exponent)
