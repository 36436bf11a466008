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
        learning_rate, warmup: the peak, and the steps to it; a cosine falls to a twentieth of it.
        clip: largest norm of the gradient.
        method: of `memory_replay`.
        twin: the model without memory: it is reset before every segment, in training and after.
        precision: "float32", or "bfloat16" for autocast.
    """

    steps: int = 1500
    batch: int = 16
    horizons: tuple[int, ...] = (12,)
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
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"train: precision must be float32 or bfloat16, got {self.precision!r}")

    def horizon(self, step: int) -> int:
        return self.horizons[min(step * len(self.horizons) // self.steps, len(self.horizons) - 1)]

    def rate(self, step: int) -> float:
        """The learning rate of a step, warm-up included."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(step / self.steps, 1)))
        return self.learning_rate * min(1, (step + 1) / max(self.warmup, 1)) * (0.05 + 0.95 * cosine)

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16")
