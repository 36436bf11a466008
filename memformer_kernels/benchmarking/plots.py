"""The pictures of figures that were measured."""

import math
import re
from pathlib import Path

from memformer_kernels.benchmarking import peers
from memformer_kernels.benchmarking.compare import Comparison
from memformer_kernels.figures import OTHERS, OURS, new_figure, save

MOST_FLOORS = 8  # a longer bar is cut: the eager forms would squeeze all others
MIB = 2**20


def draw(report: dict, folder: Path) -> list[Path]:
    """Writes `<op>.png` for each op that has a time, and returns their paths: a column for each pass, a group of bars
    for each shape, as multiples of the shape's floor."""
    paths = []
    for op in dict.fromkeys(row["op"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["op"] == op and _times(row)]
        if rows:
            paths.append(folder / f"{op}.png")
            _draw_op(op, rows, report.get("machine", {}).get("gpu", ""), report["dtype"], paths[-1])
    return paths


def _times(row: dict) -> dict[str, float]:
    return {name: f["ms"] for name, f in row["results"].items() if f["ms"] is not None}


def _draw_op(op: str, rows: list[dict], gpu: str, dtype: str, path: Path) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    passes = list(dict.fromkeys(row["pass"] for row in rows))
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = list(dict.fromkeys(name for row in rows for name in _times(row)))
    names.sort(key=lambda name: name != peers.OURS)
    colors = dict(zip((n for n in names if n != peers.OURS), OTHERS, strict=False)) | {peers.OURS: OURS}
    height = 0.8 / len(names)
    size = (1.8 + 4.2 * len(passes), 1.6 + 0.17 * len(shapes) * (len(names) + 1))
    figure, axes = new_figure(len(passes), size, sharey=True)
    for axis, which in zip(axes, passes, strict=True):
        for row in (r for r in rows if r["pass"] == which):
            place = shapes.index(row["shape"])
            for name, ms in _times(row).items():
                y, floors = place - 0.4 + (names.index(name) + 0.5) * height, ms / row["floor_ms"]
                axis.barh(y, min(floors, MOST_FLOORS), height, color=colors[name])
                cut = " \u25b6" if floors > MOST_FLOORS else ""
                # not on the line of the floor
                axis.text(max(1, min(floors, MOST_FLOORS)), y, f"{cut}  {ms:.3f}", va="center", fontsize=6)
        axis.axvline(1, color="black", linewidth=1.2)
        axis.set(xlabel="times the floor; the numbers are ms", title=which, xlim=(0, MOST_FLOORS * 1.18))
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    axes[0].set_ylim(-0.6, len(shapes) - 0.4)
    axes[0].set_yticks(range(len(shapes)), shapes, fontsize=8)
    axes[0].invert_yaxis()
    handles = [Patch(color=colors[name], label=name) for name in names] + [Line2D([], [], color="black", label="floor")]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    figure.suptitle(f"{op}, {dtype}, {gpu}", fontsize=11)
    save(figure, path)


def draw_comparison(comparison: Comparison, title: str, path: Path) -> Path:
    """A bar a row from 1 to its ratio, the worst on top; red is slower."""
    rows = comparison.rows
    figure, (axis,) = new_figure(1, (9, 1.2 + 0.2 * len(rows)))
    ratios = [row.ratio for row in rows]
    colors = ["#c44e52" if ratio > 1 else "#55a868" for ratio in ratios]
    axis.barh(range(len(rows)), [ratio - 1 for ratio in ratios], left=1, height=0.7, color=colors)
    for place, ratio in enumerate(ratios):
        side = dict(ha="left") if ratio > 1 else dict(ha="right")
        axis.text(ratio, place, f" {ratio:.2f} ", va="center", fontsize=7, **side)
    axis.axvline(1, color="black", linewidth=1)
    axis.axvline(comparison.mean, color="grey", linestyle="--", label=f"geometric mean {comparison.mean:.3f}")
    away = max(0.05, *(abs(math.log(ratio)) for ratio in ratios)) * 1.25
    axis.set(xscale="log", xlim=(math.exp(-away), math.exp(away)), ylim=(len(rows) - 0.4, -0.6))
    _decimal_ticks(axis, math.exp(away))
    axis.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=7)
    axis.set(xlabel="time after / time before: right of 1 is slower")
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=8, loc="lower right")
    figure.suptitle(title, fontsize=10)
    return save(figure, path)


def _decimal_ticks(axis, most: float) -> None:
    """Few ticks, symmetrical round 1 on a logarithmic scale."""
    from matplotlib import ticker

    step = next((s for s in (1.02, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0) if s**4 >= most), most)
    ticks = [step**power for power in range(-4, 5)]
    axis.xaxis.set_major_locator(ticker.FixedLocator(ticks))
    axis.xaxis.set_major_formatter(ticker.FormatStrFormatter("%.2f"))
    axis.xaxis.set_minor_locator(ticker.NullLocator())


