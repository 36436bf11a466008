"""What a segment's result depends on besides its arguments: random state, autocast, buffers. Recorded, put back."""

import contextlib
import functools
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class RandomState:
    """PyTorch's default generators of the devices in use, and the sources that the caller handed over."""

    def __init__(self, devices: Sequence[torch.device], sources: Sequence[Any]):
        self.devices = [d for d in devices if d.type == "cuda"]
        self.sources = [_source(s) for s in sources]

    def get(self) -> tuple:
        cuda = tuple(torch.cuda.get_rng_state(d) for d in self.devices)
        return torch.get_rng_state(), cuda, tuple(get() for get, _ in self.sources)

    def set(self, state: tuple) -> None:
        cpu, cuda, sources = state
        torch.set_rng_state(cpu)
        for device, one in zip(self.devices, cuda, strict=True):
            torch.cuda.set_rng_state(one, device)
        for (_, put), one in zip(self.sources, sources, strict=True):
            put(one)


def _source(source: Any) -> tuple:
    """(get, put) of a source of randomness, told by the methods it has."""
    if hasattr(source, "getstate"):  # random.Random, the module random
        return source.getstate, source.setstate
    if hasattr(source, "bit_generator"):  # numpy.random.Generator
        bits = source.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    if isinstance(source, torch.Generator):
        return source.get_state, source.set_state
    if hasattr(source, "get_state"):  # numpy.random.RandomState, the module numpy.random
        return source.get_state, source.set_state
    raise TypeError(
        "memory_replay: random_sources must hold torch.Generator, random.Random, numpy.random.Generator or "
        f"numpy.random.RandomState objects, got {type(source).__name__}"
    )


@dataclass(frozen=True)
class Autocast:
    """Autocast as it stands when recorded, for every device type of the rollout.

    Its cache of cast weights stays off inside: one filled without a graph would cut the weights off from whatever the
    caller computes next, and one filled by the caller would put nodes from outside into a segment's graph.
    """

    settings: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls, devices: Sequence[torch.device]) -> "Autocast":
        types = sorted({"cpu", *(d.type for d in devices)})
        return cls(tuple((t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in types))

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for device_type, enabled, dtype in self.settings:
                stack.enter_context(torch.autocast(device_type, dtype, enabled=enabled, cache_enabled=False))
            yield


class Buffers:
    """The buffers of a cell's modules.

    `record` copies them only when they have changed since the last record, so that a model whose buffers are
    constants pays for one copy.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        owners = {id(owner): owner for module in modules for owner in module.modules()}
        self.places = [(m, name) for m in owners.values() for name, b in m._buffers.items() if b is not None]
        self._recorded: tuple[tuple, list[Tensor]] | None = None

    def record(self) -> list[Tensor]:
        now = [module._buffers[name] for module, name in self.places]
        versions = tuple((id(b), b._version) for b in now)
        if self._recorded is None or self._recorded[0] != versions:
            self._recorded = (versions, [b.clone() for b in now])
            self._alive = now  # an id is only unique among the living
        return self._recorded[1]

    def restore(self, recorded: Sequence[Tensor], originals: Sequence[Tensor]) -> None:
        """Puts the buffers back, the same tensors with the recorded values."""
        for (module, name), value, original in zip(self.places, recorded, originals, strict=True):
            if not same_bits(original, value):
                original.copy_(value)
            module._buffers[name] = original

    def originals(self) -> list[Tensor]:
        return [module._buffers[name] for module, name in self.places]

    @contextlib.contextmanager
    def swapped(self, recorded: Sequence[Tensor]) -> Iterator[None]:
        """Runs on copies of recorded values; the modules get their own tensors back untouched."""
        originals = self.originals()
        try:
            for (module, name), value in zip(self.places, recorded, strict=True):
                module._buffers[name] = value.clone()
            yield
        finally:
            for (module, name), original in zip(self.places, originals, strict=True):
                module._buffers[name] = original


@contextlib.contextmanager
def hooks_of(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Takes the gradient hooks off the leaves: they belong to the rollout's one gradient, not to each segment's."""
    taken = []
    for leaf in leaves:
        hooks = leaf._backward_hooks
        if hooks:
            taken.append((hooks, dict(hooks)))
            hooks.clear()
    try:
        yield
    finally:
        for hooks, kept in taken:
            hooks.update(kept)


def modules_of(cell: Any) -> list[nn.Module]:
    """The modules that a cell is, is bound to, closes over, or refers to by name."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    pending = [cell]
    while pending:
        thing = pending.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            found[id(thing)] = thing
        elif isinstance(thing, functools.partial):
            pending += [thing.func, *thing.args, *thing.keywords.values()]
        elif inspect.ismethod(thing):
            pending += [thing.__self__, thing.__func__]
        elif inspect.isfunction(thing):
            if not (thing.__module__ or "").startswith("torch."):
                closure = inspect.getclosurevars(thing)
                pending += [*closure.nonlocals.values(), *closure.globals.values(), *(thing.__defaults__ or ())]
        elif thing is cell or type(thing).__call__ is not type.__call__ and hasattr(thing, "__dict__"):
            pending += [v for v in vars(thing).values() if isinstance(v, nn.Module) or inspect.isroutine(v)]
    return list(found.values())


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, NaN included."""
    if a is b:
        return True
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return torch.equal(*(t.detach().contiguous().view(-1).view(torch.uint8) for t in (a, b)))
