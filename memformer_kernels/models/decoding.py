"""Making a text token by token, with everything at constant addresses."""

import torch
from torch import Tensor

from memformer_kernels.layers.transformer import KeyValueCache, look_from
from memformer_kernels.models.streaming import Stream, apart


class Decoding(Stream):
    """A `Stream` that also takes single tokens, each at a token's cost: what `generate` goes on from.

    Beside the stream's state it holds keys and values of the open segment and of what its tokens attend to besides,
    in buffers of the segment's length. A step is the same for every token: where it stands is read from a tensor.

    Where the model is trained in place, an open segment keeps what it holds of it as it was.
    """

    @apart
    def __init__(self, *arguments, **options):
        self._caught_up = False
        self._caches: list[KeyValueCache] = []
        self._contexts: list[tuple[Tensor, Tensor]] = []
        super().__init__(*arguments, **options)
        self._token = self._tokens.new_zeros(self.batch, 1)
        self._place = self._tokens.new_zeros(self.batch, 1)

    @apart
    def extend(self, tokens: Tensor) -> Tensor:
        """Appends tokens [B, n]; logits [B, n, V] of the token after each. One token is decoded, more are read."""
        if tokens.dim() != 2 or tokens.shape[1] != 1:
            return self.read(tokens, logits=True)
        self._follow_model()
        self._check_tokens(tokens)
        return self.decode(tokens)[:, None].clone()

    @apart
    def read_prompt(self, tokens: Tensor) -> Tensor:
        """Appends tokens [B, n], n >= 1, and returns the logits [B, V] of the token after the last."""
        self._follow_model()
        self._check_tokens(tokens)
        if tokens.shape[1] == 1:
            return self.decode(tokens)
        last = torch.empty_like(self._next)
        for rows, given, places, _, logits in self._read_on(tokens):
            if given.stop == tokens.shape[1]:
                last[rows] = logits[rows, places.stop - 1].to(last.dtype)
        return last

    @apart
    def decode(self, token: Tensor) -> Tensor:
        """Appends one token [B, 1] of a model that is as it was at the last call of another method.

        Returns the logits [B, V] of the token after it, which the next call overwrites.
        """
        if not self._caught_up:
            self._catch_up()
        self._token.copy_(token)
        logits = self._play(self._decode)
        self._filled += 1
        self._place += 1
        if (self._filled == self._length).any():
            logits = logits.clone()  # of which the next steps' graphs may run over
            self._end_segments()
        return logits

    def _end_segments(self) -> None:
        _, segment_logits, state = self._play(self._read_segment)
        for host, rows, filled in self._rows_by_place():
            if filled == self._length:
                self._go_on(rows, segment_logits, state)
                self._filled[host], self._place[rows] = 0, 0
        self._play(self._project)

    def _catch_up(self) -> None:
        """With what was read, loaded or reset."""
        if not self._caches:
            self._make_buffers()
        self._place.copy_(self._filled[:, None])
        self._play(self._project)
        if self._filled.any():
            self._play(self._fill_caches)
        else:  # NaN of a text before would go through any mask
            for cache in self._caches:
                cache.clear()
        self._caught_up = True

    def _make_buffers(self) -> None:
        self._contexts = [
            (torch.empty_like(key), torch.empty_like(value)) for key, value in self.model.contexts(self._state)
        ]
        like = self._contexts[0][0]
        sizes = self.batch, like.shape[1], self._length, like.shape[3]
        self._caches = [KeyValueCache(*sizes, like) for _ in self._contexts]

    # The steps

    def _project(self) -> None:
        for mine, made in zip(self._contexts, self.model.contexts(self._state), strict=True):
            for to, source in zip(mine, made, strict=True):
                to.copy_(source)

    def _fill_caches(self) -> None:
        look_from(self._caches, None)
        self.model.read_open_segment(self._tokens, self._contexts, self._caches)

    def _decode(self) -> Tensor:
        self._tokens.scatter_(1, self._place, self._token)
        look_from(self._caches, self._place)
        return self.model.read_open_segment(self._token, self._contexts, self._caches)[:, 0]

    def _left_open(self) -> None:
        self._caught_up = False

    def _forget_recordings(self) -> None:
        super()._forget_recordings()
        self._caches, self._contexts, self._caught_up = [], [], False
