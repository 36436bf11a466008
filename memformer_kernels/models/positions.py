"""Which position of its segment a token has."""

from torch import Tensor

from memformer_kernels.layers.transformer import KeyValueCache


def positions_of(token_mask: Tensor | None = None, cache: KeyValueCache | None = None) -> Tensor | None:
    """[B, L] with a mask, where padding takes no position, and with a cache, where it looks from; None: from 0 on."""
    if cache is not None and cache.place is not None:
        return cache.place
    return None if token_mask is None else (token_mask.cumsum(-1) - 1).clamp(min=0)
