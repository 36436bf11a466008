"""A training run in a folder: metrics, checkpoints, a picture; stopped at any moment, it can go on.

<folder>/metrics.jsonl            one line a report: step, loss, tokens/s, and at validations the task's figures
<folder>/checkpoint.safetensors   all that the rest of the run depends on
<folder>/config.json, model.safetensors   the model, for `MemformerLM.from_pretrained`
<folder>/loss.png                 the curves
"""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

from memformer_kernels.state import files
from memformer_kernels.training.trainer import Trainer

Report = Callable[[dict], None]


class Interrupted(Exception):
    """The run was stopped by Ctrl-C, after saving."""


class RunFolder:
    def __init__(self, path: Path):
        self.path = path
        self.checkpoint = path / "checkpoint.safetensors"
        self.metrics = path / "metrics.jsonl"

    def check(self, resume: bool) -> None:
        """A run that lies here is never overwritten."""
        if self.checkpoint.exists() and not resume:
            raise FileExistsError(
                f"{self.path}: holds a run already; --resume goes on with it, --out names another folder"
            )

    def start(self, trainer: Trainer, resume: bool) -> None:
        """Takes up the run that lies here, or begins one."""
        self.check(resume)
        self.path.mkdir(parents=True, exist_ok=True)
        if resume and self.checkpoint.exists():
            trainer.load(self.checkpoint)
        if trainer.ranks.first:
            self._forget_after(trainer.step_count)

    def save(self, trainer: Trainer) -> None:
        trainer.save(self.checkpoint)
        weights = trainer.weights()
        if trainer.ranks.first:
            trainer.model.save_pretrained(self.path, state_dict=weights)
        trainer.ranks.wait()  # a rank that leaves has torchrun end the others, and this would be cut short

    def log(self, row: dict) -> None:
        with open(self.metrics, "a") as file:
            file.write(json.dumps(row) + "\n")

    def rows(self) -> list[dict]:
        """What was logged. A last line that was cut short, by a crash, is none."""
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                if number < len(lines):
                    raise ValueError(f"{self.metrics}: line {number} is no JSON: {error}") from None
        return rows

    def _forget_after(self, step: int) -> None:
        """Rows written after the checkpoint belong to steps that will be made again."""
        kept = [row for row in self.rows() if row["step"] <= step and not row.get("final")]
        files.write_atomically(self.metrics, "".join(json.dumps(row) + "\n" for row in kept).encode())


def run(
    trainer: Trainer,
    folder: RunFolder,
    *,
    resume: bool = False,
    report: Report = lambda row: None,
    report_every: int = 10,
    validate_every: int = 250,
    save_every: int = 250,
    time_limit: float | None = None,
) -> dict[str, float]:
    """Trains to the end, or until `time_limit` seconds have passed, and returns the last validation, on all of it.

    `report` gets every row of the metrics. Ctrl-C finishes the step, saves and raises `Interrupted`; a second Ctrl-C
    stops at once, with the last checkpoint intact. Of many ranks the first one reports and writes, and all stop at the
    same step.
    """
    for name, every in (("validate-every", validate_every), ("save-every", save_every)):
        if every < 1:
            raise ValueError(f"train: {name} must be at least 1, got {every}")
    ranks = trainer.ranks
    folder.start(trainer, resume)

    def tell(row: dict) -> None:
        if ranks.first:
            folder.log(row)
            report(row)

    clock = _Clock(trainer)
    with _CtrlC() as ctrl_c:
        while not trainer.done:
            loss = trainer.step()
            pressed, late = ranks.any(ctrl_c.pressed, time_limit is not None and clock.elapsed > time_limit)
            last = trainer.done or late
            if last or trainer.step_count % report_every == 0:
                row = {"step": trainer.step_count, "loss": loss, "tokens_per_second": clock.rate()}
                if not last and trainer.step_count % validate_every == 0:
                    row |= trainer.validate()
                    clock.pause()
                tell(row)
            if pressed or (not last and trainer.step_count % save_every == 0):
                folder.save(trainer)
            if pressed:
                raise Interrupted(f"saved after step {trainer.step_count} of {trainer.settings.steps}")
            if last:
                break
        figures = trainer.validate(everything=True)
        row = {"step": trainer.step_count, "final": True, "seconds": round(clock.elapsed, 1), **figures}
        tell(row)
        folder.save(trainer)
    return figures


class _Clock:
    """Tokens per second since the last look, and seconds since the start, validation included."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.started = trainer, time.perf_counter()
        self.pause()

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def pause(self) -> None:
        self.since, self.step = time.perf_counter(), self.trainer.step_count

    def rate(self) -> float:
        t = self.trainer
        if t.device.type == "cuda":
            torch.cuda.synchronize(t.device)
        s, longest = t.settings, t.model.config.segment_length
        steps = range(self.step, t.step_count)
        tokens = sum(s.horizon(step) * s.length(step, longest) for step in steps) * s.batch
        seconds = time.perf_counter() - self.since
        self.pause()
        return round(tokens / seconds, 1)


class _CtrlC:
    """Ctrl-C as a wish, so that a step is never cut in the middle; the second one is the usual exception."""

    def __enter__(self) -> "_CtrlC":
        self.pressed = False
        try:
            self.before = signal.signal(signal.SIGINT, self._press)
        except ValueError:  # not the main thread: Ctrl-C does not come here
            self.before = None
        return self

    def _press(self, *_) -> None:
        self.pressed = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_) -> None:
        if self.before is not None:
            signal.signal(signal.SIGINT, self.before)
