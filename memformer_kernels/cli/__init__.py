"""The command line, `memformer-kernels`. `doctor` runs with nothing but torch; the rest needs the extra `cli`."""

import sys


def main() -> None:
    try:
        from memformer_kernels.cli.app import run
    except ImportError as error:
        if sys.argv[1:] == ["doctor"]:
            from memformer_kernels.cli.doctor import facts, report

            print(report(facts()))
            return
        print(
            f"error: the command line needs more packages ({error}): pip install 'memformer-kernels[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
    run()
