"""How the Triton backend lives on the machine: repeats, graphs, streams, threads, sizes, compilation by PyTorch."""

import importlib
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch.library import opcheck
from triton_accuracy import FLOAT32_LIMIT, largest, largest_error
from triton_calls import (
    OPS,
    UNIT_ROUNDOFF,
    Check,
    answer,
    differing,
    differing_in_layout,
    dtypes,
    most_resident,
    name_of,
    registered,
    run,
)

import memformer_kernels
from memformer_kernels import testing
from memformer_kernels.testing import Case, Result, cotangent, make_case


def assert_right(got, expected, dtype, where):
    """Every tensor within float32's limit, or a few roundings of 16 bits."""
    limit = FLOAT32_LIMIT if dtype == torch.float32 else 8 * UNIT_ROUNDOFF[dtype]
    for name, tensor in got.tensors().items():
        answered = expected.tensors()[name]
        assert tensor.shape == answered.shape, f"{where}: shape of {name}"
        error = largest_error(tensor, answered)
        assert error <= limit * largest(answered), f"{where}: {name} is off by {error:.2g} of {largest(answered):.2g}"


def check_repeats(device, dtype, repeats=100):
    """The same bits every time, while another stream keeps the memory busy."""
    large = device == "cuda"
    repeats = repeats if large else 2
    sizes = dict(batch=8, heads=8, tokens=1000, width=64) if large else dict(batch=1, heads=1, tokens=70, width=16)
    if large:
        other, source = torch.cuda.Stream(), torch.ones(2**26, device=device)
        target = torch.empty_like(source)
    for op in OPS:
        for slots in (128, 300) if large else (17, 40):
            case = make_case(op, dtype=dtype, device=device, slots=slots, masked=0.1, **sizes)
            grad = cotangent(case)
            first = run(case, grad)
            for index in range(repeats):
                if large:
                    with torch.cuda.stream(other):
                        torch.neg(source, out=target)  # a kernel, not the copy engine
                wrong = differing(run(case, grad), first)
                assert not wrong, f"{op} M {slots} call {index}: {wrong}"
    return {"repeats": repeats}


def check_graph_capture(device, op):
    """Captured forward and backward follow their inputs, bit for bit as a call, and nothing in them waits."""
    for dtype in dtypes(device):
        for slots in (17, most_resident(dtype)):
            sizes = dict(batch=2, heads=2, slots=slots, tokens=2500, width=16, dtype=dtype, device=device, masked=0.3)
            case = make_case(op, **sizes)
            leaves = case.map(lambda t: t.clone().requires_grad_(t.is_floating_point()))
            differentiable = {name: t for name, t in leaves.tensors.items() if t.requires_grad}
            grad = cotangent(case)

            def step(leaves=leaves, differentiable=differentiable, grad=grad):
                output = registered(op)(**leaves.tensors, **leaves.options)
                grads = torch.autograd.grad(output, list(differentiable.values()), grad)
                return Result(output.detach(), dict(zip(differentiable, grads, strict=True)))

            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = step()
            for seed in (1, 2):
                fresh = make_case(op, **sizes, seed=seed)
                with torch.no_grad():
                    for name, tensor in fresh.tensors.items():
                        leaves.tensors[name].copy_(tensor)
                    grad.copy_(cotangent(fresh, seed + 5))
                graph.replay()
                wrong = differing(captured, run(fresh, cotangent(fresh, seed + 5)))
                assert not wrong, f"{name_of(dtype)} M {slots} seed {seed}: {wrong}"


def check_empty(device):
    """Any size may be 0."""
    for op in OPS:
        for size in ("batch", "heads", "slots", "tokens", "width"):
            for masked in (0, 0.3):
                for bias in (True, False):
                    case = make_case(op, device=device, masked=masked, bias=bias, **{size: 0})
                    assert_right(run(case), answer(case), torch.float32, f"{op} {size} 0, mask {masked}, bias {bias}")


def check_many_rows(device):
    """More rows than one dimension of a grid may count, 65535."""
    for op, slots in (("memory_read", 2), ("memory_write", 1), ("memory_forget", 8)):
        for dtype in (torch.float32, torch.bfloat16):
            heads, width = (8, 16) if op != "memory_forget" else (1, 16)
            case = make_case(
                op, batch=9000, heads=heads, slots=slots, tokens=1, width=width, dtype=dtype, device=device
            )
            grad = cotangent(case)
            expected = testing.run(case.map(lambda t: t.double()), "eager", grad.double())
            assert_right(run(case, grad), expected, dtype, f"{op} {name_of(dtype)}")


