"""The fused sublayer pieces with their backwards.

Matrix products are kept or read from memory, what lies between them is computed again: the backward of a normalisation
needs its input and two numbers a row, that of a GELU its input. Gradients of parameters are offered to `deliver`. What
the kernels read is made contiguous in the backward too: hooks may bring saved tensors back in any layout.
"""

import torch
from torch import Tensor

from memformer_kernels.gradient_sink import deliver, put_off
from memformer_kernels.layers.fused import embedding, grouped, segment_attention
from memformer_kernels.layers.fused import triton as kernels
from memformer_kernels.ops.library import refuse_double_backward

Grad = Tensor | None


class Embed(torch.autograd.Function):
    """words[tokens] + places[0, 1, ...] of tokens [B, L], to [B * L, C], in 16 bits.

    The gradient of `words` is a matrix product with a row of 0 and one 1 for each token: exact, and in a fixed order.
    """

    @staticmethod
    def forward(ctx, tokens: Tensor, words: Tensor, places: Tensor) -> Tensor:
        tokens = tokens.contiguous()
        ctx.save_for_backward(tokens)
        ctx.words, ctx.places = words, places
        return embedding.embed(tokens, words, places)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Grad, ...]:
        refuse_double_backward("embed")
        tokens, words, places, grad = ctx.saved_tensors[0].contiguous(), ctx.words, ctx.places, grad.contiguous()
        batch, length = tokens.shape

        def of_words(totals: list[Grad]) -> tuple[Grad, ...]:
            return (_product(embedding.one_hot(tokens, len(words), grad.dtype), grad, totals[0]),)

        def of_places(totals: list[Grad]) -> tuple[Grad, ...]:
            total = None if totals[0] is None else totals[0][:length].view(-1)
            (sums,) = _column_sums(grad.view(batch, 1, length * places.shape[1]), total)
            if sums is None:
                return (None,)
            rest = sums.new_zeros(len(places) - length, places.shape[1])
            return (torch.cat([sums.view(length, places.shape[1]), rest]),)

        made = (deliver((p,), make)[0] if _wanted(p) else None for p, make in ((words, of_words), (places, of_places)))
        return None, *made


class Linear(torch.autograd.Function):
    """y = x W' + b of x [rows, in]."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        ctx.weight, ctx.bias, ctx.of_x = weight, bias, x.dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, w)
        return torch.nn.functional.linear(x, w, b)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Grad, ...]:
        refuse_double_backward("linear")
        x, w = ctx.saved_tensors
        grad_x = (grad @ w).to(ctx.of_x) if ctx.needs_input_grad[0] else None
        return grad_x, *_of_parameters(ctx, grad, x), None


class Linears(torch.autograd.Function):
    """`(x V', x W')` of x [rows, in]: the backward adds the second gradient of x to the first where it multiplies."""

    @staticmethod
    def forward(ctx, x: Tensor, first: Tensor, second: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        v, w = first.to(dtype), second.to(dtype)
        ctx.weights, ctx.of_x = (first, second), x.dtype
        x = x.to(dtype)
        ctx.save_for_backward(x, v, w)
        return torch.nn.functional.linear(x, v), torch.nn.functional.linear(x, w)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Grad, ...]:
        refuse_double_backward("linears")
        x, v, w = ctx.saved_tensors
        grad_x = torch.addmm(grads[0] @ v, grads[1], w).to(ctx.of_x) if ctx.needs_input_grad[0] else None
        of_weights = (_of_weight(p, grad, x) for p, grad in zip(ctx.weights, grads, strict=True))
        return grad_x, *of_weights, None


class GeluLinear(torch.autograd.Function):
    """y = gelu(h) W' + b of h [rows, in]."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> Tensor:
        hidden = hidden.contiguous()
        w, b = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        activated = kernels.gelu_forward(hidden)
        ctx.weight, ctx.bias = weight, bias
        ctx.save_for_backward(hidden, w, activated if keep else None)
        return torch.nn.functional.linear(activated, w, b)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Grad, ...]:
        refuse_double_backward("gelu_linear")
        hidden, w, kept = ctx.saved_tensors
        grad_hidden, again = kernels.gelu_backward(grad @ w, hidden.contiguous(), kept is None)
        return grad_hidden, *_of_parameters(ctx, grad, again if kept is None else kept), None


class ResidualNorm(torch.autograd.Function):
    """`(x + branch, norm(x + branch))` of x [rows, C]."""

    @staticmethod
    def forward(ctx, x, branch, norm_weight, norm_bias, eps, dtype) -> tuple[Tensor, Tensor]:
        total, normalised, *statistics = _residual_norm(ctx, x, branch, norm_weight, norm_bias, eps, dtype)
        ctx.save_for_backward(total, *statistics)
        return total, normalised

    @staticmethod
    def backward(ctx, grad_total: Grad, grad: Grad) -> tuple[Grad, ...]:
        refuse_double_backward("residual_norm")
        grads, _ = _residual_norm_backward(ctx, ctx.saved_tensors, grad_total, grad, again=False)
        return *grads, None, None


