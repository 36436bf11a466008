"""What the contract promises on a GPU, beyond the checks of `check_triton.py`. As a program, it prints the digest of a
fixed set of calls."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import torch
from triton_accuracy import CHANNELS, WIDTHS, cases, describe
from triton_calls import OPS, UNIT_ROUNDOFF, Check, answer, differing, dtypes, most_resident, name_of, rows, run
from triton_machine import check_repeats

import memformer_kernels
from memformer_kernels import launch, tiles
from memformer_kernels.testing import Case, cotangent, error_bound, make_case, shares_of_bound


def small(op, dtype, device, slots):
    sizes = dict(batch=2, heads=2, tokens=257) if device != "cpu" else dict(batch=1, heads=1, tokens=17)
    return make_case(op, slots=slots, width=16, masked=0.3, dtype=dtype, device=device, **sizes)


def slot_counts(op, dtype):
    """One tile of slots, and several."""
    return (17,) if op == "memory_forget" else (17, most_resident(dtype))


def check_bound(device, op, dtype, widths):
    """G1: every element of every tensor is within 2 `error_bound`, over awkward shapes and hostile values."""
    worst, failures, count = {}, [], 0
    for case, _ in cases(op, dtype, widths, device):
        # where a sum has millions of products the bound takes minutes, and says nothing that smaller ones do not
        if op != "memory_forget" and case.tensors["query"].numel() * case.tensors["key"].shape[2] > 2**27:
            continue
        count += 1
        shares = shares_of_bound(run(case), answer(case), error_bound(case, device=device))
        worst.update({name: max(share, worst.get(name, 0.0)) for name, share in shares.items()})
        failures += [f"{name} {share:.3g}, {describe(case)}" for name, share in shares.items() if not share <= 1]
    assert not failures, f"{len(failures)} tensors above 2 error_bound: " + " | ".join(failures[:5])
    return {
        "cases": count,
        "shares": worst,
        "figures": {f"largest share of 2 error_bound, {op}, {name_of(dtype)}": max(worst.values())},
    }


def check_many_repeats(device, dtype):
    """G7: a thousand calls of each op, forward and backward, beside a stream that keeps the memory busy."""
    return {"figures": {"bitwise repeats": check_repeats(device, dtype, 1000)["repeats"]}}


def digests(device):
    """SHA-256 of the outputs and gradients of a fixed set of calls, by call."""
    found = {}
    for op in OPS:
        for dtype in dtypes(device):
            for slots in slot_counts(op, dtype):
                result = run(small(op, dtype, device, slots))
                sha = hashlib.sha256()
                for tensor in result.tensors().values():
                    sha.update(tensor.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
                found[f"{op} {name_of(dtype)} M {slots}"] = sha.hexdigest()
    return found


def check_cold_processes(device):
    """G7: two processes that compile every kernel anew give the same bits."""

    def cold(_):
        with tempfile.TemporaryDirectory() as empty:
            environment = {**os.environ, "TRITON_CACHE_DIR": empty}
            command = [sys.executable, __file__, device]
            done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
        assert done.returncode == 0, done.stderr[-1500:]
        return json.loads(done.stdout.splitlines()[-1])

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(cold, range(2))
    wrong = [call for call in first if first[call] != second[call]]
    assert not wrong, f"not the same bits in two processes: {wrong}"
    assert len(set(first.values())) == len(first), "calls of other dtypes and sizes have the same digest"
    return {"figures": {"calls with equal digests in two cold processes": len(first)}}


# Slots, tokens, width, hidden: of more than one group of chunks, and the last one not whole
GROUPED = (
    (64, 4096, 64, 0.0),
    (128, 4096, 64, 0.0),
    (128, 16384, 64, 0.0),
    (100, 4999, 64, 0.5),
    (128, 8192, 24, 0.0),
)


def check_groupings(device, dtype):
    """G8: the same bits whether a program takes a chunk of tokens or a group of them, and so in any batch."""
    number = tiles.multiprocessors
    try:
        for slots, tokens, width, masked in GROUPED:
            sizes = dict(batch=1, heads=2, slots=slots, tokens=tokens, width=width, masked=masked)
            case = make_case("memory_write", dtype=dtype, device=device, **sizes)
            place = case.tensors["query"].device
            if tiles.grouped_chunks(tokens, 64 if slots == 64 else 128, 64, place)[1] == 1:
                return {"skipped": "on this architecture a group is one chunk"}
            grad, results = cotangent(case), []
            for multiprocessors in (0, 10**9):
                tiles.multiprocessors = lambda device, count=multiprocessors: count
                launch.forget_plans()
                results.append(run(case, grad))
            assert not differing(*results), f"{differing(*results)}, {describe(case)}"
    finally:
        tiles.multiprocessors = number
        launch.forget_plans()
    return {"figures": {f"calls of equal bits by chunks and by groups, {name_of(dtype)}": len(GROUPED)}}


LARGE = dict(heads=8, tokens=512, slots=16, width=64)
BATCH = 2**31 // (8 * 512 * 64) + 2  # its last rows lie past 2^31 elements of the queries, or of keys and values


def large_case(op, device):
    """Values drawn on the device: the CPU would take minutes."""
    generator = torch.Generator(device).manual_seed(0)
    small = make_case(
        op, batch=1, dtype=torch.bfloat16, device=device, **(LARGE if op != "memory_forget" else LARGE | {"slots": 512})
    )

    def large(name, tensor):
        shape = tensor.shape if name == "bias" else (BATCH, *tensor.shape[1:])
        return torch.randn(shape, dtype=tensor.dtype, device=device, generator=generator)

    case = Case(op, {name: large(name, t) for name, t in small.tensors.items()}, small.options)
    like = case.tensors["query" if op == "memory_read" else "slots"]
    return case, torch.randn(like.shape, dtype=like.dtype, device=device, generator=generator)


def check_large_batch(device, op):
    """G10: real tensors past 2^31 elements; sampled rows have the bits of the same rows computed alone."""
    case, grad = large_case(op, device)
    got = run(case, grad)
    most = max(t.numel() for t in case.tensors.values())
    assert most > 2**31
    for row in (0, 1, BATCH // 2, BATCH - 2, BATCH - 1):
        alone = run(rows(case, [row]), grad[[row]])
        names = [name for name in alone.tensors() if name != "grad_bias"]
        wrong = [
            n
            for n in names
            if not torch.equal(alone.tensors()[n][0].view(torch.int16), got.tensors()[n][row].view(torch.int16))
        ]
        assert not wrong, f"row {row} of {BATCH}: {wrong}"
    return {"figures": {"elements of the largest tensor": most}}


def check_guards(device):
    """G9: with every new tensor full of NaN between guard bands, the same bits, and bands that stay as they were."""
    from guarded import guarded_memory

    for op in OPS:
        for dtype in dtypes(device):
            for slots in slot_counts(op, dtype):
                case = small(op, dtype, device, slots)
                grad, first = cotangent(case), run(case)
                with guarded_memory() as made:
                    again = run(case, grad)
                assert made and not differing(again, first), (
                    f"{op} {name_of(dtype)} M {slots}: {differing(again, first)}"
                )


def check_no_synchronisation(device):
    """G12: once compiled, a call never waits for the GPU, forward or backward."""
    for op in OPS:
        for dtype in dtypes(device):
            for slots in slot_counts(op, dtype):
                case = small(op, dtype, device, slots)
                grad = cotangent(case)
                run(case, grad)
                torch.cuda.set_sync_debug_mode("error")
                try:
                    run(case, grad)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.ones(1, device=device).item()
    except RuntimeError:
        return
    finally:
        torch.cuda.set_sync_debug_mode("default")
    raise AssertionError("a wait that was planted is not seen")


def check_side_streams(device):
    """G12: the op on one stream behind a producer that sleeps on another, ordered by events alone."""
    producer, consumer = torch.cuda.Stream(), torch.cuda.Stream()
    for op in OPS:
        for slots in slot_counts(op, torch.bfloat16):
            case = small(op, torch.bfloat16, device, slots)
            grad = cotangent(case)
            expected = run(case, grad)
            late, late_grad = case.map(torch.zeros_like), torch.zeros_like(grad)
            torch.cuda.synchronize()
            with torch.cuda.stream(producer):
                torch.cuda._sleep(50_000_000)
                for name, tensor in case.tensors.items():
                    late.tensors[name].copy_(tensor)
                late_grad.copy_(grad)
            consumer.wait_stream(producer)
            with torch.cuda.stream(consumer):
                got = run(late, late_grad)
            with torch.cuda.stream(producer):
                producer.wait_stream(consumer)
                for tensor in (*late.tensors.values(), late_grad):
                    tensor.zero_()  # too early for an op that runs elsewhere
            torch.cuda.synchronize()
            assert not differing(got, expected), f"{op} M {slots}: {differing(got, expected)}"


def check_mixed_devices(device):
    """G12: a tensor on another device is refused, in the contract's words, whichever it is."""
    for op in OPS:
        case = make_case(op, device=device, masked=0.3)
        for name, tensor in case.tensors.items():
            try:
                getattr(memformer_kernels, op)(**case.replace(**{name: tensor.cpu()}).tensors)
            except ValueError as error:
                assert f"{op}: " in str(error) and "must be on the device of" in str(error), error
            else:
                raise AssertionError(f"{op} took {name} from the CPU")