PAST = 2**31  # elements
LONG = PAST // 64 + 3  # tokens: at 64 channels the last ones lie past 2^31 elements
LAST = 5


def long_tensor(fill, last):
    tensor = torch.full((1, 1, LONG, 64), fill, dtype=torch.bfloat16, device=last.device)
    tensor[:, :, -LAST:] = last
    return tensor


def last_tokens(tensor):
    return tensor[:, :, -LAST:]


def long_read(device):
    """Real tensors of more than 2^31 elements. All but the last tokens are 0, and so is their gradient."""
    case = make_case(
        "memory_read", batch=1, heads=1, slots=16, tokens=LAST, width=64, dtype=torch.bfloat16, device=device
    )
    grad = cotangent(case)
    expected = answer(case, grad)
    got = run(case.replace(query=long_tensor(0, case.tensors["query"])), long_tensor(0, grad))
    first = got.output[:, :, :1]
    assert largest_error(first, case.tensors["value"].double().mean(2, keepdim=True)) <= 2 * 2.0**-8
    assert (got.output[:, :, :-LAST] == first).all(), "the tokens before the last"
    assert not got.grads["query"][:, :, :-LAST].any(), "gradient of the tokens before the last"
    short = Result(last_tokens(got.output), {**got.grads, "query": last_tokens(got.grads["query"])})
    assert_right(short, expected, torch.bfloat16, "the last tokens")