class ResidualNormLinear(torch.autograd.Function):
    """`(x + branch, y)` with y = norm(x + branch) W' + b of x [rows, in]."""

    @staticmethod
    def forward(ctx, x, branch, norm_weight, norm_bias, eps, weight, bias, dtype, keep) -> tuple[Tensor, Tensor]:
        total, normalised, *statistics = _residual_norm(ctx, x, branch, norm_weight, norm_bias, eps, dtype)
        w, ctx.weight, ctx.bias = weight.to(dtype), weight, bias
        ctx.save_for_backward(total, *statistics, w, normalised if keep else None)
        return total, torch.nn.functional.linear(normalised, w, None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx, grad_total: Grad, grad: Grad) -> tuple[Grad, ...]:
        refuse_double_backward("residual_norm_linear")
        *saved, w, kept = ctx.saved_tensors
        grad_normalised = None if grad is None else grad @ w
        grads, again = _residual_norm_backward(ctx, saved, grad_total, grad_normalised, again=kept is None)
        of_linear = (None, None) if grad is None else _of_parameters(ctx, grad, again if kept is None else kept)
        return *grads, None, *of_linear, None, None


class SegmentAttention(torch.autograd.Function):
    """Self-attention of segments of `length` tokens: query, key and value side by side, [rows, 3 C], to [rows, C]."""

    @staticmethod
    def forward(ctx, projected: Tensor, length: int, heads: int, causal: bool) -> Tensor:
        projected = projected.contiguous()
        ctx.save_for_backward(projected)
        ctx.options = length, heads, causal
        return segment_attention.forward(projected, *ctx.options)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Grad, ...]:
        refuse_double_backward("self-attention")
        projected = ctx.saved_tensors[0].contiguous()
        return segment_attention.backward(grad.contiguous(), projected, *ctx.options), None, None, None


def _residual_norm(ctx, x, branch, norm_weight, norm_bias, eps, dtype) -> tuple[Tensor, ...]:
    """`(x + branch, its norm, and two numbers a row)`."""
    x, branch = x.contiguous(), None if branch is None else branch.contiguous()
    total, normalised, mean, inv_std = kernels.residual_norm_forward(
        x, branch, norm_weight, norm_bias, eps, dtype, any(ctx.needs_input_grad)
    )
    ctx.norm_weight, ctx.norm_bias = norm_weight, norm_bias
    ctx.dtypes = x.dtype, None if branch is None else branch.dtype
    ctx.set_materialize_grads(False)
    return total.view_as(total) if branch is None else total, normalised, mean, inv_std


def _residual_norm_backward(ctx, saved, grad_total: Grad, grad: Grad, again: bool) -> tuple[tuple[Grad, ...], Grad]:
    """Gradients of x, branch and the normalisation's parameters; and what it made again."""
    total, mean, inv_std = (tensor.contiguous() for tensor in saved)
    of_norm, normalised, grad_x = (None, None), None, grad_total
    if grad is not None:
        weight, bias = ctx.norm_weight, ctx.norm_bias
        grad_total = None if grad_total is None else grad_total.contiguous()
        grad_x, normalised, partial = kernels.residual_norm_backward(
            grad.contiguous(), grad_total, total, mean, inv_std, weight, bias, again
        )
        of_norm = _of_norm(weight, bias, partial)
    of_x, of_branch = ctx.dtypes
    if grad_x is None:
        return (None, None, *of_norm), normalised
    return (grad_x.to(of_x), None if of_branch is None else grad_x.to(of_branch), *of_norm), normalised


def _of_norm(weight: Tensor, bias: Grad, partial: Tensor) -> tuple[Grad, Grad]:
    """Gradients of a normalisation's weight and bias, of [parts, 2, C]."""
    wanted = _wanted(weight), _wanted(bias)

    def make(totals: list[Grad]) -> tuple[Grad, ...]:
        sums = _column_sums(partial, *totals)
        return tuple(grad if want else None for grad, want in zip(sums, wanted, strict=True))

    return deliver((weight, bias), make) if any(wanted) else (None, None)


def _of_parameters(ctx, grad: Tensor, x: Tensor) -> tuple[Grad, Grad]:
    """Gradients of a matrix product's weight and bias."""
    weight, bias = ctx.weight, ctx.bias
    if not (_wanted(weight) or _wanted(bias)):
        return None, None

    def make(totals: list[Grad]) -> tuple[Grad, Grad]:
        of_weight = _product(grad, x, totals[0]) if _wanted(weight) else None
        return of_weight, _column_sums(grad[:, None], totals[1])[0] if _wanted(bias) else None

    return deliver((weight, bias), make)


def _of_weight(weight: Tensor, grad: Tensor, x: Tensor) -> Grad:
    """Gradient of the weight of a matrix product without bias."""
    if not _wanted(weight):
        return None
    return deliver((weight,), lambda totals: (_product(grad, x, totals[0]),))[0]


def _wanted(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.requires_grad


def _product(grad: Tensor, x: Tensor, total: Grad) -> Grad:
    """grad' x; with a total it is added to that, in the product's own float32 sums where PyTorch can."""
    if total is None:
        return grad.t() @ x
    if grouped.product_takes(grad, x, total):
        put_off(grouped.products, grad, x, total)
    elif grad.dtype == total.dtype:
        total.addmm_(grad.t(), x)
    elif grad.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out"):
        torch.ops.aten.addmm.dtype_out(total, grad.t(), x, total.dtype, out=total)
    else:
        total += grad.t() @ x
    return None


def _column_sums(terms: Tensor, *totals: Grad) -> tuple[Grad, ...]:
    """Of terms [rows, n, C] the n sums over rows; where there is a total they are added to that."""
    if not grouped.sums_take(terms, totals):
        return kernels.column_sums(terms, *totals)
    for i, total in enumerate(totals):
        put_off(grouped.column_sums, terms[:, i], total)
    return (None,) * len(totals)
