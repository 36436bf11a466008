"""Segments side by side: what does not depend on the memory runs over many at once."""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from memformer_kernels.ops.precision import wide


def side_by_side(function: Callable[..., Tensor], *lists: Sequence[Tensor]) -> list[Tensor]:
    """`[function(*tensors) for tensors in zip(*lists)]`, where equal shapes follow one another in one call, along the
    first dimension."""
    results: list[Tensor] = []
    for _, run in groupby(zip(*lists, strict=True), key=lambda tensors: [t.shape for t in tensors]):
        run = list(run)
        joined = [torch.cat(column) if len(run) > 1 else column[0] for column in zip(*run, strict=True)]
        # into given sizes, whose gradients are joined by one kernel: those of `tensor_split` are padded and added up
        results += function(*joined).split([len(run[0][0])] * len(run))
    return results


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats of each token, [B, T], of logits [B, T, V]; 0 where a target is -100."""
    losses = cross_entropy(wide(logits.flatten(0, 1)), targets.flatten(), ignore_index=-100, reduction="none")
    return losses.view(targets.shape)


def segment_losses(losses: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
    """Mean nats of the counted tokens of each segment, scalars, of `token_losses`; 0 where none counts."""
    means: list[Tensor] = []
    for _, run in groupby(zip(losses, targets, strict=True), key=lambda pair: pair[0].shape):
        total, target = (torch.stack(column) for column in zip(*run, strict=True))
        means += total.sum((1, 2)).div((target != -100).sum((1, 2)).clamp(min=1)).unbind()
    return means
