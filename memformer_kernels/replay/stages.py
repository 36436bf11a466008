"""A cell in three parts, of which only one has to run segment after segment."""

from collections.abc import Callable
from typing import Any


class StagedCell:
    """A cell `(segment, state) -> (output, next_state)` that says what of it depends on the state.

        inputs = prepare(segments)                                what does not depend on the state
        features, state = advance(input, state)                   the only part that runs segment after segment
        outputs = readout(features, segments)                     what no later segment depends on

    `memory_replay` runs `prepare` and `readout` over many segments at once, as many as its `activation_budget` allows:
    an embedding, a first layer, a decoder, a head and its loss are off the sequential path. Random numbers are then
    drawn in another order than segment after segment, the same in both passes. Called, it is an ordinary cell of one
    segment.

    Args:
        advance: `(input, state) -> (features, next_state)`, pytrees.
        prepare: `[segment, ...] -> [input, ...]`; each input by its own segment only. Without it an input
            is its segment.
        readout: `([features, ...], [segment, ...]) -> [output, ...]`; each output by its own features and segment only.
            Without it an output is the features.
    """

    def __init__(self, advance: Callable, *, prepare: Callable | None = None, readout: Callable | None = None):
        self.advance, self.prepare, self.readout = advance, prepare, readout

    def __call__(self, segment: Any, state: Any) -> tuple[Any, Any]:
        (given,) = [segment] if self.prepare is None else self.prepare([segment])
        features, state = self.advance(given, state)
        (output,) = [features] if self.readout is None else self.readout([features], [segment])
        return output, state


def functions_of(cell: Callable) -> dict[str, Callable]:
    """A cell's parts by name; a plain cell is all `advance`."""
    if not isinstance(cell, StagedCell):
        return {"advance": cell}
    return {name: part for name in ("prepare", "advance", "readout") if (part := getattr(cell, name)) is not None}
