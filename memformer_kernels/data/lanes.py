"""A long text read side by side: B lanes, each contiguous, so that a memory can be carried along every one."""

import torch
from torch import Tensor

from memformer_kernels.data.text import DataError

Segment = tuple[Tensor, Tensor]


class Lanes:
    """Cuts text, uint8 [N], into rollouts of segments. Where it stands is one number, `position`.

    Lane i starts at i * N / B and goes round the whole text.
    """

    def __init__(self, text: Tensor, batch: int, position: int = 0):
        if len(text) < max(2, batch):
            raise DataError(f"the text holds {len(text)} bytes; {batch} lanes need more")
        self.text, self.position = text, position
        self.starts = torch.arange(batch, device=text.device) * (len(text) // batch)

    def rollout(self, horizon: int, length: int) -> list[Segment]:
        """The next segments of every lane: (tokens, targets), int64 [B, length] each, the targets one byte ahead."""
        span = torch.arange(horizon * length + 1, device=self.text.device)
        tokens = self.text[(self.starts[:, None] + self.position + span) % len(self.text)].long()
        self.position += horizon * length
        inputs, targets = tokens[:, :-1].split(length, 1), tokens[:, 1:].split(length, 1)
        return list(zip(inputs, targets, strict=True))
