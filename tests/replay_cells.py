"""Cells to replay, each with segments, a state and the parameters it uses, and how to differentiate through them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from memformer_kernels import Memformer, MemformerConfig, MemformerLM, MemformerLMConfig, memory_replay

WIDTH = 6


@dataclass
class Case:
    """A rollout: the cell and what goes in. `parameters` are all leaves that the cell uses besides what goes in.

    The state may be a function that makes it, where it has a graph of its own.
    """

    cell: Callable
    parameters: dict[str, Tensor]
    segments: list[Any]
    state: Any
    modules: list[nn.Module] = field(default_factory=list)

    def start(self) -> Any:
        return self.state() if callable(self.state) else self.state

    def leaves(self) -> dict[str, Tensor]:
        inputs = [t for t in tree_leaves((self.segments, self.state)) if isinstance(t, Tensor) and t.requires_grad]
        return {**self.parameters, **{f"input {i}": t for i, t in enumerate(inputs)}}


def everything(outputs: list, state: Any) -> Any:
    """The loss of a whole rollout: see `weigh`."""
    return weigh((outputs, state))


def weigh(tree: Any) -> Tensor:
    """A sum over all elements that need a gradient, each with a weight of its own, so that no two can be exchanged."""
    total, at = torch.zeros((), dtype=torch.float64), 0
    for tensor in tree_leaves(tree):
        if isinstance(tensor, Tensor) and tensor.requires_grad:
            weights = torch.cos(torch.arange(at, at + tensor.numel(), dtype=torch.float64)).view(tensor.shape)
            total = total + (tensor * weights.to(tensor)).double().sum().cpu()
            at += tensor.numel()
    return total


def gradients(case: Case, method: str, loss: Callable = everything, seed: int = 0, **options: Any) -> dict:
    """Gradients of all leaves by a rollout of one method; `.grad` is None before and after."""
    for leaf in case.leaves().values():
        leaf.grad = None
    torch.manual_seed(seed)
    outputs, state = memory_replay(case.cell, case.segments, case.start(), method=method, **options)
    loss(outputs, state).backward()
    found = {name: leaf.grad for name, leaf in case.leaves().items()}
    for leaf in case.leaves().values():
        leaf.grad = None
    return found


def assert_close(actual: dict, expected: dict, tolerance: float) -> None:
    """Each gradient within `tolerance` of the largest element of the expected one; None where that is None."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name]
        assert (got is None) == (want is None), f"{name}: got {got}, expected {want}"
        if want is not None:
            assert (got.dtype, got.shape) == (want.dtype, want.shape), name
            worst = (got - want).abs().max().item() if want.numel() else 0.0
            assert worst <= tolerance * want.abs().max().item(), f"{name}: off by {worst}"


def assert_equal(actual: dict, expected: dict) -> None:
    """The same bits."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        got = actual[name]
        assert (got is None) == (want is None), name
        assert want is None or torch.equal(got, want), f"{name}: off by {(got - want).abs().max()}"


def normal(*shape: int, dtype: torch.dtype = torch.float64, needs_grad: bool = False, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(needs_grad)


def rows(horizon: int, dtype: torch.dtype, *, needs_grad: bool = True) -> list[Tensor]:
    """Segments [2, WIDTH]."""
    return [normal(2, WIDTH, dtype=dtype, needs_grad=needs_grad, seed=t) for t in range(horizon)]


def of_module(module: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in module.named_parameters() if p.requires_grad}


class Recurrence(nn.Module):
    """tanh(W x + U s): each parameter once a segment, so that replay adds up in the order of back-propagation."""

    def __init__(self, dtype: torch.dtype = torch.float64):
        super().__init__()
        torch.manual_seed(11)
        self.of_input = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.of_state = nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.tanh(self.of_input(x) + self.of_state(state))
        return state.square().sum(), state


def recurrence(horizon: int, dtype: torch.dtype) -> Case:
    module, state = Recurrence(dtype), normal(2, WIDTH, dtype=dtype, needs_grad=True)
    return Case(module, of_module(module), rows(horizon, dtype), state, [module])


class Gated(nn.Module):
    """A GRU-like cell whose state, segments and outputs are pytrees with other things than tensors in them."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(12)
        self.gates = nn.Linear(2 * WIDTH, 2 * WIDTH, dtype=dtype)
        self.candidate = nn.Linear(2 * WIDTH, WIDTH, dtype=dtype)

    def forward(self, segment: dict, state: dict) -> tuple[dict, dict]:
        (hidden, slow), x = state["memory"], segment["x"]
        reset, update = torch.sigmoid(self.gates(torch.cat([x, hidden], -1))).chunk(2, -1)
        candidate = torch.tanh(self.candidate(torch.cat([x, reset * hidden], -1)))
        hidden = torch.where(segment["keep"], update * hidden + (1 - update) * candidate, hidden)
        slow = slow + hidden / (state["step"] + 1)
        output = {
            "loss": [(hidden * slow).sum(), (hidden.detach() * x).sum()],
            "metric": hidden.detach().abs().max(),
            "best": hidden.argmax(-1),
            "step": state["step"],
            "nothing": None,
        }
        seen = state["seen"] | segment["keep"].squeeze(-1)
        return output, {"memory": (hidden, slow), "step": state["step"] + 1, "seen": seen, "nothing": None}


