"""Rows of unit norm, and their gradient: the part that `memory_forget` and `memory_write` share.

norm = ||z||_2        unit = z / max(norm, eps)        inv_norm = 1 / max(norm, eps)
grad_z = inv_norm * (grad - unit * rowdot(unit, grad))      where norm > eps
       = inv_norm * grad                                    where norm <= eps
"""

from torch import Tensor


def normalise(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`(unit, inv_norm)` of the last dimension of `z`; `inv_norm` loses that dimension. Autograd differentiates it.

    The squares are taken of z / max|z|, so that they neither overflow nor vanish: `unit` is finite for every finite
    `z`, even where the norm itself is above the largest float.
    """
    peak = z.detach().abs().amax(-1, keepdim=True) if z.shape[-1] else z.detach().new_ones(*z.shape[:-1], 1)
    peak = peak.where((peak > 0) & peak.isfinite(), 1)
    scaled = z / peak
    squares = scaled.square().sum(-1, keepdim=True)
    # sqrt has no derivative at 0; such a row takes the floor below, so any positive number does
    norm = squares.where(squares != 0, 1).sqrt().where(squares != 0, 0)
    floor = eps / peak
    at_floor = norm <= floor
    divisor = floor.where(at_floor, norm)
    inv_norm = (1 / peak / divisor).masked_fill(at_floor, 1 / eps)  # exactly that: it tells the backward
    return scaled / divisor, inv_norm.squeeze(-1)


def normalise_backward(grad: Tensor, z: Tensor, inv_norm: Tensor, eps: float) -> Tensor:
    inv_norm = inv_norm.unsqueeze(-1)
    unit = z * inv_norm
    along = (unit * grad).sum(-1, keepdim=True)
    return inv_norm * (grad - unit * along.masked_fill(inv_norm >= 1 / eps, 0))
