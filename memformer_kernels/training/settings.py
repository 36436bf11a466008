"""What a training run is made of, apart from the model's configuration."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Settings:
    """Settings of one run.

    Attributes:
        steps, batch: optimiser steps, and lanes read side by side.
        horizons: segments a rollout, one value for each equal part of the run: (2, 4) is a curriculum.
        lengths: tokens a segment, likewise; () stands for the model's `segment_length`.
        restart: chance that a lane of text begins anew, from the initial memory, at a rollout. A model whose lanes
            never do so is good at going on, and forgets how to begin.
        learning_rate, warmup: the peak, and the steps to it; a cosine falls to a twentieth of it.
        clip: largest norm of the gradient.
        method: of `memory_replay`.
        twin: the model without memory: it is reset before every segment, in training and after.
        precision: "float32", or "bfloat16" for autocast.
    """

    steps: int = 1500
    batch: int = 16
    horizons: tuple[int, ...] = (12,)
    lengths: tuple[int, ...] = ()
    restart: float = 0.0
    learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    method: str = "replay"
    twin: bool = False
    precision: str = "float32"

    def __post_init__(self):
        for name in ("steps", "batch", "learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"train: {name} must be above 0, got {getattr(self, name)}")
        if not self.horizons or min(self.horizons) < 1:
            raise ValueError(f"train: horizons must be one or more numbers from 1 up, got {self.horizons}")
        if min(self.lengths, default=1) < 1:
            raise ValueError(f"train: lengths must be numbers from 1 up, got {self.lengths}")
        if not 0 <= self.restart <= 1:
            raise ValueError(f"train: restart must be from 0 to 1, got {self.restart}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"train: precision must be float32 or bfloat16, got {self.precision!r}")

    def horizon(self, step: int) -> int:
        return self._of_step(self.horizons, step)

    def length(self, step: int, longest: int) -> int:
        """Tokens a segment; `longest` is the model's."""
        return self._of_step(self.lengths or (longest,), step)

    def rate(self, step: int) -> float:
        """The learning rate of a step, warm-up included."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1)))
        return self.learning_rate * min(1, (step + 1) / max(self.warmup, 1)) * (0.05 + 0.95 * cosine)

    def _of_step(self, values: tuple[int, ...], step: int) -> int:
        return values[min(step * len(values) // self.steps, len(values) - 1)]

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16")
