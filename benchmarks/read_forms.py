"""The times in csrc/include/memformer_kernels/memory_read_forms.cuh, measured anew on this GPU.

    python benchmarks/read_forms.py --out forms.json

Each form of the read's forward runs alone, in a tree built so that its table holds one form of each width of heads,
over lengths that leave no row of a tile empty and numbers of slots that leave no slot. Two times are fitted to what it
takes: of a row, and of each slot of a row. They are printed as the table's lines, for another GPU to take their place.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import variants
from rich.console import Console
from rich.table import Table

HEADER = Path("csrc/include/memformer_kernels/memory_read_forms.cuh")
LINE = re.compile(r"    \{(\d+), (\d+), (\d+), (\d+), ([\d.]+), ([\d.]+)\},\n")
LENGTH, HEADS = 768, 8  # whole tiles of one to four groups
BATCH = {64: 64, 96: 64, 128: 32}  # by width: enough to fill a GPU many times
SLOTS = (96, 128, 192, 256, 384, 768, 1152)


@dataclass(frozen=True)
class Form:
    """A line of the table; the times in picoseconds."""

    width: int
    slots: int
    stages: int
    groups: int
    row_time: float
    slot_time: float

    def __str__(self) -> str:
        times = f"{self.row_time:g}, {self.slot_time:.3g}"
        return f"    {{{self.width}, {self.slots}, {self.stages}, {self.groups}, {times}}},\n"


def table(header: str) -> list[Form]:
    return [Form(*map(int, line[:4]), *map(float, line[4:])) for line in LINE.findall(header)]


def with_table(header: str, forms: Sequence[Form]) -> str:
    first = LINE.search(header).start()
    return header[:first] + "".join(map(str, forms)) + LINE.sub("", header[first:])


def lots(forms: Sequence[Form]) -> list[list[Form]]:
    """Each form in a lot with at most one of any width; where a width has no more, one of them again."""
    by_width = {width: [form for form in forms if form.width == width] for width in BATCH}
    most = max(map(len, by_width.values()))
    return [[of_width[i % len(of_width)] for of_width in by_width.values()] for i in range(most)]


def shape(form: Form, slots: int) -> str:
    return f"B{BATCH[form.width]} L{LENGTH} M{slots} H{HEADS} D{form.width}"


def fitted(form: Form, ms: dict[int, float]) -> Form:
    """With the times that are nearest, as shares, to the milliseconds by number of slots."""
    rows = BATCH[form.width] * LENGTH * HEADS
    slots, ps = (torch.tensor(list(values), dtype=torch.float64) for values in (ms.keys(), ms.values()))
    share = torch.stack([torch.ones_like(slots), slots], 1) / (ps * 1e9 / rows)[:, None]
    row_time, slot_time = torch.linalg.lstsq(share, torch.ones(len(ms), 1, dtype=torch.float64)).solution.flatten()
    return replace(form, row_time=round(row_time.item()), slot_time=slot_time.item())


def fit(forms: Sequence[Form], times: Sequence[dict[str, float]]) -> list[Form]:
    """times: of each lot, milliseconds by row of `bench`."""
    found = {}
    for lot, ms in zip(lots(forms), times, strict=True):
        for form in lot:
            whole = [slots for slots in SLOTS if slots % form.slots == 0]
            measured = {slots: ms[f"memory_read forward {shape(form, slots)}"] for slots in whole}
            found.setdefault(form, fitted(form, measured))
    return [found[form] for form in forms]


def save(out: Path | None, report: dict) -> None:
    if out:
        out.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the times measured here, and the fitted ones, as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("read_forms: needs a GPU; a CPU measures nothing here")
    header = (variants.ROOT / HEADER).read_text()
    forms = table(header)
    report = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "ms": (times := [])}
    with tempfile.TemporaryDirectory() as folder:
        trees = [Path(folder, f"lot {i + 1}") for i in range(len(lots(forms)))]
        for tree, lot in zip(trees, lots(forms), strict=True):
            variants.lay_out(variants.ROOT, tree)
            (tree / HEADER).write_text(with_table(header, lot))
        print(f"building {len(trees)} trees", flush=True)
        with ThreadPoolExecutor() as pool:
            list(pool.map(variants.build, trees))
        for tree, lot in zip(trees, lots(forms), strict=True):
            described = (f"D {form.width} by {form.slots} slots, {form.groups} groups" for form in lot)
            print(f"{tree.name} of {len(trees)}: {'; '.join(described)}", flush=True)
            sizes = [shape(form, slots) for form in lot for slots in SLOTS if slots % form.slots == 0]
            asked = [part for size in sizes for part in ("--shape", re.sub(r"([A-Z])(\d+)", r"\1=\2", size))]
            out = Path(folder, f"of {tree.name}")
            times.append(variants.measure(tree, ["--op", "read", "--pass", "forward", *asked], out))
            save(options.out, report)
    rows = Table(title="picoseconds, as the table has them and as fitted here", title_justify="left")
    for name in ("form", "row", "slot", "row here", "slot here"):
        rows.add_column(name, justify="left" if name == "form" else "right", no_wrap=True)
    measured = fit(forms, times)
    save(options.out, report | {"forms": list(map(asdict, measured))})
    for before, now in zip(forms, measured, strict=True):
        name = f"D {before.width}, {before.slots} slots, {before.groups} groups"
        rows.add_row(name, *(f"{t:.3g}" for f in (before, now) for t in (f.row_time, f.slot_time)))
    Console(highlight=False).print(rows)
    print(f"\nlines of {HEADER}:\n\n{''.join(map(str, measured))}")


if __name__ == "__main__":
    main()
