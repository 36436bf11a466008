"""The mutation gate by hand, and its score as JSON.

python tests/mutants                                     every mutant
python tests/mutants read-finite-sentinel                these alone
python tests/mutants --out mutants.json
"""

import argparse
import json
from pathlib import Path

from gate import Gate, Mutant, catalogue, is_of_a_kernel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="of mutants; all by default")
    parser.add_argument("--out", type=Path, help="a file for the score")
    arguments = parser.parse_args()
    mutants = [m for m in catalogue() if not arguments.names or m.name in arguments.names]
    if unknown := set(arguments.names) - {m.name for m in mutants}:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    planted = [m for m in mutants if not m.equivalent]
    survivors = []
    with Gate() as gate:
        gate.check_unmutated(planted)
        for mutant in planted:
            killed = gate.kills(mutant)
            print(f"{'killed' if killed else 'SURVIVES'}  {mutant.name}: {mutant.why}", flush=True)
            if not killed:
                survivors.append(mutant)
    score = score_of(mutants, survivors)
    print(f"{score['killed']} of {score['planted']} mutants killed, {len(score['equivalent'])} more are equivalent")
    if arguments.out:
        arguments.out.write_text(json.dumps(score, indent=2) + "\n")
    raise SystemExit(bool(survivors))


def score_of(mutants: list[Mutant], survivors: list[Mutant]) -> dict:
    planted = [m for m in mutants if not m.equivalent]
    parts = sorted({m.part for m in mutants})
    return {
        "planted": len(planted),
        "of_kernels": sum(map(is_of_a_kernel, planted)),
        "killed": len(planted) - len(survivors),
        "survivors": [m.name for m in survivors],
        "by_part": {part: sum(m.part == part for m in planted) for part in parts},
        "equivalent": {m.name: m.equivalent for m in mutants if m.equivalent},
    }


if __name__ == "__main__":
    main()
