"""Rollouts as CUDA graphs: the passes of the engine, recorded once for segments of one form, and replayed.

What is recorded (`capture`) is the engine in Python as it stands, on tensors that stay. A replay copies the segments
and the state in, and the outputs, the last state and the gradients out. A rollout that is longer than one graph should
be is a rollout of rollouts: of all but the last the forward is run again before the backward.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from memformer_kernels.replay.capture import Ahead, Capture, Form, NotCapturable, Store
from memformer_kernels.replay.surroundings import Surroundings, modules_of
from memformer_kernels.replay.tape import Grads
from memformer_kernels.replay.totals import Totals
from memformer_kernels.replay.tree import Tree


class CapturedCell:
    """A cell that `memory_replay` runs as CUDA graphs: no Python and no launches a segment, but the same arithmetic.

        cell = CapturedCell(model.cell)
        loss, memory = memory_replay(cell, segments, memory, reduction="mean")

    It holds the graphs and their memory; keep it as long as the model. A form of rollout that was not seen before
    (shapes, number of segments, budget, reduction) is recorded first, which takes a few rollouts in Python. On a CPU it
    is the cell.

    Args:
        cell: a cell as `memory_replay` takes, or a `StagedCell`. It must launch the same kernels for every segment of
            one form: what is decided by values, makes the host wait for the GPU, changes buffers, or draws on other
            than PyTorch's CUDA generators cannot be captured. Such a cell runs in Python, and a warning says why, once.
        segments_per_graph: of longer rollouts, graphs of about as many segments follow one another. All but the last
            run their forward twice, and parameters' gradients are added up by graph.
        always: raise where the cell cannot be captured, instead.

    Gradients are those of the uncaptured rollout. `strict` and `random_sources` run it in Python. Parameters may be
    trained in place; replaced ones are noticed.
    """

    def __init__(
        self, cell: Callable[[Any, Any], tuple[Any, Any]], *, segments_per_graph: int = 128, always: bool = False
    ):
        if segments_per_graph < 1:
            raise ValueError(f"CapturedCell: segments_per_graph must be at least 1, got {segments_per_graph}")
        self.cell, self.segments_per_graph, self.always = cell, segments_per_graph, always
        self.reason: str | None = None  # why it runs in Python
        self.modules = modules_of(cell)
        self._even_on_a_cpu = always  # the same code without graphs, for tests
        self._store = Store()

    def __call__(self, segment: Any, state: Any) -> tuple[Any, Any]:
        return self.cell(segment, state)

    def clear(self) -> None:
        """Lets go of all graphs and their memory."""
        self._store = Store()

    def takes(self, devices: Sequence[torch.device]) -> bool:
        """Whether a rollout with tensors on these devices runs as graphs."""
        if self.reason is not None or not self._even_on_a_cpu and all(d.type == "cpu" for d in devices):
            return False
        if len(devices) != 1:
            self.give_up(NotCapturable(f"its tensors lie on {', '.join(map(str, devices)) or 'no device'}"))
            return False
        return True

    def chunks(self, segments: list) -> list[list]:
        """The segments of each graph."""
        size = -(-len(segments) // -(-len(segments) // self.segments_per_graph))
        return [segments[t : t + size] for t in range(0, len(segments), size)]

    def launch(self, segments: list, state: Any, asked: int | float | None, weight: float | None) -> None:
        """Launches the forward that served the last rollout, if this one looks like it: the GPU works while all else
        that a rollout depends on is looked at. Where that has changed, what was launched serves nobody; so it must not
        draw, which counts."""
        self._store.ahead, latest = None, self._store.latest
        if latest is None or latest.draws:
            return
        arguments, known = Tree.of((self.chunks(segments)[0], state)), latest.form
        try:
            form = Form.of(arguments, asked, known.weight and weight, known.training, known.autocast)
        except NotCapturable:  # which is said in its turn
            return
        if form == known:
            self._store.ahead = Ahead(latest, latest.run_again(arguments, None))

    def part(self, surroundings: Surroundings, parameters: list[Tensor], **options: Any) -> "CapturedRollout":
        """The part of a rollout whose segments are `chunks`."""
        self._store.follow(parameters, surroundings.devices[0])
        return CapturedRollout(self.cell, surroundings, self._store, **options)

    def give_up(self, error: NotCapturable) -> None:
        """From now on the cell runs in Python."""
        self.clear()
        if self.always:
            raise RuntimeError(f"memory_replay: the cell cannot be captured: {error}") from error
        self.reason = str(error)
        warnings.warn(f"memory_replay: the cell runs in Python, not as CUDA graphs: {error}", stacklevel=5)


@dataclass
class _Record:
    capture: Capture
    random: tuple | None  # where the forward began
    ticket: object


class CapturedRollout:
    """A rollout as a part of another: `(segments, state) -> (outputs, state)`. See `tape.Part`."""

    bytes_each = expected_bytes = None

    def __init__(
        self,
        cell: Callable,
        surroundings: Surroundings,
        store: Store,
        *,
        budget: int | None,
        asked: int | float | None,
        weight: float | None,
    ):
        """`budget` in bytes, as it was `asked` for; `weight` as `rollout.Passes` has it."""
        self.cell, self.surroundings, self.store, self.budget, self.weight = cell, surroundings, store, budget, weight
        self.asked = asked
        self.parameters: list[Tensor] = []

    def run_only(self, arguments: Tree) -> Tree:
        return self._capture(arguments).run(arguments)[0]

    def run(self, label: str, arguments: Tree, left: int) -> tuple[Tree, _Record]:
        capture = self._capture(arguments)
        result, random = capture.run(arguments)
        self.parameters += capture.parameters  # while the GPU runs; `Tape.close` takes each once
        return result, _Record(capture, random, self.store.pending)

    def pull(self, record: _Record, arguments: Tree, grads: Grads, totals: Totals) -> Grads:
        capture = record.capture
        totals.own()  # what the last backward lent is overwritten now
        if self.store.pending is not record.ticket:
            capture.run_again(arguments, record.random)
        self.store.pending = None
        of_arguments, sums = capture.pull(grads, record.random)
        totals.lend({self.store.originals.get(leaf, leaf): total for leaf, total in sums.items()})
        return of_arguments

    def _capture(self, arguments: Tree) -> Capture:
        """The capture that serves these arguments: made now if there is none."""
        training = tuple(module.training for module in self.surroundings.modules.owners)
        form = Form.of(arguments, self.asked, self.weight, training, self.surroundings.autocast)
        capture = next((c for c in self.store.captures if c.form == form), None)
        if capture is None:
            self.store.pending = None
            options = dict(budget=self.budget, weight=self.weight)
            capture = Capture(self.cell, self.store, self.surroundings, form, arguments, **options)
            self.store.captures.append(capture)
        return capture
