"""The command line's one entrance. What a command takes stands in `*_commands.py`, its work in a module of its name."""

import inspect
import os
import sys

import typer
from rich.console import Console

from memformer_kernels.cli.machine_commands import bench, build, check, doctor, report, tune
from memformer_kernels.cli.model_commands import demo, generate, stream, train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Memformer at speed: what runs on this machine and how fast, and models that read without end. "
    "[bold]memformer-kernels COMMAND --help[/] tells what a command does, how to call it and what it prints.",
)
errors = Console(stderr=True)


def run() -> None:
    """Runs a command; what a user can mend is one line and an exit code, not a traceback."""
    from memformer_kernels.training.run import Interrupted

    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here, where what cannot be written is an error like others
    except Interrupted as stop:
        if int(os.environ.get("RANK", 0)) == 0:  # of torchrun's ranks, which stop together, one says so
            errors.print(f"interrupted: {stop}; go on with --resume", highlight=False)
        sys.exit(130)
    except KeyboardInterrupt:
        errors.print("interrupted", highlight=False)
        sys.exit(130)
    except BrokenPipeError:  # who reads has seen enough
        _forget_what_cannot_be_written()
        sys.exit(1)
    except (ValueError, TypeError, NotImplementedError, OSError, ImportError) as error:
        errors.print(f"error: {error}", highlight=False, markup=False, soft_wrap=True)
        _forget_what_cannot_be_written()
        sys.exit(1)


def _forget_what_cannot_be_written() -> None:
    """Else Python tries once more at its end, reports that too, and exits with 120."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _unwrapped(docstring: str) -> str:
    """A paragraph is one line, for the terminal to wrap; indented lines stay as they are, without their first blank."""
    paragraphs = inspect.cleandoc(docstring).split("\n\n")
    return "\n\n".join(p if p.startswith(" ") else " ".join(p.split("\n")) for p in paragraphs)


PANELS = {
    "This machine": (doctor, check, build),
    "Figures": (bench, report, tune),
    "Models": (train, generate, stream, demo),
}
for panel, commands in PANELS.items():
    for command in commands:
        app.command(help=_unwrapped(command.__doc__), rich_help_panel=panel)(command)
