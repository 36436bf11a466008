"""What the memory is worth on real text: bits per byte with it, with it reset, and of a twin trained without it.

Three models at equal parameters, data and steps, over several seeds. Only the twin is evidence of a gain: a model
trained with memory suffers when it is taken away, which shows that it uses it.

    python benchmarks/memory_gain.py --recipe L32 --device cpu --jobs 2 --out memory_gain_L32.json
    python benchmarks/memory_gain.py --recipe L128 --jobs 2  # of two GPUs, each takes one job

What helped and what did not, in finding the recipes, stands in docs/memory_gain.md.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from memformer_kernels import MemformerLMConfig
from memformer_kernels.data import Text
from memformer_kernels.training import Settings, Trainer
from memformer_kernels.training.run import RunFolder, run
from memformer_kernels.training.tasks import TextTask

RECIPES = {
    "L32": (
        MemformerLMConfig(slots=32, segment_length=32),
        Settings(steps=800, batch=16, horizons=(12,), learning_rate=3e-3, method="bptt"),
    ),
    "L64": (
        MemformerLMConfig(slots=16, segment_length=64),
        Settings(steps=1400, batch=16, horizons=(6,), learning_rate=2e-3, method="bptt"),
    ),
    "L128": (
        MemformerLMConfig(width=256, heads=8, hidden=1024, layers=4, slots=64, segment_length=128),
        Settings(steps=8000, batch=32, horizons=(4,), restart=0.03, learning_rate=1e-3, precision="bfloat16"),
    ),
}


def take_gpu(numbers: multiprocessing.Queue) -> None:
    """Of a worker, for all its jobs."""
    torch.cuda.set_device(numbers.get())


def one(recipe: str, seed: int, twin: bool, device_name: str, threads: int) -> dict:
    """Trains one model; its figures on all held-out bytes."""
    torch.set_num_threads(threads)
    config, settings = RECIPES[recipe]
    settings = replace(settings, seed=seed, twin=twin)
    device, text = torch.device(device_name), Text.read()
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    trainer = Trainer(config, settings, TextTask(text, settings.batch, config.segment_length, device), device)

    def report(row: dict) -> None:
        if row["step"] % 250 == 0 or "final" in row:
            print(json.dumps({"recipe": recipe, "seed": seed, "twin": twin, **row}), flush=True)

    started = time.perf_counter()
    with TemporaryDirectory() as folder:
        figures = run(trainer, RunFolder(Path(folder)), report=report, validate_every=settings.steps)
    minutes = round((time.perf_counter() - started) / 60, 2)
    sizes = {"train_bytes": len(text.train), "validation_bytes": len(text.validation)}
    return {"seed": seed, "twin": twin, "minutes": minutes, **sizes, **figures}


def summary(rows: list[dict]) -> dict:
    """Mean and standard deviation over the seeds, and the gain over the twin of the same seed."""
    memory = {row["seed"]: row for row in rows if not row["twin"]}
    twin = {row["seed"]: row for row in rows if row["twin"]}
    figures = {
        "memory": [row["memory"] for row in memory.values()],
        "reset": [row["reset"] for row in memory.values()],
        "twin": [row["reset"] for row in twin.values()],
        "gain": [twin[seed]["reset"] - memory[seed]["memory"] for seed in memory.keys() & twin.keys()],
    }
    return {
        name: {"mean": statistics.mean(v), "stdev": statistics.stdev(v) if len(v) > 1 else None, "runs": v}
        for name, v in figures.items()
        if v
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, default="L32")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=1, help="models trained at the same time")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each")
    parser.add_argument("--out", type=Path, help="write runs and summary here as JSON, anew after every run")
    options = parser.parse_args()
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    config, settings = RECIPES[options.recipe]
    report = {
        "command": f"python benchmarks/memory_gain.py --recipe {options.recipe} --device {device.type} "
        f"--jobs {options.jobs} --threads {options.threads}",
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "model": asdict(config),
        "settings": asdict(settings),
    }
    rows = []
    context = multiprocessing.get_context("spawn")
    numbers, take = context.Queue(), {}
    if on_gpu:
        for job in range(options.jobs):
            numbers.put(job % torch.cuda.device_count())
        take = {"initializer": take_gpu, "initargs": (numbers,)}
    with ProcessPoolExecutor(options.jobs, mp_context=context, **take) as pool:
        jobs = [
            pool.submit(one, options.recipe, seed, twin, options.device, options.threads)
            for seed in options.seeds
            for twin in (False, True)
        ]
        for job in as_completed(jobs):
            rows.append(job.result())
            report |= {"runs": sorted(rows, key=lambda r: (r["seed"], r["twin"])), "bits_per_byte": summary(rows)}
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report["bits_per_byte"], indent=2))


if __name__ == "__main__":
    main()
