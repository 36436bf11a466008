"""States of the sources side by side: each is built, and then `memformer-kernels bench` runs in all of them in turns.

    git worktree add /tmp/before HEAD~1
    python benchmarks/variants.py before=/tmp/before after=. -- --op read --pass forward --only D96
    python benchmarks/variants.py a=. b=/tmp/b --rounds 5 --out variants.json -- --op write --hidden 0.3

What follows `--` goes to `bench`; peers are left out. A folder holds a whole tree, or parts of one, `csrc/` say, that
take the place of this tree's. A time is the median of the rounds: clocks and temperature drift from one to the next, so
that each variant runs once in every round. The ratio is to the first variant; above 1 is slower.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from memformer_kernels.benchmarking import results

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("memformer_kernels", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE")
IGNORED = shutil.ignore_patterns("__pycache__", "*.so", "build", "_build_info.json")


def lay_out(source: Path, target: Path) -> None:
    """What of a tree is needed to build and import it: from `source` what it has, the rest from here."""
    if not any((source / part).exists() for part in PARTS):
        raise SystemExit(f"variants: {source} must hold one of {', '.join(PARTS)}")
    target.mkdir(parents=True)
    for part in PARTS:
        origin = source / part if (source / part).exists() else ROOT / part
        if origin.is_dir():
            shutil.copytree(origin, target / part, ignore=IGNORED)
        else:
            shutil.copy(origin, target / part)


def build(tree: Path) -> None:
    environment = os.environ | {"MEMFORMER_KERNELS_CUDA": "1"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"variants: {tree.name} cannot be built:\n{(done.stdout + done.stderr)[-2000:]}")


def measure(tree: Path, arguments: Sequence[str], out: Path) -> dict[str, float]:
    """Milliseconds by row, of one run of `bench` in a process that imports the tree."""
    command = [sys.executable, "-m", "memformer_kernels.cli", "bench", "--quick", "--no-peers", "--out", str(out)]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run([*command, *arguments], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"variants: bench failed in {tree.name}:\n{(done.stdout + done.stderr)[-2000:]}")
    return results.times(results.read(out / "bench.json"), out / "bench.json")


def table_of(times: dict[str, dict[str, list[float]]]) -> Table:
    """times: of each row, by variant, one for each round."""
    first, *others = next(iter(times.values()))
    table = Table(title="microseconds, medians of the rounds, and over the first", title_justify="left")
    table.add_column("row")
    for name in (first, *others):
        table.add_column(name, justify="right", no_wrap=True)
    for row, by_variant in times.items():
        us = {name: statistics.median(rounds) * 1e3 for name, rounds in by_variant.items()}
        if first not in us:  # a call that only others have
            us[first] = math.nan
        cells = [f"{us[name]:.1f} ({us[name] / us[first]:.3f})" if name in us else "" for name in others]
        table.add_row(row, f"{us[first]:.1f}", *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="+", metavar="NAME=FOLDER", help="the first is what the others are held to")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each variant; default 3")
    parser.add_argument("--out", type=Path, help="write the times here, as JSON")
    own, arguments = sys.argv[1:], []
    if "--" in own:
        own, arguments = own[: own.index("--")], own[own.index("--") + 1 :]
    options = parser.parse_args(own)
    named = dict(text.partition("=")[::2] for text in options.variants)
    if len(named) != len(options.variants) or not all(named.values()):
        parser.error("each variant must be NAME=FOLDER, the names different")
    if not torch.cuda.is_available():
        sys.exit("variants: needs a GPU; a CPU measures nothing here")
    times: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        trees = {name: Path(folder, name) for name in named}
        for name, tree in trees.items():
            lay_out(Path(named[name]).resolve(), tree)
        with ThreadPoolExecutor() as pool:
            list(pool.map(build, trees.values()))
        for turn in range(options.rounds):
            for name, tree in trees.items():
                print(f"round {turn + 1} of {options.rounds}: {name}", flush=True)
                for row, ms in measure(tree, arguments, Path(folder, f"{name} {turn}")).items():
                    times.setdefault(row, {}).setdefault(name, []).append(ms)
                if options.out:
                    options.out.write_text(json.dumps({"variants": named, "bench": arguments, "ms": times}, indent=1))
    Console(highlight=False).print(table_of(times))


if __name__ == "__main__":
    main()
