"""Rows that read different numbers of tokens in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from memformer_kernels.models.streaming import Stream, apart
from memformer_kernels.ops.precision import wide


class RaggedStream(Stream):
    """A `Stream` whose rows go on by as many tokens as each is given: packed, one text behind the other, no padding."""

    @apart
    def read_packed(self, tokens: Tensor, lengths: Sequence[int], *, logits: bool = False) -> Tensor:
        """Reads tokens [N] of the vocabulary, the first `lengths[0]` of them in row 0, and so on; N = sum(lengths).

        A row of length 0 takes part in the steps and stays as it is. Returns nats [N], or logits [N, V], as `read`.
        """
        self._follow_model()
        self._left_open()
        tokens, length = tokens.to(self.device), torch.tensor(lengths, dtype=torch.long)
        result = self._next.new_empty(len(tokens), *self._next.shape[1:] if logits else ())
        result = result if logits else wide(result)
        start, read = length.cumsum(0) - length, torch.zeros_like(length)
        while (read < length).any():
            count = torch.minimum(length - read, self._length - self._filled)
            given, rows, places = self._index(start + read, count).to(self.device)
            self._tokens[rows, places] = tokens[given]
            step_nats, step_logits, state = self._play(self._read_segment)
            result[given] = (step_logits if logits else step_nats)[rows, places].to(result.dtype)
            full = (self._filled + count == self._length).nonzero().flatten()
            if len(full):
                self._go_on(full.to(self.device), step_logits, state)
            read += count
            self._filled.add_(count).remainder_(self._length)
        return result

    def _index(self, given: Tensor, count: Tensor) -> Tensor:
        """Of each token of a step: where it was given, its row, and its place in the segment; [3, n]."""
        rows = torch.arange(self.batch).repeat_interleave(count)
        behind = torch.arange(len(rows)) - (count.cumsum(0) - count)[rows]
        return torch.stack([given[rows] + behind, rows, self._filled[rows] + behind])
