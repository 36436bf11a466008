"""How close the Triton backend comes to float64, over awkward shapes, hidden parts and hostile values."""

import math
import random

import torch
from triton_calls import OPS, UNIT_ROUNDOFF, Check, answer, dtypes, name_of, run, wide

from memformer_kernels import testing
from memformer_kernels.testing import cotangent, make_case

FLOAT32_LIMIT = 2e-5

# Errors that no dtype can avoid: float16's smallest number; a weight that a GPU flushes to 0 below 2^-126, times 2^10
UNDERFLOW = {torch.float32: 2.0**-116, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-116}

# Slots by width: all of them at the common width, elsewhere one tile and more than one.
SLOTS = {
    64: (1, 5, 16, 17, 33, 64, 96, 128, 130, 300, 256),
    8: (5, 130),
    16: (16, 33),
    24: (17, 300),
    80: (64, 130),
    96: (1, 96),
    128: (128, 300),
    256: (33, 96),
}
WIDTHS = ((96, 128, 256), (64,), (8, 16, 24, 80))  # one process each, so that a kernel is compiled once
CHANNELS = (8, 64, 96, 1000, 1024, 5000)  # of memory_forget
TOKENS = (1, 7, 64, 65, 257, 1000, 2500)  # the last: several programs share a head's tokens
HIDDEN = (0, 0.3, 0.6, 0, 0.3, 0.6, 0, "one row", 1)
TEMPERATURES = (1.0, 0.25, 1.0, 0.25, 0.05)
AMPLITUDES = (1.0, 0.1, 1.0, 3.0)


def cases(op, dtype, widths, device):
    """`(case, benign)`, always the same ones. Every value of every list comes as often as the others."""
    shuffled = random.Random(f"{op} {widths}")

    def turns(values):
        while True:
            yield from shuffled.sample(values, len(values))

    lists = (TOKENS, HIDDEN, TEMPERATURES, AMPLITUDES, (True, False), (True, False), (3, 3, 2), (1, 2, 3))
    choices = zip(*map(turns, lists), strict=True)
    shapes = [(width, slots) for width in widths for slots in (SLOTS[width] if op != "memory_forget" else (1, 5))]
    for seed, (width, slots) in enumerate(shapes):
        tokens, hidden, temperature, amplitude, bias, carried, heads, batch = next(choices)
        if op == "memory_forget":
            heads, batch, temperature = 1, (1, 3, 33, 70)[seed % 4], 1.0
        if device == "cpu":  # the interpreter takes a millisecond for every tile
            if seed % 3 != 1:
                continue
            heads, tokens = min(heads, 2), min(tokens, 257)
        case = make_case(
            op,
            batch=batch,
            heads=heads,
            slots=slots,
            tokens=tokens,
            width=width,
            dtype=dtype,
            device=device,
            seed=seed,
            amplitude=amplitude,
            masked=0.3 if hidden == "one row" else hidden,
            bias=bias,
            temperature=temperature,
            carried_dtype=torch.float32 if carried and op == "memory_write" else dtype,
        )
        if op == "memory_read":
            case.options["scale"] = width**-0.5 / temperature
        elif op == "memory_forget" and carried:
            case = case.replace(bias=case.tensors["bias"].float())
        for name in ("slot_mask", "token_mask"):
            if hidden == "one row" and name in case.tensors:
                case.tensors[name][0] = False
        yield case, temperature >= 0.25 and amplitude <= 1


def describe(case):
    sizes = {name: list(tensor.shape) for name, tensor in case.tensors.items()}
    return f"{sizes} {case.options}"


def largest(tensor):
    return tensor.abs().max().item() if tensor.numel() else 0.0


def largest_error(tensor, expected):
    """Inf where a number is missing."""
    return largest((tensor.double() - expected).nan_to_num(nan=math.inf))


def logit_roundings(case):
    """How far a logit may be off, for the rounding of its terms: the relative error of a weight."""
    tensors = case.map(wide).tensors
    if case.op == "memory_forget" or not tensors["key"].numel():
        return 0.0
    scale = tensors["key"].shape[3] ** -0.5 / case.options.get("temperature", 1.0)
    keys = [tensors[name] for name in ("key", "own_key") if name in tensors]
    terms = max(largest(tensors["query"].abs() @ key.abs().mT) for key in keys)
    return UNIT_ROUNDOFF[torch.float32] * case.options.get("scale", scale) * terms


def own_key_rounding(case):
    """The rounding error of the own key's gradient where a slot sees little but itself.

    That gradient is scale * w0 * (rowdot(du, slots) - rowdot(du, u)) * query, and u is then nearly the slot: what is
    left of the difference may be less than the roundings of its terms. The eager op has the same error.
    """
    tensors = case.map(wide).tensors
    query, slots = tensors["query"], tensors["slots"]
    split = (query.shape[1], query.shape[3])
    terms = (cotangent(case).to(slots).abs() * slots.abs()).unflatten(-1, split).sum(-1).transpose(1, 2)
    scale = split[1] ** -0.5 / case.options["temperature"]
    return UNIT_ROUNDOFF[torch.float32] * scale * largest(terms[..., None] * query.abs())


