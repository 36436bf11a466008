"""Cross-segment recall: a symbol is shown in the first segment and asked for in the last."""

from dataclasses import dataclass

import torch
from torch import Tensor

SYMBOLS = 16
NOISE = 16
ASK = SYMBOLS + NOISE


@dataclass(frozen=True)
class RecallTask:
    """Tokens below 16 are symbols, the next 16 noise, then the question.

    Segment 0 is noise with one symbol at a random place; the last segment ends in the question, whose target is that
    symbol. All other targets are -100: they do not count. Chance is 1 in 16.
    """

    batch: int
    length: int

    vocabulary = ASK + 1
    chance = 1 / SYMBOLS

    def rollout(self, horizon: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        """`horizon` segments of (tokens, targets), int64 [B, L] each."""
        shape = (horizon, self.batch, self.length)
        tokens = torch.randint(SYMBOLS, SYMBOLS + NOISE, shape, generator=generator)
        targets = torch.full(shape, -100)
        symbol = torch.randint(SYMBOLS, (self.batch,), generator=generator)
        place = torch.randint(self.length - 1, (self.batch,), generator=generator)
        tokens[0, torch.arange(self.batch), place] = symbol
        tokens[-1, :, -1], targets[-1, :, -1] = ASK, symbol
        return list(zip(tokens, targets, strict=True))
