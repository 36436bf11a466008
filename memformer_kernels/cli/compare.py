"""`bench --compare`: the table of two files of times, a picture, and a verdict for scripts."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from memformer_kernels.benchmarking import plots
from memformer_kernels.benchmarking.compare import Comparison
from memformer_kernels.benchmarking.compare import compare as compare_files
from memformer_kernels.cli.options import to_stdout, write_json

SAME = 0.01  # a ratio this near to 1 is not coloured


def compare(before: Path, after: Path, plot: Path | None, fail_above: float | None, json_file: Path | None) -> bool:
    """False where `fail_above` is given and a ratio is above it, or a time is lost."""
    found = compare_files(before, after)
    console = Console(stderr=to_stdout(json_file), highlight=False)
    console.print(_table(found))
    for line in (f"before: {before}", f"after:  {after}", *_remarks(found)):
        console.print(line, markup=False, soft_wrap=True)
    if plot is not None:
        plots.draw_comparison(found, f"{after} over {before}", plot)
        console.print(f"picture: {plot}", markup=False, soft_wrap=True)
    passes = fail_above is None or found.passes(fail_above)
    if fail_above is not None:
        verdict = f"no ratio is above {fail_above:g}" if passes else f"FAILED: above {fail_above:g}, or without a time"
        console.print(verdict, markup=False)
    write_json({"before": str(before), "after": str(after), "passes": passes, **found.as_json()}, json_file)
    return passes


def _table(found: Comparison) -> Table:
    table = Table(title="milliseconds, the worst ratio first", title_justify="left")
    table.add_column("row")
    for column in ("before", "after", "after / before"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found.rows:
        style = "red" if row.ratio > 1 + SAME else "green" if row.ratio < 1 - SAME else ""
        table.add_row(row.name, f"{row.before:.4f}", f"{row.after:.4f}", f"{row.ratio:.3f}", style=style)
    return table


def _remarks(found: Comparison) -> list[str]:
    worst, best = found.rows[0], found.rows[-1]
    lines = [f"{len(found.rows)} rows, geometric mean {found.mean:.3f}"]
    lines += [f"worst {worst.ratio:.3f}  {worst.name}", f"best  {best.ratio:.3f}  {best.name}"]
    lines += [f"no time any more: {name}" for name in found.lost]
    for where, names in (("first", found.only_before), ("second", found.only_after)):
        if names:
            lines.append(f"in the {where} file only: {len(names)} rows, such as {names[0]}")
    if found.machines[0] != found.machines[1]:
        lines.append(f"measured differently: {found.machines[0]}; {found.machines[1]}")
    return lines
