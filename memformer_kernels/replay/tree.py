"""Pytrees taken apart: their tensors, and what else they hold."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

_HOLE = torch.empty(0)


@dataclass
class Tree:
    leaves: list[Any]
    spec: TreeSpec

    @classmethod
    def of(cls, tree: Any) -> "Tree":
        return cls(*tree_flatten(tree))

    def whole(self) -> Any:
        return tree_unflatten(self.leaves, self.spec)

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def replace(self, tensors: Sequence[Tensor]) -> "Tree":
        """The same tree with other tensors."""
        rest = iter(tensors)
        return Tree([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves], self.spec)

    def detached(self, needs_grad: Callable[[Tensor], bool]) -> "Tree":
        """The tree with detached tensors; those for which `needs_grad` holds become leaves that need a gradient."""
        return self.replace([t.detach().requires_grad_(needs_grad(t)) for t in self.tensors()])

    def hollow(self) -> "Tree":
        """The tree without its tensors, to be filled again with `replace`."""
        return self.replace([_HOLE for _ in self.tensors()])


def differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def never(tensor: Tensor) -> bool:
    return False


def requires_grad(tensor: Tensor) -> bool:
    return tensor.requires_grad
