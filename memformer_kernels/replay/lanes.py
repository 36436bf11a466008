"""Streams of a GPU for the calls of a recorded pass, where those that do not depend on one another run at a time.

Few tokens leave a GPU half empty, and the kernels of one stream wait for one another.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from memformer_kernels.replay.surroundings import ModuleState

ASIDE = 2


class Lanes:
    """Lane 0 is the stream that is being recorded; the others fork off it. Calls that follow one another may take lanes
    0 and 1 in turn; what nothing waits for before the end goes to the third. A CPU has no streams. Without a device
    there is but one lane.

    What a lane allocates is its own, and is used again as soon as nobody refers to it: a tensor that another lane reads
    must be let go of before the next `done`, or be held until the end. So that a parameter's gradients are not handed
    from lane to lane, each lane but the first has leaves of its own, which stand for the `modules`' `parameters`.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        modules: ModuleState | None = None,
        parameters: Sequence[nn.Parameter] = (),
    ):
        self.many = device is not None
        self._modules, self._stand_ins = modules, {}
        for lane in (1, ASIDE) if modules is not None else ():
            self._stand_ins[lane] = {p: nn.Parameter(p.detach(), p.requires_grad) for p in parameters}
        self._streams, self._done, self._used, self._held = None, None, {0}, []
        if device is not None and device.type == "cuda":
            main = torch.cuda.current_stream(device)
            self._streams, self._done = (main, *_other_streams(device)), main.record_event()

    @contextlib.contextmanager
    def on(self, lane: int) -> Iterator[None]:
        """What is launched inside runs on this lane, after all that was `done`, on the lane's leaves."""
        with contextlib.ExitStack() as stack:
            if lane in self._stand_ins:
                stack.enter_context(self._modules.standing_in(self._stand_ins[lane]))
            if self._streams is not None:
                self._used.add(lane)
                stack.enter_context(torch.cuda.stream(self._streams[lane]))
                self._streams[lane].wait_event(self._done)
            yield

    def done(self, lane: int) -> None:
        """Nothing that comes later runs before what was launched on this lane so far."""
        if self._streams is not None:
            self._done = self._streams[lane].record_event()

    def aside(self, held: object) -> contextlib.AbstractContextManager[None]:
        """Runs what nothing waits for before the end, and which reads what is `held`."""
        if self._streams is not None:
            self._held.append(held)
        return self.on(ASIDE)

    def join(self) -> None:
        """All lanes end here."""
        for lane in sorted(self._used - {0}):
            self._streams[0].wait_stream(self._streams[lane])
        self._held.clear()


@functools.cache
def _other_streams(device: torch.device) -> tuple[torch.cuda.Stream, ...]:
    return tuple(torch.cuda.Stream(device) for _ in range(ASIDE))
