"""The random state of recorded rollouts.

A CUDA graph draws from where the generator stands when it is replayed, plus how far the recording had come. The engine
draws the same numbers twice, in the forward and in the backward, which are two graphs. So each place at which it asks
for the random state has a generator state of its own, that both graphs draw from, and that is put before each replay to
where the default generator would have come.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch


class GraphRandom:
    """In the place of `surroundings.RandomState` while a rollout is recorded; then puts its states where they belong.

    Args:
        device: of the default generator in use.
        places: how often the forward asks for the random state; 0 where nothing is drawn.
    """

    def __init__(self, device: torch.device, places: int):
        index = torch.cuda.current_device() if device.index is None else device.index
        self._default = torch.cuda.default_generators[index]
        self.generators = [self._default.clone_state() for _ in range(places)]
        self._own = self._default.graphsafe_get_state()
        self._asked = 0
        self._offsets = [0] * (places + 1)  # of each place, and of the end, from the beginning

    # while recording

    def get(self) -> int:
        """From here on draws come from a state of their own, whose number is returned."""
        place, self._asked = self._asked, self._asked + 1
        self.set(place)
        return place

    def set(self, place: int) -> None:
        if self.generators:
            self._default.graphsafe_set_state(self.generators[place])

    select = set  # a checkpoint sets the offset alone, of the state that stands

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        yield

    kept_if_raises = kept

    def put_back(self) -> None:
        """The default generator draws from its own state again."""
        self._default.graphsafe_set_state(self._own)

    # while replaying

    def measure(self, replay: Callable[[], object]) -> None:
        """Finds out how much each place draws, from one replay of the forward."""
        self.go_to((0, 0))
        replay()
        drawn = [_place_of(generator)[1] for generator in self.generators]
        for i, count in enumerate(drawn):
            self._offsets[i + 1] = self._offsets[i] + count

    def here(self) -> tuple[int, int]:
        return _place_of(self._default)

    def go_to(self, began: tuple[int, int]) -> None:
        """The states of a rollout that began at this seed and offset."""
        seed, offset = began
        for generator, ahead in zip(self.generators, self._offsets, strict=False):
            generator.set_state(_state(seed, offset + ahead))

    def move_on(self, began: tuple[int, int]) -> None:
        """The default generator stands after that rollout."""
        seed, offset = began
        self._default.set_state(_state(seed, offset + self._offsets[-1]))


def _place_of(generator: torch.Generator) -> tuple[int, int]:
    """Seed and offset, of which the state of a CUDA generator is made."""
    seed, offset = generator.get_state().view(torch.int64).tolist()
    return seed, offset


def _state(seed: int, offset: int) -> torch.Tensor:
    return torch.tensor([seed, offset], dtype=torch.int64).view(torch.uint8)
