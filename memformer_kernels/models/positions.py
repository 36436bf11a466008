"""Which position of its segment a token has."""

import torch
from torch import Tensor


def positions_of(tokens: Tensor, start: int = 0, token_mask: Tensor | None = None) -> Tensor:
    """For tokens [B, L] that begin at `start`: [L], or with a mask [B, L], where padding takes no position."""
    if token_mask is None:
        return torch.arange(start, start + tokens.shape[1], device=tokens.device)
    return (token_mask.cumsum(-1) - 1).clamp(min=0) + start
