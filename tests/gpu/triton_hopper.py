"""The kernel in Gluon, which no interpreter runs: the same bits as Triton's, which take what it cannot."""

import torch
from triton_calls import Check, differing, launches, run, same_bits

from memformer_kernels import tiles
from memformer_kernels.ops.memory_read import triton as read
from memformer_kernels.testing import cotangent, make_case

SLOTS = (65, 96, 128, 129, 200, 256)
TOKENS = (1, 63, 64, 1000, 2049)  # parts of a tile, and several programs for a head
HIDDEN = (0, 0.3, 0, 0.9, 1)


def with_wide_rows(tensor):
    """The same values, in rows that are no multiple of 16 bytes apart."""
    wide = tensor.new_empty(*tensor.shape[:-1], tensor.shape[-1] + 9)[..., : tensor.shape[-1]]
    return wide.copy_(tensor)


def check_hopper(device, dtype, width):
    """Output, gradients and what is saved, over sizes, hidden slots full of NaN, and layouts that only Triton takes."""
    if tiles.architecture(torch.device(device, 0)) != 90:
        return {"skipped": "needs a GPU of compute capability 9.0"}
    count = 0
    for i, (slots, tokens) in enumerate((slots, tokens) for slots in SLOTS for tokens in TOKENS):
        if width <= 64 and slots <= 128:
            continue  # there Triton's is as fast
        sizes = dict(batch=2, heads=3, slots=slots, tokens=tokens, width=width, amplitude=(1.0, 3.0)[i % 2])
        case = make_case("memory_read", masked=HIDDEN[i % 5], dtype=dtype, device=device, **sizes)
        if case.tensors.get("slot_mask") is not None:
            hidden = ~case.tensors["slot_mask"][:, None, :, None]
            key, value = (case.tensors[name].masked_fill(hidden, float("nan")) for name in ("key", "value"))
            case = case.replace(key=key, value=value)
        per_head = {name: with_wide_rows(case.tensors[name]) for name in ("query", "key", "value")}
        other, grad = case.replace(**per_head), cotangent(case)
        with launches() as names:
            first = run(case, grad)
        with launches() as others:
            again = run(other, grad)
        where = f"M {slots} L {tokens}"
        assert "_memory_read_forward_hopper_kernel" in names, f"{where}: {names}"
        assert "_memory_read_forward_hopper_kernel" not in others, f"{where}: {others}"
        assert not differing(first, again), f"{where}: {differing(first, again)}"
        call = [case.tensors[name] for name in ("query", "key", "value")] + [
            case.tensors.get("slot_mask"),
            0.125,
            False,
        ]
        kept, unkept = read.forward(*call, True)[0], read.forward(*call, False)[0]
        assert same_bits(kept, unkept), f"{where}: what is saved changes the output"
        count += 1
    return {"calls of the same bits in Gluon and in Triton": count}


CHECKS = [
    Check(f"gluon {str(dtype)[6:]}, D {width}", check_hopper, (dtype, width), gpu_only=True)
    for dtype, width in ((torch.bfloat16, 64), (torch.float16, 64), (torch.bfloat16, 128), (torch.bfloat16, 96))
]
