"""What a segment's result depends on besides its arguments: random state, autocast, modules. Recorded, put back."""

import contextlib
import copy
import functools
import inspect
import operator
import sys
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from memformer_kernels.replay.tree import attributes_of


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

    def select(self, state: tuple) -> None:
        """Before the backward of what drew from this state: a checkpoint inside puts it back by itself."""

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        state = self.get()
        try:
            yield
        finally:
            self.set(state)

    @contextlib.contextmanager
    def kept_if_raises(self) -> Iterator[None]:
        state = self.get()
        try:
            yield
        except BaseException:
            self.set(state)
            raise


def _source(source: Any) -> tuple:
    """(get, put) of a source of randomness, told by the methods it has."""
    if hasattr(source, "getstate"):  # random.Random, the module random
        return source.getstate, source.setstate
    if hasattr(source, "get_state"):  # torch.Generator, numpy.random.RandomState, the module numpy.random
        return source.get_state, source.set_state
    if hasattr(source, "bit_generator"):  # numpy.random.Generator
        bits = source.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    raise TypeError(
        "memory_replay: random_sources must hold torch.Generator, random.Random, numpy.random.Generator or "
        f"numpy.random.RandomState objects, got {type(source).__name__}"
    )


@dataclass(frozen=True)
class Autocast:
    """Autocast as it stands when recorded, for every device type of the rollout.

    A segment begins and ends with an empty cache of cast weights: what the caller filled would put nodes from outside
    into the segment's graph, and what the segment filled would tie the caller's next use of a weight to that graph.
    """

    settings: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def now(cls, devices: Sequence[torch.device]) -> "Autocast":
        types = sorted({"cpu", *(d.type for d in devices if torch.amp.is_autocast_available(d.type))})
        return cls(tuple((t, torch.is_autocast_enabled(t), torch.get_autocast_dtype(t)) for t in types))

    def to(self, dtype: torch.dtype) -> bool:
        """Whether it casts to `dtype`."""
        return any(enabled and its_dtype == dtype for _, enabled, its_dtype in self.settings)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        torch.clear_autocast_cache()
        try:
            with contextlib.ExitStack() as stack:
                for device_type, enabled, dtype in self.settings:
                    stack.enter_context(torch.autocast(device_type, dtype, enabled=enabled))
                yield
        finally:
            torch.clear_autocast_cache()


Buffers = Sequence[Tensor | None]


def _copies(buffers: Buffers) -> Buffers:
    """Of each one; those that share memory share it as copies too."""
    tensors = [b for b in buffers if b is not None]
    memory = {b.untyped_storage().data_ptr() if b.layout == torch.strided else id(b) for b in tensors}
    if len(memory) < len(tensors):
        return copy.deepcopy([None if b is None else b.detach() for b in buffers])
    return [None if b is None else b.detach().clone() for b in buffers]


class ModuleState:
    """What a cell's modules hold: parameters, which they keep; buffers, and whether they train or evaluate.

    A buffer that needs a gradient is a leaf like a parameter, and not among them.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        self.owners = _with_children(modules)
        self.places = [  # those of None too, which the cell may fill
            (m, name)
            for m in self.owners
            for name, b in m._buffers.items()
            if b is None or not (b.requires_grad or is_lazy(b))
        ]
        found = {id(p): p for m in self.owners for p in m._parameters.values() if p is not None and not is_lazy(p)}
        self.parameters = list(found.values())
        self.stand_ins: Mapping[Tensor, Tensor] = {}
        self._recorded: tuple[Buffers, list[int], Buffers] = ([], [], [])

    def buffers(self) -> Buffers:
        return [module._buffers[name] for module, name in self.places]

    def parameter_places(self) -> list[tuple[int, str, int]]:
        """Which parameter stands where, by identity: of tensors that somebody else keeps."""
        return [(id(m), name, id(p)) for m in self.owners for name, p in m._parameters.items()]

    def record(self) -> tuple[Buffers, list[bool]]:
        """What `swapped` takes. Copies only when a buffer has changed: constant buffers cost one copy a rollout."""
        now, versions = self.buffers(), versions_of(self.buffers())
        if not (all(map(operator.is_, now, self._recorded[0])) and versions == self._recorded[1]):
            self._recorded = (now, versions, _copies(now))
        return self._recorded[2], [m.training for m in self.owners]

    @contextlib.contextmanager
    def swapped(self, recorded: tuple[Buffers, list[bool]]) -> Iterator[None]:
        """Runs on copies of recorded values; the modules get their own tensors and modes back untouched."""
        originals, modes = self.buffers(), [m.training for m in self.owners]
        try:
            self._put(_copies(recorded[0]), recorded[1])
            yield
        finally:
            self._put(originals, modes)

    @contextlib.contextmanager
    def parameters_replaced(self, by: Mapping[Tensor, Tensor]) -> Iterator[None]:
        """The modules have the tensors of `by` in the place of its keys."""
        places = [(m, name, p) for m in self.owners for name, p in m._parameters.items() if p is not None and p in by]
        try:
            for module, name, parameter in places:
                module._parameters[name] = by[parameter]
            yield
        finally:
            for module, name, parameter in places:
                module._parameters[name] = parameter

    @contextlib.contextmanager
    def standing_in(self, by: Mapping[Tensor, Tensor]) -> Iterator[None]:
        """Inside, graphs end in the tensors of `by`, which stand for its keys."""
        before, self.stand_ins = self.stand_ins, by
        try:
            with self.parameters_replaced(by):
                yield
        finally:
            self.stand_ins = before

    @contextlib.contextmanager
    def kept_if_raises(self) -> Iterator[None]:
        """Puts the buffers back, the same tensors with the same values, when an exception passes."""
        originals, modes = self.buffers(), [m.training for m in self.owners]
        values = _copies(originals)
        try:
            yield
        except BaseException:
            for original, value in zip(originals, values, strict=True):
                if original is not None and not same_bits(original, value):
                    original.copy_(value)
            self._put(originals, modes)
            raise

    def _put(self, buffers: Buffers, modes: Sequence[bool]) -> None:
        for (module, name), buffer in zip(self.places, buffers, strict=True):
            module._buffers[name] = buffer
        for module, mode in zip(self.owners, modes, strict=True):
            if module.training != mode:
                module.training = mode


@dataclass(frozen=True)
class Surroundings:
    """All of it, of one rollout."""

    devices: tuple[torch.device, ...]
    random: RandomState
    autocast: Autocast
    modules: ModuleState

    @classmethod
    def of(cls, modules: Sequence[nn.Module], given: Iterable[Tensor], sources: Sequence[Any] = ()) -> "Surroundings":
        """As they stand: of a cell's modules, the tensors that it is given, and other sources of randomness."""
        state = ModuleState(modules)
        devices = tuple(sorted({t.device for t in (*given, *state.parameters)}, key=str))
        return cls(devices, RandomState(devices, sources), Autocast.now(devices), state)

    @contextlib.contextmanager
    def kept_if_raises(self) -> Iterator[None]:
        with self.random.kept_if_raises(), self.modules.kept_if_raises():
            yield


