"""Checks the Triton backend of every op on a GPU. Run by hand:

    PYTHONPATH=. python tests/gpu/check_triton.py --out DIRECTORY

Every check compares with float64, or bit for bit with another call. They run in processes of their own, several at a
time: a fault of one cannot spoil another, and kernels are compiled side by side. All of them run; the exit status is 1
if one failed. `DIRECTORY/triton_checks.json` holds the figures, and is written anew after every check.

Without a GPU, `--device cpu` runs what the interpreter can, in float32 and float16.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import triton
import triton_accuracy
import triton_hopper
import triton_machine
import triton_sanitizer
import triton_values
from processes import jobs, run_checks, run_here, tell

CHECKS = {
    check.name: check
    for module in (triton_sanitizer, triton_accuracy, triton_hopper, triton_machine, triton_values)
    for check in module.CHECKS
}


def largest_errors(results):
    """`{op: {dtype: {benign or hostile: {tensor: error over its largest element}}}}` of the accuracy checks."""
    errors = {}
    for check, result in results.items():
        if check.startswith("accuracy "):
            op, dtype = check.split(",")[0].split()[1:]
            for kind, tensors in result.get("largest relative error", {}).items():
                so_far = errors.setdefault(op, {}).setdefault(dtype, {}).setdefault(kind, {})
                so_far.update({name: max(error, so_far.get(name, 0.0)) for name, error in tensors.items()})
    return errors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="directory of the JSON report")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="checks whose name contains a NAME")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--no-sanitizer", action="store_true")
    parser.add_argument("--jobs", type=int, help="processes at a time")
    parser.add_argument("--limit", type=float, default=300, help="seconds that one process may take")
    parser.add_argument("--child", nargs="+", choices=CHECKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return run_here(CHECKS, options.child, options.device)
    if options.out is None:
        parser.error("--out is required")
    names = [name for name in CHECKS if any(part in name for part in options.only)]
    if options.no_sanitizer:
        names = [name for name in names if "sanitizer" not in name]
    if not names:
        parser.error(f"no such check; there are: {', '.join(CHECKS)}")
    on_gpu = options.device == "cuda"
    start = time.perf_counter()
    checks = {name: CHECKS[name] for name in names}
    options.out.mkdir(parents=True, exist_ok=True)

    def write(results):
        report = {
            "gpu": torch.cuda.get_device_name() if on_gpu else None,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "seconds": round(time.perf_counter() - start, 1),
            "largest relative errors": largest_errors(results),
            "checks": results,
        }
        (options.out / "triton_checks.json").write_text(json.dumps(report, indent=2) + "\n")

    results = run_checks(__file__, checks, options.device, options.jobs or jobs(options.device), options.limit, write)
    write(results)
    right = tell(results)
    print(f"{time.perf_counter() - start:.0f} s")
    sys.exit(not right)


if __name__ == "__main__":
    main()
