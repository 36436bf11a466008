"""The training loop's state and step; saved and loaded so that a resumed run is the same run, bit for bit."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memformer_kernels.models import MemformerLM, MemformerLMConfig
from memformer_kernels.replay import memory_replay
from memformer_kernels.state import files
from memformer_kernels.training.settings import Settings

KIND = "training checkpoint"


class Trainer:
    """One run: a model, its optimiser, where it stands in the data, and the memory carried along the lanes."""

    def __init__(self, config: MemformerLMConfig, settings: Settings, task: Any, device: torch.device):
        torch.manual_seed(settings.seed)
        self.settings, self.task, self.device = settings, task, device
        self.model = MemformerLM(config).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
        )
        self.step_count = 0
        self.memory = self.model.initial_memory(settings.batch).detach().clone()

    @property
    def done(self) -> bool:
        return self.step_count >= self.settings.steps

    def step(self) -> float:
        """One rollout and one step of the optimiser; the mean loss of its counted segments, in nats a token."""
        s = self.settings
        horizon = s.horizon(self.step_count)
        segments = self.task.rollout(horizon)
        carried = self.memory if self.task.carries_memory and not s.twin else self.model.initial_memory(s.batch)
        with s.autocast(self.device):
            losses, memory = memory_replay(self._cell, segments, carried, method=s.method)
        counted = sum(bool((targets != -100).any()) for _, targets in segments)
        loss = torch.stack(losses).sum() / counted
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = s.rate(self.step_count)
        self.optimizer.step()
        self.memory = memory.detach()
        self.step_count += 1
        return loss.item()

    def _cell(self, segment: tuple[Tensor, Tensor], memory: Tensor) -> tuple[Tensor, Tensor]:
        if not self.settings.twin:
            return self.model.loss(segment, memory)
        return self.model.loss(segment, self.model.initial_memory(self.settings.batch))[0], memory

    def validate(self, *, everything: bool = False) -> dict[str, float]:
        """The task's figure of this model, with the memory carried and with it reset at each segment."""
        self.model.eval()
        try:
            with self.settings.autocast(self.device):
                reset = self.task.validate(self.model, reset=True, everything=everything)
                if self.settings.twin:
                    return {"reset": reset}
                return {"memory": self.task.validate(self.model, reset=False, everything=everything), "reset": reset}
        finally:
            self.model.train()

    def save(self, path: Path) -> None:
        """Everything that the rest of the run depends on, in one file, atomically."""
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": t for name, t in state.items()}
        tensors |= {"memory": self.memory, "random.cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
        files.save_tensors(path, tensors, self._description() | {"step": self.step_count, "task": self.task.state()})

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint of the same configuration and settings; raises `StateFileError` otherwise."""
        tensors, header = files.load_tensors(path, kind=KIND)
        for field, want in self._description().items():
            if header.get(field) != want:
                differing = _first_difference(want, header.get(field))
                raise files.StateFileError(f"{path}: is of another run: {field} must be {want!r}{differing}")
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "random": {}, "memory": {}}
        for name, tensor in tensors.items():
            group, _, rest = name.partition(".")
            groups.setdefault(group, {})[rest] = tensor
        expected = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        files.check_expected(path, {n: t for n, t in tensors.items() if n.startswith("model.")}, expected)
        self.task.load_state(header["task"])
        self.model.load_state_dict(groups["model"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in groups["optimizer"].items():
            index, _, field = name.partition(".")
            state.setdefault(int(index), {})[field] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.memory = tensors["memory"].to(self.device)
        self.step_count = header["step"]
        torch.set_rng_state(tensors["random.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)

    def _description(self) -> dict:
        config, settings = dataclasses.asdict(self.model.config), dataclasses.asdict(self.settings)
        return {"kind": KIND, "config": config, "settings": settings | {"horizons": list(self.settings.horizons)}}


def _first_difference(want: Any, got: Any) -> str:
    if isinstance(want, dict) and isinstance(got, dict):
        for field in want:
            if want[field] != got.get(field):
                return f", got {field} = {got.get(field)!r} instead of {want[field]!r}"
    return f", got {got!r}"