def long_write(device):
    """The same for the write: all but the last tokens are hidden, or so far behind that their weight is 0."""
    case = make_case(
        "memory_write", batch=1, heads=1, slots=16, tokens=LAST, width=64, dtype=torch.bfloat16, device=device
    )
    case = case.replace(query=case.tensors["query"].abs())
    grad = cotangent(case)
    expected = answer(case, grad)
    key, value = long_tensor(-100, case.tensors["key"]), long_tensor(3, case.tensors["value"])
    mask = torch.zeros((1, LONG), dtype=torch.bool, device=device)
    mask[:, -LAST:] = True
    for masked in (True, False):
        if masked:  # what a hidden token holds does not matter
            key[:, :, : LONG // 2] = math.nan
        got = run(case.replace(key=key, value=value, **({"token_mask": mask} if masked else {})), grad)
        for name in ("key", "value"):
            assert not got.grads[name][:, :, :-LAST].any(), f"gradient of {name} before the last, masked {masked}"
            got.grads[name] = last_tokens(got.grads[name])
        assert_right(got, expected, torch.bfloat16, f"the last tokens, masked {masked}")
        key[:, :, : LONG // 2] = -100


def check_long_tensors(device):
    """One after the other: each takes some 20 GiB."""
    long_read(device)
    long_write(device)
    return {"elements": LONG * 64}


ROOM = 2**16  # elements that lie side by side, of all tensors


def far_apart(tensors, dim):
    """The same values, with the entries of one dimension so far apart that the last lies past 2^31 elements."""
    groups = {}
    for name, tensor in tensors.items():
        groups.setdefault((tensor.dtype, tensor.shape[min(dim, tensor.dim() - 1)]), []).append(name)
    placed = {}
    for (dtype, size), names in groups.items():
        step = PAST // (size - 1) + ROOM
        base, offset = torch.empty(step * (size - 1) + ROOM, dtype=dtype, device=tensors[names[0]].device), 0
        for name in names:
            tensor = tensors[name]
            far = min(dim, tensor.dim() - 1)
            strides = list(tensor.narrow(far, 0, 1).contiguous().stride())
            strides[far] = step
            placed[name] = base.as_strided(tensor.shape, strides, offset)
            placed[name].copy_(tensor)
            offset += tensor.numel() // size
        assert offset <= ROOM
    return placed


def check_large_strides(device):
    """Views whose strides reach past 2^31 elements, along each dimension in turn."""
    for op in OPS:
        for slots in (3, 130):
            sizes = dict(batch=2, heads=2, slots=slots, tokens=slots, width=16, masked=0.3)
            case = make_case(op, dtype=torch.bfloat16, device=device, **sizes)
            grad = cotangent(case)
            expected = run(case, grad)
            for dim in range(4) if slots == 3 else (2,):
                placed = far_apart({**case.tensors, "grad": grad}, dim)
                laid_out = Case(op, {name: t for name, t in placed.items() if name != "grad"}, case.options)
                wrong = differing_in_layout(op, run(laid_out, placed["grad"]), expected)
                assert not wrong, f"{op} M {slots} dimension {dim}: {wrong}"
                del placed, laid_out
                torch.cuda.empty_cache()


def check_streams(device):
    """Runs on the current stream: work queued before it there is seen."""
    stream = torch.cuda.Stream()
    for op in OPS:
        for dtype in dtypes(device):
            for slots in (17, most_resident(dtype)):
                case = make_case(op, slots=slots, tokens=257, width=16, dtype=dtype, device=device, masked=0.3)
                grad = cotangent(case)
                expected = run(case, grad)
                late, late_grad = case.map(torch.zeros_like), torch.zeros_like(grad)
                torch.cuda.synchronize()
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(20_000_000)
                    for name, tensor in case.tensors.items():
                        late.tensors[name].copy_(tensor)
                    late_grad.copy_(grad)
                    got = run(late, late_grad)
                stream.synchronize()
                assert not differing(got, expected), f"{op} {name_of(dtype)} M {slots}: {differing(got, expected)}"


def check_threads(device):
    """Eight threads call every op at once, before any kernel is compiled."""
    sizes = dict(batch=2, heads=2, slots=17, tokens=70, width=32, dtype=torch.bfloat16, device=device, masked=0.3)
    calls = [make_case(op, **sizes, seed=seed) for op in OPS for seed in (0, 1)]
    start = threading.Barrier(8)

    def work(thread):
        start.wait()
        order = [(thread // 3 + i) % len(calls) for i in range(3 * len(calls))]
        return [(i, run(calls[i])) for i in order]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    expected = [run(call) for call in calls]
    wrong = {(calls[i].op, *differing(got, expected[i])) for thread in results for i, got in thread}
    assert all(len(names) == 1 for names in wrong), wrong
    for call, result in zip(calls, expected, strict=True):
        assert_right(result, answer(call), torch.bfloat16, call.op)
    return {"calls": sum(map(len, results))}


def check_compile(device, op):
    """`torch.compile` takes the call as one graph, and gives the bits of the call."""
    for dtype in dtypes(device):
        torch._dynamo.reset()
        case = make_case(op, slots=17, tokens=37, width=16, dtype=dtype, device=device, masked=0.3)
        on_gpu = device == "cuda"
        public = [partial(getattr(memformer_kernels, op), backend="triton")] if on_gpu else []  # there is none on a CPU
        for function in (registered(op), *public):
            compiled = torch.compile(function, fullgraph=True, backend="inductor" if on_gpu else "aot_eager")
            got = testing.run(case, function=compiled)
            assert not differing(got, run(case)), f"{name_of(dtype)}: {differing(got, run(case))}"


def check_opcheck(device, op):
    """The registered forward and backward are what their schemas and fakes say."""
    api = importlib.import_module(f"memformer_kernels.ops.{op}.api")
    namespace = torch.ops.memformer_kernels
    forward, backward = (getattr(namespace, f"{op}_{direction}").default for direction in ("forward", "backward"))
    for dtype, slots in ((torch.float16, 17), (torch.float32, 40)):
        case = make_case(op, slots=slots, dtype=dtype, device=device, masked=0.3, width=16)
        call, grad = api.prepare(**case.tensors, **case.options), cotangent(case)
        save = () if op == "memory_forget" else (True,)
        opcheck(forward, (*call, *save, "triton"))
        output, *saved = forward(*call, *save, "triton")
        if op == "memory_forget":
            *tensors, eps = call
            arguments = (grad, *tensors, *saved, eps)
        elif op == "memory_read":
            kept = (output, *saved) if saved[0].dim() == 3 else (None, None, None)
            arguments = (grad, *call[:4], *kept, *call[4:])
        else:
            arguments = (grad, *call[:7], *saved, *call[7:])
        opcheck(backward, (*arguments, "triton"))


CHECKS = [
    Check("threads", check_threads, gpu_only=True, cold=True),
    Check("long tensors", check_long_tensors, gpu_only=True),
    Check("large strides", check_large_strides, gpu_only=True),
    *(Check(f"compile {op}", check_compile, (op,), group="compile") for op in OPS),
    *(
        Check(f"repeats {name_of(dtype)}", check_repeats, (dtype,), gpu_only=dtype == torch.bfloat16)
        for dtype in UNIT_ROUNDOFF
    ),
    *(Check(f"graph capture {op}", check_graph_capture, (op,), gpu_only=True) for op in OPS),
    Check("streams", check_streams, gpu_only=True),
    Check("many rows", check_many_rows, gpu_only=True),
    Check("empty", check_empty),
    *(Check(f"opcheck {op}", check_opcheck, (op,), group="opcheck") for op in OPS),
]
