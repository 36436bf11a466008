"""Which position of its segment a token has."""

import torch
from torch import Tensor

from memformer_kernels.layers.transformer import KeyValueCache


def positions_of(tokens: Tensor, token_mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor:
    """Of tokens [B, L]: [L], with a mask [B, L], where padding takes no position, with a cache where it looks from."""
    if cache is not None and cache.place is not None:
        return cache.place
    if token_mask is None:
        return torch.arange(tokens.shape[1], device=tokens.device)
    return (token_mask.cumsum(-1) - 1).clamp(min=0)
