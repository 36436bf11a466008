"""`train`: from options to a job, from a job to a run with its progress, table and picture."""

import dataclasses
import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from memformer_kernels.cli import plots
from memformer_kernels.cli.options import to_stdout, write_json
from memformer_kernels.data import RecallTask, Text
from memformer_kernels.models import PRESETS, MemformerLMConfig
from memformer_kernels.state import StateFileError, files
from memformer_kernels.training import Settings, Trainer
from memformer_kernels.training.ranks import Ranks, joined
from memformer_kernels.training.run import RunFolder, run
from memformer_kernels.training.tasks import RecallTraining, TextTask

console = Console()

DEFAULTS = {
    "text": (MemformerLMConfig(slots=32, segment_length=32), Settings()),
    "recall": (
        replace(PRESETS["recall"], vocabulary=RecallTask.vocabulary),
        Settings(steps=400, batch=32, horizons=(2, 4), learning_rate=1e-3, warmup=20),
    ),
}


@dataclass(frozen=True)
class Job:
    """All that makes up a run: it is written to `job.json` in the run's folder, for `--resume`."""

    task: str
    paths: list[str]
    config: MemformerLMConfig
    settings: Settings

    @classmethod
    def make(cls, task: str, paths: list[str], config: dict, settings: dict) -> "Job":
        """The task's defaults with the given fields changed."""
        if task not in DEFAULTS:
            raise ValueError(f"train: task must be one of {', '.join(DEFAULTS)}, got {task!r}")
        if task == "recall" and paths:
            raise ValueError(f"train: the recall task makes its own data; leave out {paths[0]}")
        default_config, default_settings = DEFAULTS[task]
        if "width" in config:
            config = {"hidden": 4 * config["width"], **config}
        absolute = [str(Path(p).resolve()) for p in paths]
        return cls(task, absolute, replace(default_config, **config), replace(default_settings, **settings))

    @classmethod
    def load(cls, folder: Path) -> "Job":
        path = folder / "job.json"
        try:
            fields = json.loads(path.read_text())
            listed = {name: tuple(value) for name, value in fields["settings"].items() if isinstance(value, list)}
            settings = Settings(**{**fields["settings"], **listed})
            return cls(fields["task"], fields["paths"], MemformerLMConfig(**fields["config"]), settings)
        except FileNotFoundError:
            raise FileNotFoundError(f"{folder}: holds no run to resume; leave --resume out to begin one") from None
        except (ValueError, TypeError, KeyError) as error:
            raise StateFileError(f"{path}: damaged: {error!r}") from None

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_atomically(folder / "job.json", (json.dumps(dataclasses.asdict(self), indent=2) + "\n").encode())

    @property
    def unit(self) -> str:
        return (RecallTraining if self.task == "recall" else TextTask).unit

    def twin(self) -> "Job":
        return replace(self, settings=replace(self.settings, twin=True))

    def trainer(self, device: torch.device, ranks: Ranks | None = None) -> Trainer:
        s, length = self.settings, self.config.segment_length
        if self.task == "recall":
            task = RecallTraining(s.batch, length, s.horizons[-1], device, s.seed)
        else:
            text = Text.read(self.paths)
            skipped = f", {text.skipped} binary files left out" if text.skipped else ""
            console.print(
                f"text: {text.files} files{skipped}; {decimal(len(text.train))} to train on, "
                f"{decimal(len(text.validation))} held out"
            )
            task = TextTask(text, s.batch, length, device)
        return Trainer(self.config, s, task, device, ranks)


def train(
    job: Job,
    out: Path,
    *,
    device: torch.device,
    shard: bool = False,
    resume: bool = False,
    compare: bool = False,
    minutes: float | None = None,
    json_file: Path | None = None,
    **every: int,
) -> dict[str, float]:
    """Trains, and with `compare` the twin too; prints a table, draws `loss.png`, returns the figures.

    Started by torchrun it trains over all its ranks, of which the first one prints, writes and draws.
    """
    if compare and minutes is not None:
        raise ValueError("train: --minutes would stop the twin at another step than the model; --compare takes --steps")
    console.stderr = to_stdout(json_file)
    with joined(device, shard=shard) as ranks:
        console.quiet = not ranks.first
        figures = _train_one("with memory", job, out, ranks, resume, minutes, every)
        if compare:
            figures["twin"] = _train_one("twin", job.twin(), out / "twin", ranks, resume, minutes, every)["reset"]
        if ranks.first:
            plots.draw_curves(out, job.unit)
            write_json({"run": str(out), "unit": job.unit, **figures}, json_file)
    console.print(figures_table(figures, job.unit))
    console.print(
        f"written to {out}: loss.png, metrics.jsonl, checkpoint.safetensors, model.safetensors", highlight=False
    )
    if job.task == "text":
        console.print(f"try: memformer-kernels generate {out}", highlight=False, soft_wrap=True)
    return figures


def _train_one(
    name: str, job: Job, out: Path, ranks: Ranks, resume: bool, minutes: float | None, every: dict
) -> dict[str, float]:
    folder = RunFolder(out)
    folder.check(resume)
    trainer = job.trainer(ranks.device, ranks)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    where = str(ranks.device) if ranks.world == 1 else f"{ranks.world} ranks, {ranks.device.type}"
    console.print(f"{name}: {parameters / 1e6:.2f} M parameters on {where}, {job.settings.steps} steps -> {out}")
    if ranks.first:
        job.save(out)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[news]}"))
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=console.quiet) as progress:
        bar = progress.add_task(name, total=job.settings.steps, news="")

        def report(row: dict) -> None:
            if "loss" in row:
                news = f"loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tokens/s"
                progress.update(bar, completed=row["step"], news=news)
            if "reset" in row:
                progress.console.print(f"  step {row['step']}: " + _figures_line(row, job.unit), highlight=False)
                plots.draw_curves(out, job.unit)

        seconds = None if minutes is None else minutes * 60
        return run(trainer, folder, resume=resume, report=report, time_limit=seconds, **every)


def _figures_line(row: dict, unit: str) -> str:
    named = {"memory": "with memory", "reset": "reset at each segment"}
    return f"{unit} " + ", ".join(f"{row[key]:.4f} {name}" for key, name in named.items() if key in row)


def figures_table(figures: dict[str, float], unit: str) -> Table:
    table = Table(title=f"held out: {unit}", title_justify="left")
    table.add_column("model")
    table.add_column(unit, justify="right")
    names = {
        "memory": "with memory",
        "reset": "the same, memory reset at each segment",
        "twin": "twin trained without memory",
    }
    for key, name in names.items():
        if key in figures:
            table.add_row(name, f"{figures[key]:.4f}")
    return table
