"""CUDA graphs on a CPU: a recording that knows nothing but the operations that ran and the memory that they ran on."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class TapedRecording:
    """In place of `recording.Recording`. Like a graph it runs no Python again, reads where tensors lay when it was
    recorded, cannot look at values, and returns the same tensors each time. What the others of its owner returned lies
    in the same pool of memory: a replay may run over it, and here does."""

    made = 0
    of_owner = weakref.WeakKeyDictionary()

    def __init__(self, body, device, *, pool=None, warm_ups=2):
        self.others = self.of_owner.setdefault(body.__self__, weakref.WeakSet())
        self.others.add(self)
        for _ in range(warm_ups):
            body()
        self.tape = _Tape()
        with self.tape:
            self.results = body()
        type(self).made += 1

    def replay(self):
        found = self.tape.play()
        for other in self.others - {self}:
            tree_map_only(torch.Tensor, lambda t: t.fill_(torch.nan) if t.is_floating_point() else t, other.results)
        tree_map_only(torch.Tensor, lambda t: t.copy_(found[id(t)]) if id(t) in found else t, self.results)
        return self.results


class _Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations, self.kept, self.places = [], {}, {}

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            pytest.fail("a recorded step looks at a value")
        result = operation(*arguments, **(options or {}))
        arguments, options = tree_map_only(torch.Tensor, self._place, (arguments, options or {}))
        self.operations.append((operation, arguments, options, tree_map_only(torch.Tensor, self._made, result)))
        return result

    def _made(self, tensor):
        self.kept[id(tensor)] = tensor  # so that no other tensor gets its id
        return id(tensor)

    def _place(self, tensor):
        if id(tensor) not in self.kept:
            self.kept[id(tensor)] = tensor
            self.places[id(tensor)] = tensor.detach()
        return _Place(id(tensor))

    def play(self):
        found = dict(self.places)

        def value(leaf):
            return found[leaf.id]

        for operation, arguments, options, made in self.operations:
            arguments, options = tree_map_only(_Place, value, (arguments, options))
            result = operation(*arguments, **options)
            made, result = (x if isinstance(x, (tuple, list)) else [x] for x in (made, result))
            found.update({i: r for i, r in zip(made, result, strict=True) if i is not None and r is not None})
        return found


class _Place:
    def __init__(self, id):
        self.id = id
