"""The layout of per-head results: [B, H, L, D] over memory in the order [B, L, H, D].

So the heads of a token lie side by side, as the projections before and after the ops have them: merging the heads, or
the backward of splitting them, copies nothing.
"""

from torch import Tensor


def new_per_head(like: Tensor, rows: int) -> Tensor:
    """An uninitialised [B, H, rows, D], for the B, H and D of `like`, in its dtype and on its device."""
    batch, heads, _, width = like.shape
    return like.new_empty_strided((batch, heads, rows, width), (rows * heads * width, width, heads * width, 1))


def in_per_head(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy if it does not lie as `new_per_head` has it: saved tensors may come back in any layout."""
    _, heads, rows, width = tensor.shape
    strides = rows * heads * width, width, heads * width, 1
    same = all(size == 1 or a == b for size, a, b in zip(tensor.shape, tensor.stride(), strides, strict=True))
    return tensor if same else as_new_per_head(tensor)


def as_new_per_head(tensor: Tensor) -> Tensor:
    """A copy of `tensor` in the layout of `new_per_head`."""
    result = new_per_head(tensor, tensor.shape[2])
    result.copy_(tensor)
    return result
