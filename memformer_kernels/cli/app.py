"""The command line's one entrance. What a command takes stands in `*_commands.py`, its work in a module of its name."""

import os
import sys

import typer
from rich.console import Console

from memformer_kernels.cli.machine_commands import bench, check, doctor, tune
from memformer_kernels.cli.model_commands import demo, generate, stream, train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Memformer: train, generate, check, and say what runs on this machine.",
)
errors = Console(stderr=True)


def run() -> None:
    """Runs a command; what a user can mend is one line and an exit code, not a traceback."""
    from memformer_kernels.training.run import Interrupted

    try:
        app()
    except Interrupted as stop:
        if int(os.environ.get("RANK", 0)) == 0:  # of torchrun's ranks, which stop together, one says so
            errors.print(f"interrupted: {stop}; go on with --resume", highlight=False)
        sys.exit(130)
    except KeyboardInterrupt:
        errors.print("interrupted", highlight=False)
        sys.exit(130)
    except (ValueError, TypeError, NotImplementedError, OSError, ImportError) as error:
        errors.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)


for command in (doctor, tune, check, train, generate, stream, bench, demo):
    app.command()(command)
