"""Draws what benchmarks/rollout.py measured.

python benchmarks/rollout_plot.py benchmarks/results/rollout_h200.json docs/images/rollout_h200.png
"""

import argparse
import json
from pathlib import Path

from matplotlib import pyplot, ticker

KINDS = {"plain": ("plain PyTorch", "tab:blue", "s"), "compiled": ("torch.compile", "tab:orange", "^")}
KINDS |= {"no graphs": ("ours without graphs", "tab:gray", "v"), "ours": ("ours", "tab:red", "o")}
COLUMNS = 4


def draw(report: dict, path: Path) -> None:
    panels = [(_time_over_memory, name, part["rows"]) for name, part in report["shapes"].items()]
    if "horizons" in report:
        rows = report["horizons"]["rows"]
        panels += [(_over_horizons, "ms", rows), (_over_horizons, "peak_MiB", rows)]
    lines = -(-len(panels) // COLUMNS)
    width = min(len(panels), COLUMNS)
    figure, axes = pyplot.subplots(
        lines, width, figsize=(4.3 * width, 3.7 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (draw_panel, *about) in zip(axes.flat, panels, strict=False):
        draw_panel(axis, *about)
    figure.suptitle(f"forward and backward of a rollout: {report['gpu']}, torch {report['torch']}, {report['dtype']}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _kind(run: str) -> str:
    return next(kind for kind in ("no graphs", "plain", "compiled", "ours") if kind in run)


def _time_over_memory(axis, name: str, rows: list[dict]) -> None:
    """One point a run; those of ours that differ in their budget alone are joined."""
    rows = [row for row in rows if "ms" in row and "recompute" not in row["run"]]
    for kind, (label, color, marker) in KINDS.items():
        found = sorted((row for row in rows if _kind(row["run"]) == kind), key=lambda row: row["peak_MiB"])
        if found:
            points = [row["peak_MiB"] for row in found], [row["ms"] for row in found]
            axis.plot(*points, marker=marker, color=color, ls="-" if kind == "ours" else "", label=label)
        for row in found:
            if "budget" not in row["run"]:
                method = row["run"].removeprefix("plain ").removeprefix("compiled ").removeprefix("ours ")
                far = row["peak_MiB"] > 2 * min(r["peak_MiB"] for r in rows)
                below = kind in ("compiled", "ours") or method == "replay"
                place = dict(ha="right" if far else "left", va="top" if below else "bottom")
                offset = (-5 if far else 5, -3 if below else 3)
                text = method.removesuffix(", no graphs")
                axis.annotate(
                    text,
                    (row["peak_MiB"], row["ms"]),
                    offset,
                    textcoords="offset points",
                    fontsize=8,
                    color=color,
                    **place,
                )
    axis.set(title=name, xlabel="peak memory (MiB)", ylabel="ms")
    axis.margins(0.14)
    _in_powers_of_two(axis)


def _over_horizons(axis, key: str, rows: list[dict]) -> None:
    for run in dict.fromkeys(row["run"] for row in rows):
        points = [row for row in rows if row["run"] == run]
        label, color, marker = KINDS[_kind(run)]
        style = {"plain checkpoint": ":", "plain replay": "--"}.get(run, "-")
        label = f"{label}, {run.split(' ', 1)[1]}"
        values = [p["horizon"] for p in points], [p[key] for p in points]
        axis.plot(*values, marker=marker, ms=4, color=color, ls=style, label=label)
    what = {"ms": "time", "peak_MiB": "memory"}[key]
    unit = {"ms": "ms", "peak_MiB": "peak memory (MiB)"}[key]
    axis.set(title=f"long, {what} over the horizon", xlabel="segments", ylabel=unit)
    _in_powers_of_two(axis)


def _in_powers_of_two(axis) -> None:
    axis.set(xscale="log", yscale="log")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(ticker.LogLocator(base=2))
        side.set_major_formatter(ticker.FormatStrFormatter("%d"))
        side.set_minor_locator(ticker.NullLocator())
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="what rollout.py --out wrote")
    parser.add_argument("picture", type=Path)
    given = parser.parse_args()
    draw(json.loads(given.results.read_text()), given.picture)
