"""What a run leaves behind: the table, the summary, `bench.json`, `bench.csv`, and a picture an op."""

import csv
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from memformer_kernels.benchmarking.peers import OURS

RESULT_COLUMNS = (
    "ms",
    "method",
    "host_us",
    "wall_us",
    "error",
    "same_bits",
    "sets",
    "calls",
    "first_call_s",
    "problem",
    "note",
)
ROW_COLUMNS = ("op", "pass", "shape", "group", "floor_ms", "floor_without_output_ms", "bound", "bytes", "flop")


FILE = "bench.json"
SAME_MACHINE = ("gpu", "torch", "triton", "cuda", "cudnn")


def read(folder: Path) -> dict | None:
    """The report in `folder`; None where there is none."""
    file = folder / FILE
    return json.loads(file.read_text()) if file.exists() else None


def joined(before: dict | None, report: dict) -> dict:
    """`report`, with what `before` has of other rows; a ValueError where they are not of one machine and dtype."""
    if before is None:
        return report
    for name, was, now in (
        *((name, before.get(name), report[name]) for name in ("dtype", "layout")),
        ("hidden", before.get("hidden", 0.0), report["hidden"]),
        ("deterministic", before.get("deterministic", False), report["deterministic"]),
        *((name, before["machine"].get(name), report["machine"][name]) for name in SAME_MACHINE),
    ):
        if was != now:
            raise ValueError(f"bench: {FILE} must be of the same {name} ({was}) to take these rows, got {now}")
    return {
        **report,
        "command": "; ".join(dict.fromkeys([*before["command"].split("; "), report["command"]])),
        "rows": _others(before["rows"], report["rows"], ("op", "pass", "shape")),
        "overhead": _others(before["overhead"], report["overhead"], ("op", "shape", "implementation")),
    }


def _others(before: list[dict], now: list[dict], names: tuple[str, ...]) -> list[dict]:
    again = {tuple(row[name] for name in names) for row in now}
    return [row for row in before if tuple(row[name] for name in names) not in again] + now


def write_json(report: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(report, indent=2) + "\n")


def write_csv(report: dict, folder: Path) -> None:
    """One line for each op, pass, shape and implementation."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "bench.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow((*ROW_COLUMNS, "implementation", *RESULT_COLUMNS))
        for row in report["rows"]:
            for name, figures in row["results"].items():
                values = [row[c] for c in ROW_COLUMNS] + [name] + [figures.get(c) for c in RESULT_COLUMNS]
                writer.writerow(["" if value is None else value for value in values])


def print_report(report: dict, summary: list[dict], console: Console) -> None:
    for op in dict.fromkeys(row["op"] for row in report["rows"]):
        console.print(_table(op, [row for row in report["rows"] if row["op"] == op]))
    for text in _problems(report):
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    for line in summary:
        console.print(summary_text(line), markup=False, highlight=False, soft_wrap=True)


def _table(op: str, rows: list[dict]) -> Table:
    table = Table(title=f"{op}: device milliseconds a call", title_justify="left")
    for column in ("pass", "shape"):
        table.add_column(column, no_wrap=True)
    for column in ("ours", "floor", "of floor", "best peer"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("which", no_wrap=True)
    for column in ("ratio", "eager us", "best's"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        mine = row["results"].get(OURS, {})
        best = row["results"].get(row["best_peer"], {})
        table.add_row(
            row["pass"],
            row["shape"],
            _number(mine.get("ms"), ".4f", mine.get("method")),
            _number(row["floor_ms"], ".4f"),
            _number(row["share_of_floor"], ".2f"),
            _number(best.get("ms"), ".4f", best.get("method")),
            f"{row['best_peer'] or '-'}{'~' * (best.get('same_bits') is False)}",
            _number(row["ratio"], ".2f"),
            _number(mine.get("wall_us"), ".0f"),
            _number(best.get("wall_us"), ".0f"),
        )
    return table


def _number(value: float | None, form: str, method: str | None = None) -> str:
    if value is None:
        return "-"
    return format(value, form) + ("e" if method == "events" else "")


def _problems(report: dict) -> list[str]:
    """What has no time, and why; what was timed by events; what gives other bits each time."""
    texts = []
    for row in report["rows"]:
        where = f"{row['op']} {row['pass']} {row['shape']}"
        if row["problem"]:
            texts.append(f"not measured: {where}: {row['problem']}")
        for name, figures in row["results"].items():
            if figures["problem"]:
                texts.append(f"not timed: {where}, {name}: {figures['problem']}")
            elif figures["method"] == "events":
                texts.append(f"e: {where}, {name}: timed between events, not in a graph: {figures['note']}")
            if figures.get("same_bits") is False:
                texts.append(f"~: {where}, {name}: not the same bits each time")
    if report["stopped"]:
        texts.append(f"stopped before the end: {report['stopped']}")
    return texts


def summary_text(line: dict) -> str:
    """One line: figures, targets, met or missed."""
    parts = []
    for name, value in line["figures"].items():
        text = f"{name.replace('_', ' ')} {value:.3g}"
        if name in line["targets"]:
            text += f" (target {line['targets'][name]:g})"
        parts.append(text)
    verdict = {True: "met", False: "MISSED", None: "not judged" if line["targets"] else "no target"}[line["met"]]
    return f"{verdict:10} {line['what']}: {', '.join(parts)}"