def draw_rollouts(report: dict, path: Path) -> Path:
    """Of `benchmarks/rollout.py`: for each shape time against peak memory; then time and memory over the horizon."""
    horizons = report.get("horizons")
    count = len(report["shapes"]) + 2 * bool(horizons)
    columns = min(count, 4)
    rows = -(-count // columns)
    figure, axes = new_figure(columns, (4.6 * columns, 0.8 + 3.8 * rows), rows)
    entries = {}
    for name, part in report["shapes"].items():
        axis = axes.pop(0)
        drawn = [row for row in part["rows"] if not re.search("recompute|expandable", row["run"])]
        _draw_shape(axis, [row for row in drawn if "ms" in row])
        axis.set(title=name, xlabel="peak memory (MiB)", ylabel="forward + backward (ms)")
        entries |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=min(5, len(entries)), fontsize=8)
    for key, label in (("ms", "forward + backward (ms)"), ("peak_MiB", "peak memory (MiB)")) if horizons else ():
        axis = axes.pop(0)
        for run in dict.fromkeys(row["run"] for row in horizons["rows"]):
            points = [row for row in horizons["rows"] if row["run"] == run and key in row]
            style = dict(color=_color(run), marker="o", markersize=4, label=run)
            axis.plot([p["horizon"] for p in points], [p[key] for p in points], **style)
        axis.set(title="long, other horizons", xlabel="segments", ylabel=label)
        axis.legend(fontsize=8)
        _logarithmic(axis)
        ticks = sorted({row["horizon"] for row in horizons["rows"]})
        axis.set_xticks(ticks, ticks)
    for axis in axes:
        axis.set_axis_off()
    figure.suptitle(f"{report['gpu']}, torch {report['torch']}, {report['dtype']}; lower and further left is better")
    return save(figure, path)


def _draw_shape(axis, rows: list[dict]) -> None:
    """A point for each run, and a line through the budgets of ours."""
    budgets = sorted((row["peak_MiB"], row["ms"]) for row in rows if "budget" in row["run"])
    if budgets:
        axis.plot(*zip(*budgets, strict=True), "o-", color=OURS, markersize=4, label="ours, budgets from 0 up")
    markers = {"plain": "s", "compiled": "^", "ours": "D"}
    for row in (row for row in rows if "budget" not in row["run"]):
        style = dict(color=_color(row["run"]), marker=markers[row["run"].split()[0]], markersize=7)
        if row["run"] == "ours replay":
            style |= dict(marker="*", markersize=13)
        axis.plot([row["peak_MiB"]], [row["ms"]], ls="", label=row["run"], **style)
    _logarithmic(axis)


def _color(run: str) -> str:
    """A colour is a method, a marker a way."""
    method = run.replace(",", "").split()[1]
    return OURS if run == "ours replay" else dict(zip(("bptt", "checkpoint", "replay"), OTHERS, strict=False))[method]


def _logarithmic(axis) -> None:
    """Both axes with a few ticks at round numbers, and room round the points."""
    from matplotlib import ticker

    axis.set(xscale="log", yscale="log")
    axis.margins(0.12)
    for side, (low, high) in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
        steps = (1, 1.5, 2, 3, 4, 5, 6, 8) if high < 4 * low else (1, 2, 5)
        side.set_major_locator(ticker.LogLocator(base=10, subs=steps, numticks=20))
        side.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        side.set_minor_locator(ticker.NullLocator())
    axis.grid(alpha=0.3)


def draw_replay_memory(report: dict, path: Path) -> Path:
    """Of `benchmarks/replay_memory.py`: peak memory over the horizon, a line a method."""
    rows = report["rows"]
    horizons = [row["horizon"] for row in rows]
    figure, (axis,) = new_figure(1, (6, 4))
    styles = ("o-", "s--", "^-", "v-")
    for method, style in zip(rows[0]["peak_bytes"], styles, strict=False):
        axis.plot(horizons, [row["peak_bytes"][method] / MIB for row in rows], style, label=method)
    kept = [row["stored_bytes"] / MIB for row in rows]
    axis.plot(horizons, kept, ":", color="grey", label="of replay's, the stored memories")
    title = f"{report['preset']}, batch {report['batch']}, {report['machine']}"
    axis.set(xlabel="segments", ylabel="peak memory (MiB)", title=title, xscale="log", yscale="log")
    axis.set_xticks(horizons, horizons)
    axis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:g}")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return save(figure, path)
