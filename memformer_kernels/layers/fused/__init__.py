"""What stands between the attentions of a layer, fused where Triton runs, in PyTorch elsewhere.

    embed(tokens, embedding, position, None)    = embedding(tokens) + position(0, 1, ...)
    linear(x, f)                                = f(x)
    linears(x, f, g)                            = f(x), g(x)
    gelu_linear(hidden, f)                      = f(gelu(hidden))
    self_attention(projected, heads)            = attention of query, key, value = projected.chunk(3, -1)
    residual_norm(x, branch, norm)              = x + branch, norm(x + branch)
    residual_norm_linear(x, branch, norm, f)    = x + branch, f(norm(x + branch))

A transformer's layer is these and attention to another sequence. Fused, they take fewer kernels, and their backwards
compute again what is cheap instead of keeping it: `recompute="none"` keeps it.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

try:
    from memformer_kernels.layers.fused import functions, segment_attention
    from memformer_kernels.layers.fused.triton import unsupported_reason
except ImportError:  # no Triton
    functions = None

MOST_WORDS = 1024  # of a vocabulary whose gradient is a matrix product, with a column for each; and 4 for a channel


def embed(tokens: Tensor, embedding: nn.Embedding, position: nn.Embedding, positions: Tensor | None) -> Tensor:
    """Of tokens [B, L], and positions [B, L] or None, which count from 0, to [B, L, C]."""
    words, places = embedding.weight, position.weight
    alike = words.dtype == places.dtype and words.dtype.itemsize == 2 and tokens.device == words.device
    whole = words.is_contiguous() and places.is_contiguous()
    few = len(words) <= min(MOST_WORDS, 4 * words.shape[1])
    if positions is None and alike and whole and few and _fuses(words):
        return functions.Embed.apply(tokens, words, places).unflatten(0, tokens.shape)
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
    return embedding(tokens) + position(positions)


def linear(x: Tensor, f: nn.Linear) -> Tensor:
    """f(x), x [..., in]."""
    if not _fuses(x):
        return f(x)
    return functions.Linear.apply(_rows(x), f.weight, f.bias, _compute_dtype(x)).unflatten(0, x.shape[:-1])


def linears(x: Tensor, f: nn.Linear, g: nn.Linear) -> tuple[Tensor, Tensor]:
    """`(f(x), g(x))`, x [..., in], of two without bias."""
    if not _fuses(x):
        return f(x), g(x)
    ys = functions.Linears.apply(_rows(x), f.weight, g.weight, _compute_dtype(x))
    return tuple(y.unflatten(0, x.shape[:-1]) for y in ys)


def gelu_linear(hidden: Tensor, f: nn.Linear, *, recompute: str = "cheap") -> Tensor:
    """f(gelu(hidden)), hidden [..., in], with the exact GELU."""
    if not _fuses(hidden):
        return f(gelu(hidden))
    y = functions.GeluLinear.apply(_rows(hidden), f.weight, f.bias, recompute == "none")
    return y.unflatten(0, hidden.shape[:-1])


def self_attention(projected: Tensor, heads: int, *, causal: bool) -> Tensor:
    """Query, key and value side by side, [B, L, 3 C], to [B, L, C], every token seeing its segment, or with `causal`
    what stands before it."""
    batch, length, width = projected.shape[0], projected.shape[1], projected.shape[2] // 3
    if _fuses(projected) and segment_attention.fits(length, width // heads, projected.dtype):
        return functions.SegmentAttention.apply(_rows(projected), length, heads, causal).view(batch, length, width)
    query, key, value = (p.unflatten(-1, (heads, -1)).transpose(1, 2) for p in projected.chunk(3, -1))
    return scaled_dot_product_attention(query, key, value, is_causal=causal).transpose(1, 2).flatten(-2)


def residual_norm(x: Tensor, branch: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """`(x + branch, norm(x + branch))`, x and branch [..., C]; x itself where branch is None."""
    if not _fuses(x):
        x = x if branch is None else x + branch
        return x, norm(x)
    given = _rows(x), None if branch is None else _rows(branch), norm.weight, norm.bias, norm.eps
    total, normalised = functions.ResidualNorm.apply(*given, _compute_dtype(x))
    return total.view(x.shape), normalised.view(x.shape)


def residual_norm_linear(
    x: Tensor, branch: Tensor | None, norm: nn.LayerNorm, f: nn.Linear, *, recompute: str = "cheap"
) -> tuple[Tensor, Tensor]:
    """`(x + branch, f(norm(x + branch)))`, x and branch [..., C]; x itself where branch is None."""
    if not _fuses(x):
        x = x if branch is None else x + branch
        return x, f(norm(x))
    given = _rows(x), None if branch is None else _rows(branch), norm.weight, norm.bias, norm.eps
    total, y = functions.ResidualNormLinear.apply(*given, f.weight, f.bias, _compute_dtype(x), recompute == "none")
    return total.view(x.shape), y.unflatten(0, x.shape[:-1])


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Of the matrix products: autocast's where it is on."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


def _fuses(x: Tensor) -> bool:
    if not x.is_cuda or torch.compiler.is_compiling():  # Inductor fuses what it compiles itself
        return False
    return functions is not None and unsupported_reason(x) is None
