"""Random calls of the ops, as JSON, held to the contract. A failure prints the command that repeats it:

PYTHONPATH=. python tests/fuzz.py triton '{"op": "memory_read", "seed": 3, ...}'
"""

import json
import random
import sys

import layouts
import torch
from conftest import PATHS  # before all that imports Triton: it chooses the interpreter

from memformer_kernels.testing import Case, cotangent, error_bound, make_case, oracle, shares_of_bound

CHOICES = {
    "batch": (1, 2, 3),
    "heads": (1, 2, 3),
    "slots": (0, 1, 2, 5, 15, 16, 17, 31, 32, 33),
    "tokens": (0, 1, 2, 7, 16, 17, 31, 33, 47, 64, 65),
    "width": (8, 16, 20, 24, 32, 48, 64),
    "temperature": (1.0, 0.25, 0.05),
    "amplitude": (0.1, 1.0, 3.0),
    "hidden": ("no mask", "none", 0.3, 0.6, "all", "one row"),
    "layout": ("contiguous", *(layout.__name__ for layout in layouts.LAYOUTS)),
    "grad_layout": ("contiguous", *(layout.__name__ for layout in layouts.LAYOUTS)),
    "bias": (True, False),
    "carried": ("float32", None),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def draw(op: str, dtype: str, seed: int) -> dict:
    chance = random.Random(f"{op} {dtype} {seed}")
    return {"op": op, "dtype": dtype, "seed": seed, **{name: chance.choice(of) for name, of in CHOICES.items()}}


def build(spec: dict) -> tuple[Case, torch.Tensor]:
    """`(case, gradient of the output)`, laid out as `spec` says."""
    spec, dtype = dict(spec), DTYPES[spec["dtype"]]
    layout, grad_layout = (getattr(layouts, spec.pop(name)) for name in ("layout", "grad_layout"))
    hidden, carried = spec.pop("hidden"), spec.pop("carried")
    part = hidden if isinstance(hidden, float) else {"no mask": 0, "all": 1}.get(hidden, 0.3)
    wide = torch.float32 if carried and spec["op"] == "memory_write" else None
    case = make_case(**{**spec, "dtype": dtype}, masked=part, carried_dtype=wide)
    if spec["op"] == "memory_read":
        case.options["scale"] = spec["width"] ** -0.5 / spec["temperature"]
    for name in {"slot_mask", "token_mask"} & set(case.tensors):
        case.tensors[name][0] = hidden != "one row" and case.tensors[name][0]
        if hidden == "none":
            case.tensors[name].fill_(True)
    placed = case.map(lambda t: layout(t) if t.numel() else t)
    grad = cotangent(case)
    return placed, grad_layout(grad) if grad.numel() else grad


def check(spec: dict, path) -> tuple[float, float | None]:
    """`(largest share of the bound, largest share of the rule of twice eager's error or None where it does not apply)`.

    Raises AssertionError where the contract is broken.
    """
    case, grad = build(spec)
    tensors = {**case.tensors, "the incoming gradient": grad}
    before = {name: _bytes(tensor) for name, tensor in tensors.items()}
    result = path(case, grad)
    changed = [name for name, tensor in tensors.items() if not torch.equal(_bytes(tensor), before[name])]
    assert not changed, f"{changed} have changed"
    expected = oracle(case, grad)
    shares = shares_of_bound(result, expected, error_bound(case, grad))
    assert all(share <= 1 for share in shares.values()), f"shares of the bound: {shares}"
    _check_hidden(case, result)
    if spec["dtype"] == "float32" or spec["temperature"] < 0.25 or spec["amplitude"] > 1:
        return max(shares.values()), None
    shares_of_rule = _twice_eager(case, grad, result, expected, torch.finfo(DTYPES[spec["dtype"]]).eps / 2)
    assert all(share <= 1 for share in shares_of_rule.values()), f"shares of twice eager: {shares_of_rule}"
    return max(shares.values()), max(shares_of_rule.values())


def _check_hidden(case, result):
    for name, keys in (("slot_mask", "key"), ("token_mask", "key")):
        if name in case.tensors:
            hidden = ~case.tensors[name][:, None, :, None].expand_as(case.tensors[keys])
            wrong = [n for n in ("key", "value") if result.grads[n][hidden].any()]
            assert not wrong, f"gradient of {wrong} where hidden"


def _twice_eager(case, grad, result, expected, unit):
    eager, shares = PATHS["eager"](case, grad).tensors(), {}
    for name, tensor in result.tensors().items():
        if tensor.numel():
            answer = expected.tensors()[name]
            error, of_eager = ((t.double() - answer).abs().max().item() for t in (tensor, eager[name]))
            allowed = 2 * of_eager + unit * answer.abs().max().item() + 2.0**-24  # float16's smallest number
            shares[name] = error / allowed
    return shares or {"": 0.0}


def _bytes(tensor):
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).clone()


if __name__ == "__main__":
    print(check(json.loads(sys.argv[2]), PATHS[sys.argv[1]]))
