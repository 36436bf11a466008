"""Proves on a GPU what the contract promises there, beyond `check_triton.py`. Run by hand, in under 150 s on an H200:

    PYTHONPATH=. python tests/gpu/check_contract.py --out DIRECTORY

`DIRECTORY/contract_gpu.json` holds, by guarantee, what passed and failed, and the figures; it is written anew after
every check. `--triton FILE` adds the checks of a `triton_checks.json`. The exit status is 1 if a check failed.

Without a GPU, `--device cpu` runs what the interpreter can.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import triton
import triton_contract
import triton_errors
from processes import jobs, run_checks, run_here, tell

CHECKS = {check.name: check for module in (triton_contract, triton_errors) for check in module.CHECKS}

GUARANTEE = {  # of a check, by how its name begins; of those of `check_triton.py` too
    "bound": "G1",
    "accuracy": "G1",
    "limits are tight": "G1",
    "float32 is IEEE": "G2",
    "nothing visible": "G3",
    "saturated": "G3",
    "hidden never matters": "G4",
    "visible nan": "G5",
    "huge logits": "G5",
    "zero rows": "G6",
    "many repeats": "G7",
    "repeats": "G7",
    "cold processes": "G7",
    "calls alike": "G7",
    "batch invariance": "G8",
    "sanitizer": "G9",
    "guards": "G9",
    "large": "G10",
    "long tensors": "G10",
    "many rows": "G10",
    "empty": "G10",
    "layouts": "G11",
    "gluon": "G11",
    "graph capture": "G12",
    "streams": "G12",
    "side streams": "G12",
    "no synchronisation": "G12",
    "mixed devices": "G12",
    "two devices": "G12",
    "threads": "G13",
    "errors": "G14",
    "auto tells": "G14",
    "compile": "G15",
    "opcheck": "G15",
}


def by_guarantee(results):
    """`{guarantee: {passed, failed, skipped, figures}}` of the results of checks by name."""
    guarantees = {}
    for name, result in results.items():
        known = [start for start in GUARANTEE if name.startswith(start)]
        if not known:
            continue
        proof = guarantees.setdefault(
            GUARANTEE[max(known, key=len)], {"passed": 0, "failed": 0, "skipped": 0, "figures": {}}
        )
        proof["failed" if not result["passed"] else "skipped" if "skipped" in result else "passed"] += 1
        for figure, value in result.get("figures", {}).items():
            proof["figures"][figure] = max(value, proof["figures"].get(figure, value))
    return guarantees


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory of the JSON report")
    parser.add_argument("--triton", type=Path, help="a triton_checks.json of the same machine, to be counted too")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="checks whose name contains a NAME")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--jobs", type=int, help="processes at a time")
    parser.add_argument("--limit", type=float, default=140, help="seconds that one process may take")
    parser.add_argument("--child", nargs="+", choices=CHECKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return run_here(CHECKS, options.child, options.device)
    if options.out is None:
        parser.error("--out is required")
    checks = {name: check for name, check in CHECKS.items() if any(part in name for part in options.only)}
    if not checks:
        parser.error(f"no such check; there are: {', '.join(CHECKS)}")
    before = json.loads(options.triton.read_text())["checks"] if options.triton else {}
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()

    def write(results):
        report = {
            "command": " ".join(["python", "tests/gpu/check_contract.py", *sys.argv[1:]]),
            "gpu": torch.cuda.get_device_name() if options.device == "cuda" else None,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "seconds": round(time.perf_counter() - start, 1),
            "guarantees": by_guarantee({**before, **results}),
            "checks": results,
        }
        (options.out / "contract_gpu.json").write_text(json.dumps(report, indent=2) + "\n")

    results = run_checks(__file__, checks, options.device, options.jobs or jobs(options.device), options.limit, write)
    write(results)
    right = tell(results)
    print(f"{time.perf_counter() - start:.0f} s")
    sys.exit(not right)


if __name__ == "__main__":
    main()
