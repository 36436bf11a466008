"""The tasks a model can be trained on: where rollouts come from, and how the model is judged."""

import hashlib
import math

import torch
from torch import Tensor

from memformer_kernels.data import DataError, Lanes, RecallTask, Text
from memformer_kernels.models import MemformerLM

VALIDATION_LANES = 256
VALIDATION_BYTES = 100_000  # of a validation in the middle of a run


class TextTask:
    """Predict the next byte. The memory runs on from rollout to rollout; judged in bits per byte."""

    unit = "bits per byte"
    carries_memory = True
    better = min

    def __init__(self, text: Text, batch: int, length: int, device: torch.device):
        self.lanes = Lanes(text.train.to(device), batch)
        self.validation = text.validation.to(device)
        self.digest = hashlib.sha256(memoryview(text.train.numpy())).hexdigest()
        self.length = length

    def rollout(self, horizon: int, length: int) -> list[tuple[Tensor, Tensor]]:
        return self.lanes.rollout(horizon, length)

    def state(self) -> dict:
        return {"position": self.lanes.position, "text": self.digest}

    def load_state(self, state: dict) -> None:
        if state["text"] != self.digest:
            raise DataError("the text is not the one this run was trained on; --resume needs the same files")
        self.lanes.position = int(state["position"])

    @torch.no_grad()
    def validate(self, model: MemformerLM, *, reset: bool, everything: bool = False) -> float:
        """Bits per byte of held-out text, read in lanes with the memory carried, or reset at each segment.

        Of a part of each lane, or with `everything` to its end.
        """
        batch = min(VALIDATION_LANES, max(1, len(self.validation) // (2 * self.length)))
        segments = max(1, (len(self.validation) // batch - 1) // self.length)
        if not everything:
            segments = min(segments, max(1, VALIDATION_BYTES // (batch * self.length)))
        lanes = Lanes(self.validation, batch)
        memory = initial = model.initial_memory(batch)
        total = torch.zeros((), dtype=torch.float64)
        for _ in range(segments):
            (segment,) = lanes.rollout(1, self.length)
            loss, memory = model.loss(segment, initial if reset else memory)
            total += loss.double().cpu()
        return (total / segments).item() / math.log(2)


class RecallTraining:
    """Recall a symbol across segments; judged by accuracy on 256 fixed rollouts of the longest horizon, at the end on
    1024."""

    unit = "accuracy"
    carries_memory = False
    better = max

    def __init__(self, batch: int, length: int, horizon: int, device: torch.device, seed: int):
        self.task, self.length, self.horizon, self.device = RecallTask(batch, length), length, horizon, device
        self.generator = torch.Generator().manual_seed(seed)

    def rollout(self, horizon: int, length: int) -> list[tuple[Tensor, Tensor]]:
        if length != self.length:
            raise ValueError(f"train: lengths must be {self.length} in the recall task, got {length}")
        return self._to_device(self.task.rollout(horizon, self.generator))

    def state(self) -> dict:
        return {"generator": self.generator.get_state().tolist()}

    def load_state(self, state: dict) -> None:
        self.generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))

    @torch.no_grad()
    def validate(
        self, model: MemformerLM, *, reset: bool, everything: bool = False, horizon: int | None = None
    ) -> float:
        batch = 1024 if everything else 256
        task = RecallTask(batch, self.length)
        generator = torch.Generator().manual_seed(2**31 - 1)
        memory = initial = model.initial_memory(batch)
        segments = self._to_device(task.rollout(horizon or self.horizon, generator))
        for tokens, _ in segments:
            logits, memory = model(tokens, initial if reset else memory)
        answers = segments[-1][1][:, -1]
        return (logits[:, -1].argmax(-1) == answers).double().mean().item()

    def _to_device(self, segments):
        return [(tokens.to(self.device), targets.to(self.device)) for tokens, targets in segments]
