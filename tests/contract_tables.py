"""Makes the tables of the contract in README.md and docs/contract.md, from reports of the tests and of a GPU:

    pytest --contract benchmarks/results/contract_cpu.json
    PYTHONPATH=. python tests/gpu/check_contract.py --out OUT    # OUT/contract_gpu.json to contract_h200.json
    python tests/contract_tables.py

A table stands between two marker comments; all else is left as it is. `--check` changes nothing, and exits with 1 where
the guarantees or promises of a table are not those of `contract.py`; figures are not compared.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from contract import PROMISES

ROOT = Path(__file__).parents[1]
REPORTS = {"CPU": "contract_cpu.json", "H200": "contract_h200.json"}
BEGIN, END = "<!-- contract: begin -->", "<!-- contract: end -->"
TABLE = re.compile(f"{BEGIN}\n(.*?){END}", re.DOTALL)
FILES = {"README.md": False, "docs/contract.md": True}  # whether with figures by name


def read_reports() -> dict[str, dict]:
    folder = ROOT / "benchmarks" / "results"
    files = {where: folder / name for where, name in REPORTS.items()}
    return {where: json.loads(file.read_text())["guarantees"] for where, file in files.items() if file.exists()}


def table(reports: dict[str, dict], with_figures: bool) -> str:
    """One line for each guarantee: its promise, and what each report has of it."""
    lines = [f"| | we guarantee | {' | '.join(REPORTS)} |", "| --- | --- |" + " --- |" * len(REPORTS)]
    for name, promise in PROMISES.items():
        proofs = (_proof(reports.get(where, {}).get(name), with_figures) for where in REPORTS)
        lines.append(f"| {name} | {promise} | {' | '.join(proofs)} |")
    return "\n".join(lines) + "\n"


def _proof(proof: dict | None, with_figures: bool) -> str:
    if not proof or not proof["passed"] + proof["failed"]:
        return ""
    words = f"{proof['passed']} passed" + (f", **{proof['failed']} failed**" if proof["failed"] else "")
    if with_figures:
        words = "<br>".join([words, *(f"{name}: {value:.3g}" for name, value in sorted(proof["figures"].items()))])
    return words


def promises_of(text: str) -> dict[str, str]:
    """Guarantees and promises of the table in a file."""
    rows = [line.split(" | ") for line in TABLE.search(text)[1].splitlines() if line.startswith("| G")]
    return {row[0].removeprefix("| "): row[1] for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit with 1 where a table is stale")
    check, reports = parser.parse_args().check, read_reports()
    for name, with_figures in FILES.items():
        text = (ROOT / name).read_text()
        if check:
            if promises_of(text) != PROMISES:
                sys.exit(f"{name}: its contract is not that of tests/contract.py; run python tests/contract_tables.py")
        else:
            new = f"{BEGIN}\n{table(reports, with_figures)}{END}"
            (ROOT / name).write_text(TABLE.sub(lambda _, new=new: new, text))


if __name__ == "__main__":
    main()
