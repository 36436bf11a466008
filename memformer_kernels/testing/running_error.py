"""Running error analysis: values in float64, each with how far a computation in float32 may be from it.

Every operation adds the error of its operands and its own rounding, |fl(x) - x| <= u |x|; a sum of n terms is off by
at most n u times the sum of their magnitudes, in any order (Higham, Accuracy and Stability, sections 3.3 and 4.2).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

UNIT = 2.0**-24  # unit roundoff of float32, in which everything is accumulated
TINY = 2.0**-126  # what a GPU may flush to 0
SMALLEST = {torch.float32: TINY, torch.bfloat16: TINY, torch.float16: 2.0**-24}  # float16 keeps subnormal numbers


@dataclass(frozen=True)
class Computed:
    """`value` is exact, and a float32 computation of it is within `error` of it, element by element."""

    value: Tensor
    error: Tensor

    @classmethod
    def exact(cls, value: Tensor) -> "Computed":
        return cls(value, torch.zeros_like(value))

    def __add__(self, other: "Computed") -> "Computed":
        return _once_rounded(self.value + other.value, self.error + other.error)

    def __sub__(self, other: "Computed") -> "Computed":
        return self + Computed(-other.value, other.error)

    def __mul__(self, other: "Computed") -> "Computed":
        return _once_rounded(self.value * other.value, _of_product(torch.mul, self, other))

    def __matmul__(self, other: "Computed") -> "Computed":
        terms = self.value.shape[-1] * UNIT * (self.magnitude @ other.magnitude)
        return _once_rounded(self.value @ other.value, _of_product(torch.matmul, self, other) + terms)

    def scaled(self, factor: float) -> "Computed":
        return _once_rounded(self.value * factor, self.error * abs(factor))

    def sum(self, dim: int) -> "Computed":
        terms = self.value.shape[dim] * UNIT * self.magnitude.sum(dim)
        return Computed(self.value.sum(dim), self.error.sum(dim) + terms)

    def rounded(self, dtype: torch.dtype) -> "Computed":
        """Stored in `dtype`; the error is infinite where that may overflow."""
        limits = torch.finfo(dtype)
        error = self.error + limits.eps / 2 * self.magnitude + SMALLEST[dtype]
        return Computed(self.value, error.masked_fill(self.magnitude > limits.max, float("inf")))

    def map(self, function) -> "Computed":
        """A change of shape, or of which elements there are."""
        return Computed(function(self.value), function(self.error))

    @property
    def mT(self) -> "Computed":
        return self.map(lambda t: t.mT)

    @property
    def magnitude(self) -> Tensor:
        """The largest that a computed value may be."""
        return self.value.abs() + self.error


def rowdot(a: Computed, b: Computed) -> Computed:
    return (a * b).sum(-1)


def _of_product(product, a: Computed, b: Computed) -> Tensor:
    return product(a.magnitude, b.error) + product(a.error, b.value.abs())


def _once_rounded(value: Tensor, error: Tensor) -> Computed:
    return Computed(value, error + UNIT * (value.abs() + error) + TINY)
