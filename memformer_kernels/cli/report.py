"""`report`: a folder of result files as one page with pictures."""

from pathlib import Path

from memformer_kernels.benchmarking import page


def report(folder: Path, out: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"report: {folder} is not a folder")
    written, skipped = page.write(folder, out)
    print(f"written: {written[0]} and {len(written) - 1} pictures")
    for name, reason in skipped.items():
        print(f"not shown: {name}: {reason}")
