"""The training loop's state and step; saved and loaded so that a resumed run is the same run, bit for bit."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memformer_kernels.models import MemformerLM, MemformerLMConfig
from memformer_kernels.replay import CapturedCell, memory_replay
from memformer_kernels.state import files
from memformer_kernels.training.ranks import Ranks, dealt
from memformer_kernels.training.settings import Settings

KIND = "training checkpoint"


class Trainer:
    """One run: a model, its optimiser, where it stands in the data, and the memory carried along the lanes.

    Of many `ranks` each has a trainer, the same but for its lanes; all of them step, validate, save and load together.
    """

    def __init__(
        self, config: MemformerLMConfig, settings: Settings, task: Any, device: torch.device, ranks: Ranks | None = None
    ):
        if max(settings.lengths, default=0) > config.segment_length:
            longest = f"segment_length, {config.segment_length}"
            raise ValueError(f"train: lengths must be at most the model's {longest}, got {settings.lengths}")
        torch.manual_seed(settings.seed)
        self.settings, self.task, self.device = settings, task, device
        self.ranks = ranks or Ranks(device)
        self.lanes = self.ranks.lanes(settings.batch)
        self.model = MemformerLM(config).to(device)
        cell = _memoryless(self.model) if settings.twin else self.model.cell
        # sharded parameters lie elsewhere in every step, so that graphs would be recorded anew
        self.cell = cell if self.ranks.shard else CapturedCell(cell)
        self.memory = self.model.initial_memory(settings.batch)[self.lanes].detach().clone()
        self.rollout = self.ranks.wrap(Rollout(self.model, self.cell, settings.method))
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=settings.weight_decay,
            fused=device.type == "cuda",
        )
        self.step_count = 0
        if not self.ranks.first:  # dropout is another on each
            self.ranks.set_random({}, settings.seed, self.step_count)

    @property
    def done(self) -> bool:
        return self.step_count >= self.settings.steps

    def step(self) -> float:
        """One rollout and one step of the optimiser; the mean loss of its counted segments, in nats a token."""
        s, lanes = self.settings, self.lanes
        size = s.horizon(self.step_count), s.length(self.step_count, self.model.config.segment_length)
        segments = [(x[lanes], y[lanes]) for x, y in self.task.rollout(*size)]
        carried = self.memory if self.task.carries_memory and not s.twin else None
        restarted = None
        if s.restart and carried is not None:
            restarted = torch.rand(len(carried), device=self.device) < s.restart
        with s.autocast(self.device):
            loss, memory = self.rollout(segments, carried, restarted)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), s.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = s.rate(self.step_count)
        self.optimizer.step()
        self.memory = memory
        self.step_count += 1
        return self.ranks.mean(loss)

    def validate(self, *, everything: bool = False) -> dict[str, float]:
        """The task's figure of this model, with the memory carried and with it reset at each segment."""
        self.model.eval()
        try:
            with self.ranks.whole(self.rollout), self.settings.autocast(self.device):
                reset = self.task.validate(self.model, reset=True, everything=everything)
                if self.settings.twin:
                    return {"reset": reset}
                return {"memory": self.task.validate(self.model, reset=False, everything=everything), "reset": reset}
        finally:
            self.model.train()

    def weights(self) -> dict[str, Tensor]:
        """The model's `state_dict` on the CPU; of many ranks the first gets it."""
        return self.ranks.gather_shards(self.model.state_dict())

    def save(self, path: Path) -> None:
        """Everything that the rest of the run depends on, in one file, atomically; written by the first rank."""
        tensors = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": t for name, t in state.items()}
        tensors = self.ranks.gather_shards(tensors)
        tensors |= {f"random.{name}": t for name, t in self.ranks.gather_random().items()}
        tensors["memory"] = torch.cat(self.ranks.gather(self.memory))
        if self.ranks.first:
            header = self._description() | {"step": self.step_count, "task": self.task.state()}
            files.save_tensors(path, tensors, header)

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint of the same configuration and settings; raises `StateFileError` otherwise.

        With as many ranks as saved it, bit for bit as if never stopped; with another number to rounding, and dropout
        is another.
        """
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
        held = self.model.state_dict()
        self.model.load_state_dict({name: dealt(t, held[name]) for name, t in groups["model"].items()})
        parameters = list(self.model.parameters())
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in groups["optimizer"].items():
            index, _, field = name.partition(".")
            state.setdefault(int(index), {})[field] = dealt(tensor, parameters[int(index)])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.memory = tensors["memory"][self.lanes].to(self.device)
        self.step_count = header["step"]
        self.ranks.set_random(groups["random"], self.settings.seed, self.step_count)

    def _description(self) -> dict:
        settings = dataclasses.asdict(self.settings)
        settings |= {name: list(value) for name, value in settings.items() if isinstance(value, tuple)}
        return {"kind": KIND, "config": dataclasses.asdict(self.model.config), "settings": settings}


class Rollout(nn.Module):
    """What a step differentiates, as one module: whatever is wrapped around it reduces the gradients once a step."""

    def __init__(self, model: MemformerLM, cell: Callable, method: str):
        super().__init__()
        self.model, self.cell, self.method = model, cell, method

    def forward(
        self, segments: list[tuple[Tensor, Tensor]], memory: Tensor | None, restarted: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The mean loss of the counted segments, and the memory after the last; from the initial memory where that
        before is None, or a lane is `restarted`, bool [B]."""
        initial = self.model.initial_memory(len(segments[0][0]))
        if memory is None:
            memory = initial
        elif restarted is not None:
            memory = torch.where(restarted[:, None, None], initial, memory)
        total, memory = memory_replay(self.cell, segments, memory, method=self.method, reduction="sum")
        counted = torch.stack([(targets != -100).any() for _, targets in segments]).sum()
        return total / counted, memory.detach()


def _memoryless(model: MemformerLM) -> Callable:
    """The twin's cell: it never reads what was written."""

    def cell(segment: tuple[Tensor, Tensor], memory: Tensor) -> tuple[Tensor, Tensor]:
        return model.loss(segment, model.initial_memory(len(segment[0])))[0], memory

    return cell


def _first_difference(want: Any, got: Any) -> str:
    if isinstance(want, dict) and isinstance(got, dict):
        for field in want:
            if want[field] != got.get(field):
                return f", got {field} = {got.get(field)!r} instead of {want[field]!r}"
    return f", got {got!r}"