def modules_of(cell: Any) -> list[nn.Module]:
    """The modules that a cell is, is bound to, closes over, or refers to by name.

    Followed: functions but those of libraries, partials, bound methods, lists, tuples, sets and dicts; of objects,
    their classes and Python modules the attributes that these functions name, of objects also those that can be
    followed; of a module the latter, and its class' `forward`.
    """
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    names, looked_at = {"__call__"}, 0
    objects: list[Any] = []
    pending = [cell]
    while pending or looked_at < len(names):
        if not pending:  # what objects hold under names that were not known when they came
            looked_at = len(names)
            pending = [held for thing in objects for held in _held_under(names, thing)]
            continue
        thing = pending.pop()
        if id(thing) in seen or isinstance(thing, type):
            continue
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            found[id(thing)] = thing
            pending += thing._modules.values()
            if not _of_a_library(type(thing)):
                pending += [v for n, v in vars(thing).items() if n not in _OWN and isinstance(v, _FOLLOWED)]
                pending.append(type(thing).forward)
        elif isinstance(thing, functools.partial):
            pending += [*thing.args, *thing.keywords.values(), thing.func]
        elif inspect.ismethod(thing):
            pending += [thing.__self__, thing.__func__]
        elif inspect.isfunction(thing):
            if not _of_a_library(thing):
                used = _names_in(thing.__code__)
                names |= used
                pending += [*_bound_in(thing), *(thing.__globals__[n] for n in used if n in thing.__globals__)]
        elif isinstance(thing, list | tuple | set | frozenset | dict):
            pending += [v for v in (thing.values() if isinstance(thing, dict) else thing) if isinstance(v, _FOLLOWED)]
        else:
            if not _of_a_library(type(thing)):
                objects.append(thing)
            pending += _held_under(names, thing)
    return list(found.values())


def _held_under(names: set[str], thing: Any) -> Iterator[Any]:
    """What an object or a Python module holds under these names, and of objects what can be followed."""
    follow = () if inspect.ismodule(thing) else _FOLLOWED
    yield from (v for n, v in attributes_of(thing).items() if n in names or isinstance(v, follow))
    if not _of_a_library(type(thing)):
        yield from (v for n in names if isinstance(v := getattr(type(thing), n, None), _FOLLOWED))


def _with_children(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Each once, the first before its children. `nn.Module.modules()` does the same, and makes up names on its way."""
    found: dict[int, nn.Module] = {}
    pending = list(reversed(modules))
    while pending:
        module = pending.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            pending += module._modules.values()
    return list(found.values())


_OWN = frozenset(vars(nn.Module()))  # of every module: parameters, buffers, hooks
_LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy"}
_FOLLOWED = (nn.Module, functools.partial, types.MethodType, types.FunctionType, list, tuple, set, frozenset, dict)


def _of_a_library(thing: type | types.FunctionType) -> bool:
    return (thing.__module__ or "").partition(".")[0] in _LIBRARIES


def _names_in(code: types.CodeType) -> set[str]:
    """Names of globals and attributes that a function uses, the functions inside it included."""
    return set(code.co_names).union(*(_names_in(c) for c in code.co_consts if isinstance(c, types.CodeType)))


def _bound_in(function: types.FunctionType) -> Iterator[Any]:
    """What a function closes over, and its defaults."""
    for variable in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not assigned yet
            yield variable.cell_contents
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()


def versions_of(tensors: Iterable[Tensor | None]) -> list[int]:
    """Version counters: a modification in place is a change of one. Inference tensors have none, nor can change."""
    return [-1 if t is None or t.is_inference() else t._version for t in tensors]


@contextlib.contextmanager
def unmodified(given: Sequence[Tensor], label: str) -> Iterator[None]:
    """Refuses a call of the cell that modifies what it is given."""
    versions = versions_of(given)
    yield
    if versions_of(given) != versions:
        raise RuntimeError(
            f"memory_replay: cell must not modify its segment or its state in place, got a change in {label}"
        )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, NaN included."""
    if a is b:
        return True
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    a, b = (t.detach() if t.layout == torch.strided else t.detach().to_dense() for t in (a, b))
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (a, b)))