def check_two_devices(device):
    """G12: the current device is 0, the tensors are on 1, and so is the work; in threads on both at once too."""
    if torch.cuda.device_count() < 2:
        return {"skipped": "there is one GPU"}
    for op in OPS:
        for dtype in dtypes(device):
            for slots in slot_counts(op, dtype):
                here, there = (small(op, dtype, f"cuda:{i}", slots) for i in (0, 1))
                expected = run(here)
                for _ in range(2):  # the second time by the shorter way
                    got = run(there)
                    assert torch.cuda.current_device() == 0 and got.output.device.index == 1
                    wrong = [
                        n for n, t in got.tensors().items() if not torch.equal(t.cpu(), expected.tensors()[n].cpu())
                    ]
                    assert not wrong, f"{op} {name_of(dtype)} M {slots}: {wrong}"
                with ThreadPoolExecutor(2) as pool:
                    both = list(pool.map(run, (here, there)))
                assert all(torch.equal(got.output.cpu(), expected.output.cpu()) for got in both), f"{op} in two threads"
    return {"figures": {"GPUs": torch.cuda.device_count()}}


def bound_checks():
    for op in ("memory_write", "memory_read", "memory_forget"):
        for dtype in UNIT_ROUNDOFF:
            for widths in (CHANNELS,) if op == "memory_forget" else WIDTHS:
                name = f"bound {op} {name_of(dtype)}, D {min(widths)} to {max(widths)}"
                yield Check(name, check_bound, (op, dtype, widths), gpu_only=dtype == torch.bfloat16)


CHECKS = [
    *(Check(f"large batch {op}", check_large_batch, (op,), gpu_only=True, group="large") for op in OPS),
    *(
        Check(f"many repeats {name_of(d)}", check_many_repeats, (d,), gpu_only=True)
        for d in (torch.bfloat16, torch.float32)
    ),
    *(Check(f"groupings {name_of(d)}", check_groupings, (d,), gpu_only=True) for d in (torch.bfloat16, torch.float16)),
    Check("cold processes", check_cold_processes),
    *bound_checks(),
    Check("guards", check_guards, group="calls"),
    Check("no synchronisation", check_no_synchronisation, gpu_only=True, group="calls"),
    Check("side streams", check_side_streams, gpu_only=True, group="calls"),
    Check("mixed devices", check_mixed_devices, gpu_only=True, group="calls"),
    Check("two devices", check_two_devices, gpu_only=True),
]


if __name__ == "__main__":
    torch.use_deterministic_algorithms(True, warn_only=True)
    print(json.dumps(digests(sys.argv[1])))