def gated(horizon: int, dtype: torch.dtype) -> Case:
    module = Gated(dtype)
    keep = [torch.tensor([[True], [t % 3 != 1]]) for t in range(horizon)]
    segments = [
        {"x": x, "keep": k, "name": f"segment {t}"}
        for t, (x, k) in enumerate(zip(rows(horizon, dtype), keep, strict=True))
    ]
    memory = (normal(2, WIDTH, dtype=dtype, needs_grad=True, seed=5), normal(2, WIDTH, dtype=dtype, seed=6))
    state = {"memory": memory, "step": 0, "seen": torch.zeros(2, dtype=torch.bool), "nothing": None}
    return Case(module, of_module(module), segments, state, [module])


def closure_over_module(horizon: int, dtype: torch.dtype) -> Case:
    case = recurrence(horizon, dtype)
    module = case.cell

    def cell(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return module(x, state)

    case.cell = cell
    return case


GLOBAL = Recurrence()


def _global_cell(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return GLOBAL(x.double(), state.double())


def closure_over_global(horizon: int, dtype: torch.dtype) -> Case:
    case = recurrence(horizon, dtype)
    case.cell, case.parameters, case.modules = _global_cell, of_module(GLOBAL), [GLOBAL]
    return case


def partial(horizon: int, dtype: torch.dtype) -> Case:
    case = recurrence(horizon, dtype)
    module = case.cell

    def cell(scale: float, x: Tensor, state: Tensor, *, net: nn.Module) -> tuple[Tensor, Tensor]:
        return net(scale * x, state)

    case.cell = functools.partial(cell, 0.5, net=module)
    return case


class Trainer:
    """Not a module; holds one."""

    def __init__(self, module: nn.Module):
        self.module = module

    def step(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return self.module(x, state)


def bound_method(horizon: int, dtype: torch.dtype) -> Case:
    case = recurrence(horizon, dtype)
    case.cell = Trainer(case.cell).step
    return case


def bare_parameter(horizon: int, dtype: torch.dtype) -> Case:
    weight = nn.Parameter(normal(WIDTH, WIDTH, dtype=dtype))
    shift = normal(WIDTH, dtype=dtype, needs_grad=True)

    def cell(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.tanh(x @ weight + state + shift)
        return state.sum(), state

    state = normal(2, WIDTH, dtype=dtype, needs_grad=True)
    return Case(cell, {"weight": weight, "shift": shift}, rows(horizon, dtype), state)


def aliases(horizon: int, dtype: torch.dtype) -> Case:
    """Outputs that are the segment, the state and the parameter themselves; one segment tensor used everywhere."""
    weight = nn.Parameter(normal(2, WIDTH, dtype=dtype))
    shared = normal(2, WIDTH, dtype=dtype, needs_grad=True)

    def cell(segment: tuple, state: Tensor) -> tuple[tuple, Tensor]:
        own, common = segment
        new = torch.sin(own * state * weight + common)
        return (own, state, new, new, weight, common), new

    segments = [(x, shared) for x in rows(horizon, dtype)]
    return Case(cell, {"weight": weight}, segments, normal(2, WIDTH, dtype=dtype, needs_grad=True))


def language_model(horizon: int, dtype: torch.dtype, dropout: float = 0.0) -> Case:
    """`MemformerLM.loss` from its own initial memory, which needs a gradient; the last segment is shorter."""
    torch.manual_seed(13)
    config = MemformerLMConfig(
        vocabulary=17, width=8, heads=2, layers=2, hidden=16, slots=3, segment_length=5, dropout=dropout
    )
    model = MemformerLM(config).to(dtype)
    return Case(model.loss, of_module(model), _texts(horizon), lambda: model.initial_memory(2), [model])


def masked_language_model(horizon: int, dtype: torch.dtype) -> Case:
    case = language_model(horizon, dtype)
    (model,) = case.modules

    def cell(segment: tuple, memory: Tensor) -> tuple[Tensor, Tensor]:
        tokens, mask = segment
        logits, memory = model(tokens, memory, token_mask=mask)
        return (logits * mask[..., None]).square().mean(), memory

    generator = torch.Generator().manual_seed(16)
    texts = [tokens for tokens, _ in case.segments]
    case.segments = [(tokens, torch.rand(tokens.shape, generator=generator) < 0.6) for tokens in texts]
    case.segments[-1][1][0] = False  # a row of padding only
    case.cell = cell
    return case


def encoder_decoder(horizon: int, dtype: torch.dtype, dropout: float = 0.0) -> Case:
    torch.manual_seed(14)
    config = MemformerConfig(
        vocabulary=17,
        width=8,
        heads=2,
        encoder_layers=1,
        decoder_layers=2,
        hidden=16,
        slots=3,
        segment_length=5,
        dropout=dropout,
    )
    model = Memformer(config).to(dtype)
    segments = [(tokens, tokens, targets) for tokens, targets in _texts(horizon)]
    return Case(model.loss, of_module(model), segments, lambda: model.initial_memory(2), [model])


def _texts(horizon: int) -> list[tuple[Tensor, Tensor]]:
    """(tokens, targets) of two texts, five tokens a segment, three in the last; a few targets do not count."""
    generator = torch.Generator().manual_seed(15)
    tokens = torch.randint(17, (2, 5 * horizon - 1), generator=generator)
    targets = tokens[:, 1:].clone()
    targets[0, ::4] = -100
    return [(a, b) for a, b in zip(tokens[:, :-1].split(5, 1), targets.split(5, 1), strict=True)]


CASES: dict[str, Callable[[int, torch.dtype], Case]] = {
    case.__name__: case
    for case in (
        recurrence,
        gated,
        closure_over_module,
        closure_over_global,
        partial,
        bound_method,
        bare_parameter,
        aliases,
        language_model,
        masked_language_model,
        encoder_decoder,
    )
}


def values(tree: Any) -> Any:
    """Copies of a tree's tensors without their graph, the rest as it is."""
    return tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, tree)