def allowed_error(expected, eager_error, dtype, storage, benign, roundings=0.0):
    """The largest error that one tensor may have; `dtype` is the call's, `storage` that of the tensor."""
    if dtype == torch.float32:
        allowed = (FLOAT32_LIMIT + (0 if benign else 2 * roundings)) * largest(expected)
    elif benign:
        allowed = 2 * eager_error + UNIT_ROUNDOFF[dtype] * largest(expected)
    else:
        allowed = 16 * UNIT_ROUNDOFF[dtype] * largest(expected)
    return allowed + UNDERFLOW[storage]


def check_accuracy(device, op, dtype, widths):
    relative = {"benign": {}, "hostile": {}}
    counts, failures, fullest = {"benign": 0, "hostile": 0}, [], 0.0
    for case, benign in cases(op, dtype, widths, device):
        expected, got = answer(case).tensors(), run(case).tensors()
        eager = testing.run(case, "eager").tensors() if benign and dtype != torch.float32 else expected
        roundings, kind = logit_roundings(case), "benign" if benign else "hostile"
        counts[kind] += 1
        for name, tensor in got.items():
            answered = expected[name]
            error, eager_error = largest_error(tensor, answered), largest_error(eager[name], answered)
            allowed = allowed_error(answered, eager_error, dtype, tensor.dtype, benign, roundings)
            if name == "grad_own_key" and not benign:
                allowed += own_key_rounding(case)
            if error > allowed:
                failures.append(f"{name} {error:.3g} > {allowed:.3g} of {largest(answered):.3g}, {describe(case)}")
            fullest = max(fullest, error / allowed)
            if largest(answered) > UNDERFLOW[tensor.dtype] / UNIT_ROUNDOFF[tensor.dtype]:
                relative[kind][name] = max(relative[kind].get(name, 0.0), error / largest(answered))
    assert not failures, f"{len(failures)} tensors: " + " | ".join(failures[:5])
    return {"cases": counts, "largest error over what is allowed": fullest, "largest relative error": relative}


def check_limits_are_tight(device, op):
    """Inverse test of the limits: a result that is off by a little more than they allow must not pass."""
    for dtype in dtypes(device):
        for benign in (True, False):
            case = make_case(op, dtype=dtype, device=device, slots=17, tokens=37, width=16, masked=0.3)
            expected, eager = answer(case).tensors(), testing.run(case, "eager").tensors()
            for name, answered in expected.items():
                eager_error = largest_error(eager[name], answered)
                allowed = allowed_error(answered, eager_error, dtype, eager[name].dtype, benign)
                off = allowed / largest(answered)
                assert largest_error(answered * (1 + 0.99 * off), answered) <= allowed, name
                assert largest_error(answered * (1 + 1.01 * off), answered) > allowed, name
                assert largest_error(answered.index_fill(0, answered.new_zeros(1).long(), math.nan), answered) > allowed
                # no limit may have grown: in 16 bits eager is at most one rounding off, and the rule adds one
                assert off <= (3 if benign else 16) * UNIT_ROUNDOFF[dtype] + FLOAT32_LIMIT, (name, off)


def check_float32_is_ieee(device, op):
    """The error of float32 grows a lot where TF32 is asked for, so that it is used there and nowhere else."""
    figures = {}
    for slots in (32, 130):  # one tile of slots, and several
        case = make_case(op, device=device, heads=2, slots=slots, tokens=257, width=64, temperature=1.0)
        expected = answer(case).tensors()
        case.options["allow_tf32"] = False
        exact = run(case).tensors()
        case.options["allow_tf32"] = True
        rough = run(case).tensors()
        for name in ("output", "grad_query", "grad_key", "grad_value"):
            ieee, tf32 = (largest_error(r[name], expected[name]) / largest(expected[name]) for r in (exact, rough))
            figures[f"{name} M {slots}"] = {"ieee": ieee, "tf32": tf32}
            assert ieee <= 5e-6 and tf32 >= 5e-5, f"{name} M {slots}: {ieee:.2g} in IEEE, {tf32:.2g} in TF32"
    return figures


def accuracy_checks(op):
    for dtype in UNIT_ROUNDOFF:
        for widths in (CHANNELS,) if op == "memory_forget" else WIDTHS:
            name = f"accuracy {op} {name_of(dtype)}, D {min(widths)} to {max(widths)}"
            yield Check(name, check_accuracy, (op, dtype, widths), gpu_only=dtype == torch.bfloat16)


CHECKS = [
    *(check for op in ("memory_write", "memory_read", "memory_forget") for check in accuracy_checks(op)),
    *(Check(f"limits are tight {op}", check_limits_are_tight, (op,), group="limits") for op in OPS),
    *(
        Check(f"float32 is IEEE {op}", check_float32_is_ieee, (op,), gpu_only=True, group="limits")
        for op in ("memory_read", "memory_write")
    ),
]
