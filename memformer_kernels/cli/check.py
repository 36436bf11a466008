"""`check`: every op and backend that runs here, against float64."""

import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from memformer_kernels.backend import OPS, explain
from memformer_kernels.testing import error_bound, errors, make_case, oracle, run, shares_of_bound

SIZES = dict(batch=2, heads=3, slots=33, tokens=65, width=48)  # nothing a multiple of a tile
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROUNDOFF = {dtype: torch.finfo(dtype).eps / 2 for dtype in DTYPES}


def limit(dtype: torch.dtype) -> float:
    """Largest error over largest value that passes.

    A few roundings of inputs' products and the store in the dtype, and float32 in between: logits reach about 16
    here, whose absolute error of 16 roundoffs `exp` turns into a relative one; sums and differences of such weights
    cost another factor of four.
    """
    return 4 * ROUNDOFF[dtype] + 64 * ROUNDOFF[torch.float32]


def check(device: torch.device, json_file: Path | None) -> bool:
    """Prints the table; True when no error is above its limit, and no element further off than `error_bound` allows."""
    rows = [row for op in OPS for dtype in DTYPES for row in _rows(op, dtype, device)]
    title = f"error against float64, relative to the largest value, and over 2 error_bound, on {device}"
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
    Console().print(table)
    if json_file is not None:
        json_file.write_text(
            json.dumps({"device": str(device), "torch": torch.__version__, "rows": rows}, indent=2) + "\n"
        )
    return all(r["ok"] for r in rows)


def _rows(op: str, dtype: torch.dtype, device: torch.device) -> list[dict]:
    case = make_case(op, **SIZES, dtype=dtype, device=device, masked=0.3)
    reference, bound = oracle(case), error_bound(case)
    rows = []
    for backend, reason in explain(op, **case.tensors, **case.options).reasons.items():
        if reason is None:
            result = run(case, backend)
            found, shares = errors(result, reference), shares_of_bound(result, reference, bound)
            row = {"op": op, "backend": backend, "dtype": str(dtype).removeprefix("torch."), "errors": found}
            ok = all(e <= limit(dtype) for e in found.values()) and all(share <= 1 for share in shares.values())
            rows.append(row | {"limit": limit(dtype), "shares": shares, "ok": ok})
    return rows
