"""The bar of long work: on standard error, and only on a terminal."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def bar(description: str) -> Iterator[Callable[[float], None]]:
    """Gives a function that takes the part which is done, 0 to 1. Lines may be printed meanwhile; the bar then goes."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    options = dict(transient=True, disable=not console.is_terminal, redirect_stdout=sys.stdout.isatty())
    with Progress(*columns, console=console, **options) as progress:
        task = progress.add_task(description, total=1.0)
        yield lambda done: progress.update(task, completed=done)
