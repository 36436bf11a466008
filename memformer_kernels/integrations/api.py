"""`accelerate`: finds in a model what this package can run, and gives those modules a class that does."""

import importlib
import importlib.metadata
import sys
from collections.abc import Iterable

from torch import nn

from memformer_kernels import checks
from memformer_kernels.integrations.report import Entry, Report, restore

VERSIONS = {"memformer": ("0.3.1",)}  # of each package that is known, those whose code was read
FIXES = {"memformer": ("generate", "relative_position", "target_mask")}


def accelerate(model: nn.Module, *, fix: Iterable[str] = ()) -> Report:
    """Lets the operations of this package run in a model that was written elsewhere: this one instance, in place.

    Modules are given a subclass of their own class, with another forward. Nothing else of them changes: parameters,
    `state_dict`, hooks, mode, optimisers that hold them; copies and pickles of the model are accelerated too. Outputs
    and gradients stay the same to rounding. Modules with code of their own, of a subclass or
    of the instance, are left as they are.

    Known: the models of the PyPI package `memformer`, version 0.3.1.

    Args:
        model: any module; what is known is found anywhere inside it.
        fix: bugs of the packages to correct as well; the results then differ where the bug shows. Of `memformer`:
            "generate": `decoder.generate` passes on an argument that the decoder does not take, and raises.
            "target_mask": a `tgt_mask` that is already one shorter than `tgt` is dropped without a word.
            "relative_position": the encoder's buckets of distances are those for causal attention and the decoder's
                those for attention both ways. For new models only: weights trained without it depend on the bug.

    Returns:
        A report of what was replaced and what was left, and why: `print(report)`; `report.restore()` undoes it. A
        second call first undoes what the first one did: with the same `fix` it changes nothing.

    Raises:
        TypeError: `model` is not a module, or `fix` is a string.
        ValueError: an unknown name in `fix`.
        RuntimeError: after an earlier call, something else changed the class of a module, as `fully_shard` does.
    """
    if not isinstance(model, nn.Module):
        checks.fail("accelerate", "model", "be a torch.nn.Module", type(model).__name__, TypeError)
    if isinstance(fix, str):
        checks.fail("accelerate", "fix", "be several names, such as a tuple", repr(fix), TypeError)
    fix, known = frozenset(fix), sorted(sum(FIXES.values(), ()))
    if unknown := sorted(fix.difference(known)):
        checks.fail("accelerate", "fix", f"hold some of {', '.join(known)}", unknown[0])
    restore(model)
    entries = [entry for package in VERSIONS for entry in _entries(package, model, fix)]
    for entry in entries:
        if entry.by is not None:
            entry.module.__class__ = entry.by
    return Report(model, tuple(e for e in entries if e.by), tuple(e for e in entries if not e.by))


def _entries(package: str, model: nn.Module, fix: frozenset[str]) -> list[Entry]:
    if package not in sys.modules:  # then the model has no module of it
        return []
    version = importlib.metadata.version(package)
    if version not in VERSIONS[package]:
        reason = f"{package} {version}: only {', '.join(VERSIONS[package])} is known"
        theirs = [(p, m) for p, m in model.named_modules() if type(m).__module__.partition(".")[0] == package]
        return [Entry(path, module, type(module).__name__, None, reason) for path, module in theirs]
    return importlib.import_module(f"memformer_kernels.integrations.{package}.modules").entries(model, fix)
