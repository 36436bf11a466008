"""What `accelerate` did to a model, and how it is undone."""

import re
from collections import Counter
from dataclasses import dataclass

from torch import nn

from memformer_kernels import checks


class Accelerated:
    """Base of the classes that modules are given. `original` is the class they had: restoring needs nothing else."""

    original: type[nn.Module]


def restore(model: nn.Module) -> None:
    """Gives every module of `model` that `accelerate` changed its own class back; does nothing to others.

    Raises:
        RuntimeError: a module's class was changed again after that, as `fully_shard` and parametrizations do.
    """
    modules = [module for module in model.modules() if isinstance(module, Accelerated)]
    for module in modules:
        if "original" not in vars(type(module)):
            checks.fail("restore", "model", "have the classes of accelerate", type(module).__name__, RuntimeError)
    for module in modules:
        module.__class__ = module.original


@dataclass(frozen=True)
class Entry:
    """One module of the model: `kind` is the class it had, `by` the one it was given or None, `reason` says why."""

    path: str
    module: nn.Module
    kind: str
    by: type[Accelerated] | None
    reason: str


@dataclass(frozen=True)
class Report:
    """What `accelerate` replaced in `model` and what it left, as `Entry`s. Printed, what is alike stands together."""

    model: nn.Module
    replaced: tuple[Entry, ...]
    left: tuple[Entry, ...]

    def restore(self) -> None:
        """Undoes all that `accelerate` did to the model, by this call and by others."""
        restore(self.model)

    def __str__(self) -> str:
        kind = getattr(self.model, "original", type(self.model)).__name__
        lines = [f"accelerate: of {kind}, {len(self.replaced)} modules replaced, {len(self.left)} left"]
        for title, entries in (("replaced", self.replaced), ("left", self.left)):
            for reason in dict.fromkeys(entry.reason for entry in entries):
                lines.append(f"{title}: {reason}")
                # the number of a layer is the first in a path
                places = Counter((re.sub(r"\d+", "*", e.path, count=1), e.kind) for e in entries if e.reason == reason)
                lines += [f"    {n} {kind}  {path or '(the model)'}" for (path, kind), n in places.items()]
        if not self.replaced and not self.left:
            lines.append("nothing in it is of a package that is known")
        return "\n".join(lines)
