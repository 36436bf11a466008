"""Which leaves a segment's graph ends in."""

from collections.abc import Iterable

import torch
from torch import Tensor


class ForeignTensorError(RuntimeError):
    """A cell uses a tensor that was computed outside it and needs a gradient."""


# the node of a leaf, by its type: names are made anew at every call
_LEAF = type(torch.ones((), requires_grad=True).expand(1).grad_fn.next_functions[0][0])


def graph_mark() -> int:
    """A number below those of all autograd nodes made after this call by this thread."""
    return torch.ones((), requires_grad=True).clone().grad_fn._sequence_nr()


def leaves_of(outputs: Iterable[Tensor], known: Iterable[Tensor], mark: int) -> list[Tensor]:
    """Leaf tensors needing a gradient that `outputs` depend on, besides `known`, in order of discovery.

    A node older than `mark` was made outside the cell: its gradient would be lost, so it is refused.
    """
    known_ids = {id(t) for t in known}
    pending = [t for t in outputs if t.requires_grad]
    found = [t for t in pending if t.grad_fn is None and id(t) not in known_ids]
    nodes = [t.grad_fn for t in pending if t.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if type(node) is _LEAF:
            if id(node.variable) not in known_ids:
                found.append(node.variable)
            continue
        if node._sequence_nr() <= mark:
            raise ForeignTensorError(
                f"memory_replay: cell must compute from its segment, its state and parameters, got a tensor made "
                f"outside it by {node.name()}; pass that tensor in through the segments or the state"
            )
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                nodes.append(parent)
    return list({id(leaf): leaf for leaf in found}.values())
