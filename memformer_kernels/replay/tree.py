"""Pytrees taken apart: their tensors, and what else they hold."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten


@dataclass
class Tree:
    leaves: list[Any]
    spec: Any

    @classmethod
    def of(cls, tree: Any) -> "Tree":
        leaves: list[Any] = []
        return cls(leaves, _take_apart(tree, leaves))

    def whole(self) -> Any:
        return _put_together(self.spec, iter(self.leaves))

    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def replace(self, tensors: Sequence[Tensor]) -> "Tree":
        """The same tree with other tensors."""
        rest = iter(tensors)
        return Tree([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves], self.spec)

    def cut(self) -> "Tree":
        """The tree without a graph: every tensor a leaf, which needs a gradient if it did before."""
        return self.replace([as_leaf(t, t.requires_grad) for t in self.tensors()])

    def hollow(self) -> "Tree":
        """The tree with an empty tensor for each."""
        return self.replace([torch.empty(0)] * len(self.tensors()))

    def hides_graph(self) -> list[Any]:
        """Leaves that hold, where a pytree does not look, a tensor with a graph."""
        return [leaf for leaf in self.leaves if not isinstance(leaf, Tensor) and _holds_graph(leaf)]


def _take_apart(tree: Any, leaves: list[Any]) -> Any:
    """What `_put_together` takes besides the leaves. Lists and tuples of tensors, which most segments are, are taken
    apart here, as the GPU waits for it in every rollout; all else by PyTorch."""
    kind = type(tree)
    if kind is Tensor:
        leaves.append(tree)
        return None
    if kind is list or kind is tuple:
        return kind, [_take_apart(item, leaves) for item in tree]
    found, spec = tree_flatten(tree)
    leaves += found
    return None if len(found) == 1 and found[0] is tree else spec


def _put_together(spec: Any, leaves: Iterator[Any]) -> Any:
    if spec is None:
        return next(leaves)
    if type(spec) is tuple:
        kind, items = spec
        return kind([_put_together(item, leaves) for item in items])
    return tree_unflatten([next(leaves) for _ in range(spec.num_leaves)], spec)


def as_leaf(tensor: Tensor, needs_grad: bool) -> Tensor:
    """The tensor without its graph."""
    if not (needs_grad or tensor.requires_grad):
        return tensor  # which has none
    return tensor.detach().requires_grad_(needs_grad)


def _holds_graph(thing: Any) -> bool:
    pending, seen = [thing], set()
    while pending:
        thing = pending.pop()
        if isinstance(thing, Tensor) and thing.grad_fn is not None:
            return True
        if id(thing) in seen or isinstance(thing, Tensor | nn.Module | type):
            continue
        seen.add(id(thing))
        if isinstance(thing, dict):
            pending += thing.values()
        elif isinstance(thing, list | tuple | set | frozenset):
            pending += thing
        pending += attributes_of(thing).values()
    return False


def attributes_of(thing: Any) -> dict[str, Any]:
    """What an object holds under a name."""
    named = (name for kind in type(thing).__mro__ for name in vars(kind).get("__slots__", ()))
    slots = {name: getattr(thing, name, None) for name in named}
    return {**slots, **getattr(thing, "__dict__", {})}
