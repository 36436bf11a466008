"""What the contract says of memory, sizes, streams of bits and threads, for every op and way to run it."""

import json
import mmap
import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from guarded import guarded_memory

from memformer_kernels import memory_forget, memory_read, memory_write
from memformer_kernels.testing import Case, cotangent, make_case, run

OPS = {"memory_read": memory_read, "memory_write": memory_write, "memory_forget": memory_forget}
each_op = pytest.mark.parametrize("op", OPS)
# one tile of slots and several, of tokens in one chunk and in three, and none
SIZES = [(5, 7, 0), (5, 7, 0.4), (33, 20, 0.4), (3, 1050, 0), (5, 0, 0)]  # M, L, part that is hidden
CALLS = [(op, *sizes) for op in ("memory_read", "memory_write") for sizes in SIZES] + [
    ("memory_read", 0, 7, 0),
    ("memory_forget", 2, 0, 0),
]


# G7, G9: memory


@pytest.mark.guarantee("G7", "G9")
@pytest.mark.parametrize("op, slots, tokens, masked", CALLS)
def test_uninitialised_memory_never_matters_and_nothing_is_written_outside(path, op, slots, tokens, masked, same_bits):
    """The bits of a call whose memory held NaN, between bands that stay as they were, are those of another."""
    batch = 17 if op == "memory_forget" else 1  # 17 rows are two groups of the sum over the batch
    case = make_case(op, batch=batch, heads=1, slots=slots, tokens=tokens, width=20, masked=masked)
    with guarded_memory() as made:  # first: what writes outside is found by the bands, and not by the allocator
        guarded = path(case)
    assert same_bits(path(case), guarded)
    assert made or path.__name__ != "_triton"


@pytest.mark.guarantee("G9")
def test_guards_see_what_is_written_outside_and_what_never_is():
    with pytest.raises(AssertionError, match=r"written outside of a tensor torch.float32 \[3\]"), guarded_memory():
        torch.empty(3).as_strided((1,), (1,), torch.empty(3).storage_offset() + 3).fill_(1)
    with guarded_memory() as made:
        assert torch.empty((2, 3)).isnan().all() and torch.ones(2).new_empty(3, dtype=torch.float16).isnan().all()
    assert made == [(torch.float32, (2, 3)), (torch.float16, (3,))]


# G10: sizes

FAR = 2**30  # elements; the fourth entry of a dimension lies past 2^31
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it from 3.13 on


@pytest.mark.skipif(sys.platform != "linux", reason="memory without pages is asked for as Linux has it")
@pytest.mark.guarantee("G10", "G11")
@pytest.mark.parametrize("dim", range(4))
@each_op
def test_offsets_past_two_billion_elements(path, op, dim, monkeypatch, same_bits, agree):
    """Each dimension in turn strides over 2^30 elements, of memory of which only a few pages exist."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)  # it would copy all of it
    sizes = dict.fromkeys(("batch", "heads", "slots", "tokens"), 2) | {"width": 3}
    sizes |= dict.fromkeys((("batch",), ("heads",), ("slots", "tokens"), ("width",))[dim], 4)
    case = make_case(op, **sizes, dtype=torch.float16, masked=0.3)
    tensors = {**case.tensors, "grad": cotangent(case)}
    placed = {name: far_apart(tensor) for name, tensor in tensors.items()}
    grad = placed.pop("grad")
    got = path(Case(op, placed, case.options), grad)
    wanted = path(case, tensors["grad"])
    if op == "memory_write":  # the layout decides the order of its sums
        agree(got, wanted)
    else:
        assert same_bits(got, wanted)


def far_apart(tensor):
    """The same values, with those of the dimension of 4, if there is one, far from one another."""
    strides = [FAR if size == 4 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True)]
    size = (3 * FAR + 4096) * tensor.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    placed = torch.frombuffer(memory, dtype=tensor.dtype).as_strided(tensor.shape, strides)
    placed.copy_(tensor)
    return placed


@pytest.mark.guarantee("G10")
@each_op
def test_more_rows_than_a_grid_may_count_in_one_dimension(op, eager, explicit, agree):
    case = make_case(op, batch=70_000, heads=1, slots=1, tokens=1, width=2)
    agree(explicit(case), eager(case))


@pytest.mark.guarantee("G10")
def test_launches_count_their_programs_in_the_dimension_that_goes_to_two_billion():
    launch = pytest.importorskip("memformer_kernels.launch")
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *_, **__: None

    launch.Launcher(Kernel(), 2**31 - 1, ())(torch.ones(1))
    assert grids == [(2**31 - 1,)]


# G13: threads

COLD = """
import threading, torch
from memformer_kernels.testing import make_case, run
import importlib, json

def registered(op):
    api, autograd = (importlib.import_module(f"memformer_kernels.ops.{op}.{room}") for room in ("api", "autograd"))
    return lambda **arguments: autograd.apply(*api.prepare(**arguments), "eager")

OPS = ("memory_read", "memory_write", "memory_forget")
start, results = threading.Barrier(8), [None] * 8

def work(index):
    cases = [make_case(op, seed=index % 2) for op in OPS]
    start.wait()
    calls = [(None if index < 4 else registered(case.op)) for case in cases]
    got = [run(case, function=call) for case, call in zip(cases, calls)]
    results[index] = [float(t.double().abs().sum()) for r in got for t in r.tensors().values()]

threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(results))
"""


@pytest.mark.guarantee("G13")
def test_threads_may_be_the_first_to_call():
    """In a process that has run nothing: eight threads look up backends and registered ops at once."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", COLD], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr[-2000:]
    results = json.loads(done.stdout)
    assert all(result == results[i % 2 + 4 * (i // 4)] for i, result in enumerate(results))
    assert results[0] == pytest.approx(results[4], rel=1e-5) and results[0] != results[1]


@pytest.mark.guarantee("G13", "G14")
@each_op
def test_an_error_of_one_thread_is_no_error_of_another(op, same_bits):
    case, errors, results = make_case(op), [], []
    expected = run(case)
    start = threading.Barrier(6)

    def work(wrong):
        start.wait()
        for _ in range(20):
            try:
                results.append(run(case.map(lambda t: t.long()) if wrong else case))
            except TypeError as error:
                errors.append(str(error))

    threads = [threading.Thread(target=work, args=(index % 2,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == len(results) == 60 and all(same_bits(result, expected) for result in results)
    assert all(
        re.match(rf"{op}: \w+ must be float16, bfloat16, float32 or float64, got torch.int64$", e) for e in errors
    )
