"""Files of figures: which kind one is, and the times in it."""

import json
import math
from pathlib import Path

from memformer_kernels.benchmarking.peers import OURS

# A kind and the fields that only its files have together.
KINDS = {
    "ops": ("rows", "rates"),  # memformer-kernels bench
    "counters": ("counters", "ncu"),  # benchmarks/counters.py
    "read forms": ("forms", "ms"),  # benchmarks/read_forms.py
    "rollouts": ("shapes", "dtype"),  # benchmarks/rollout.py
    "accelerated": ("shapes", "memformer"),  # benchmarks/accelerate_memformer.py
    "cross attention": ("attention", "bart"),  # benchmarks/cross_attention.py
    "contract": ("guarantees",),  # make test, tests/gpu/check_contract.py
    "mutants": ("planted", "killed"),  # tests/mutants
    "streaming": ("reading", "decoding"),  # benchmarks/streaming.py
    "scaling": ("efficiency", "step_seconds"),  # benchmarks/scaling.py
    "replay memory": ("rows", "preset"),  # benchmarks/replay_memory.py
    "memory gain": ("runs", "bits_per_byte"),  # benchmarks/memory_gain.py
    "forgetting": ("half_life", "recall"),  # benchmarks/forgetting.py
    "demo": ("recall", "bits_per_byte", "peak_bytes"),  # memformer-kernels demo
    "checks": ("checks",),  # tests/gpu/check_*.py
    "errors": ("rows", "device"),  # memformer-kernels check
}


def read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold an object of figures, got {type(content).__name__}")
    return content


def kind(content: dict) -> str | None:
    """The first of `KINDS` whose fields are all there; None for a file of another program."""
    return next((name for name, fields in KINDS.items() if all(field in content for field in fields)), None)


def times(content: dict, path: Path) -> dict[str, float]:
    """Milliseconds of ours by row; NaN where a row was tried and has no time."""
    if kind(content) == "ops":
        found = {_row_name(row): row["results"].get(OURS, {}).get("ms") for row in content["rows"]}
    elif kind(content) == "rollouts":
        parts = content["shapes"].items()
        found = {f"{shape}: {row['run']}": row.get("ms") for shape, part in parts for row in part["rows"]}
    else:
        raise ValueError(
            f"{path}: holds no times; `memformer-kernels bench` and benchmarks/rollout.py write such files"
        )
    return {name: math.nan if ms is None else ms for name, ms in found.items()}


def machine(content: dict) -> str:
    """What the figures were measured on and with, in one line; "" where the file does not say."""
    about = {**content, **content.get("machine", {})} if isinstance(content.get("machine"), dict) else content
    parts = [about.get("gpu") or about.get("device") or ""]
    parts += [f"{name} {about[name]}" for name in ("torch", "triton", "cuda", "cudnn") if about.get(name)]
    parts += [str(about[name]) for name in ("dtype", "layout") if about.get(name)]
    parts += [f"{about['hidden']:g} hidden"] if about.get("hidden") else []
    parts += ["deterministic"] if about.get("deterministic") else []
    return ", ".join(part for part in parts if part)


def _row_name(row: dict) -> str:
    return f"{row['op']} {row['pass']} {row['shape']}"
