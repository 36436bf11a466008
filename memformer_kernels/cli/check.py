"""`check`: every op and backend that runs here, against float64."""

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from memformer_kernels.backend import OPS, explain
from memformer_kernels.benchmarking.suite import Shape, own_shapes
from memformer_kernels.cli.options import to_stdout, write_json
from memformer_kernels.cli.progress import bar
from memformer_kernels.testing import error_bound, errors, make_case, oracle, run, shares_of_bound

DEFAULT = ("B=2 H=3 M=33 L=65 D=48",)  # nothing a multiple of a tile
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDOFF = {dtype: torch.finfo(dtype).eps / 2 for dtype in DTYPES}
MASKED = 0.3  # of the slots that are read and of the tokens that are written


def limit(dtype: torch.dtype) -> float:
    """Largest error over largest value that passes.

    A few roundings of inputs' products and the store in the dtype, and float32 in between: logits reach about 16
    here, whose absolute error of 16 roundoffs `exp` turns into a relative one; sums and differences of such weights
    cost another factor of four.
    """
    return 4 * ROUNDOFF[dtype] + 64 * ROUNDOFF[torch.float32]


def check(device: torch.device, shapes: list[str], json_file: Path | None) -> bool:
    """Prints a table a shape; True when no error is above its limit, nor an element beyond twice `error_bound`."""
    console = Console(stderr=to_stdout(json_file))
    calls = [(shape, dtype) for shape in own_shapes("check", OPS, shapes or DEFAULT) for dtype in DTYPES]
    rows = []
    with bar("checking") as progress:
        for index, (shape, dtype) in enumerate(calls):
            progress(index / len(calls))
            rows += _rows(shape, dtype, device)
    for sizes in dict.fromkeys(r["sizes"] for r in rows):
        console.print(_table(f"{sizes} on {device}", [r for r in rows if r["sizes"] == sizes]))
    write_json({"device": str(device), "torch": torch.__version__, "rows": rows}, json_file)
    return all(r["ok"] for r in rows)


def _rows(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[dict]:
    sizes = dict(batch=shape.B, heads=shape.H, slots=shape.M, tokens=shape.L, width=shape.D)
    case = make_case(shape.op, **sizes, dtype=dtype, device=device, masked=MASKED)
    reference, bound = oracle(case), error_bound(case)
    rows = []
    for backend, reason in explain(shape.op, **case.tensors, **case.options).reasons.items():
        if reason is None:
            result = run(case, backend)
            found, shares = errors(result, reference), shares_of_bound(result, reference, bound)
            row = {"op": shape.op, "sizes": shape.group, "backend": backend, "dtype": str(dtype).removeprefix("torch.")}
            row |= {"errors": found, "limit": limit(dtype), "shares": shares}
            ok = all(e <= limit(dtype) for e in found.values()) and all(share <= 1 for share in shares.values())
            rows.append(row | {"ok": ok})
    return rows


def _table(where: str, rows: list[dict]) -> Table:
    title = f"{where}: largest error, relative to the largest value, and over 2 error_bound"
    table = Table(title=title, title_justify="left", box=None)
    for column in ("op", "backend", "dtype", "output", "worst gradient", "limit", "of bound"):
        table.add_column(column, no_wrap=True)
    for r in rows:
        gradients = {name: error for name, error in r["errors"].items() if name != "output"}
        worst = max(gradients, key=gradients.get)
        table.add_row(
            r["op"],
            r["backend"],
            r["dtype"],
            f"{r['errors']['output']:.1e}",
            f"{gradients[worst]:.1e} {worst.removeprefix('grad_')}",
            f"{r['limit']:.1e}",
            f"{max(r['shares'].values()):.2f}{'' if r['ok'] else ' [red]above'}",
        )
    return table
