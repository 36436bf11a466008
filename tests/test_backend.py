import importlib
import sys
import threading
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from memformer_kernels import backend, checks, explain, memory_forget, memory_read
from memformer_kernels.testing import make_case, run

pytestmark = pytest.mark.guarantee("G14")

RUNS = """
from memformer_kernels.ops.{op} import eager

calls = []
saves = getattr(eager, "saves", None)

def unsupported_reason(*call):
    return {reason!r}

def forward(*call):
    calls.append("forward")
    return eager.forward(*call)

def backward(*call):
    calls.append("backward")
    return eager.backward(*call)
"""


@pytest.fixture
def plant(monkeypatch, tmp_path):
    """`plant(op, cuda=..., triton=...)`: the op has these fused backends and no other, each given by the reason that it
    cannot run, by None when it can, or by source that starts with a statement; returns what lists a backend's calls."""

    def plant(op, **backends):
        package = f"memformer_kernels.ops.{op}"
        folder = tmp_path / op
        folder.mkdir()
        for name in backend.FUSED:
            monkeypatch.delitem(sys.modules, f"{package}.{name}", raising=False)
            monkeypatch.delattr(f"{package}.{name}", raising=False)
            if name in backends:
                reason = backends[name]
                is_source = reason is not None and reason.startswith(("import ", "raise "))
                (folder / f"{name}.py").write_text(reason if is_source else RUNS.format(op=op, reason=reason))
        monkeypatch.setattr(sys.modules[package], "__path__", [str(folder)])
        importlib.invalidate_caches()
        importlib.reload(backend)  # with empty caches
        return lambda name: getattr(sys.modules.get(f"{package}.{name}"), "calls", [])

    yield plant
    for op in backend.OPS:
        for name in backend.FUSED:
            planted = sys.modules.get(f"memformer_kernels.ops.{op}.{name}")
            if planted is not None and str(tmp_path) in planted.__file__:
                del sys.modules[planted.__name__]
                delattr(sys.modules[f"memformer_kernels.ops.{op}"], name)
    monkeypatch.undo()
    importlib.reload(backend)


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, for machines without one."""

    is_cuda = True


def on_gpu(case):
    return [t.as_subclass(OnGpu) for t in case.tensors.values()]


@pytest.mark.parametrize(
    "cuda, triton, chosen",
    [(None, None, "cuda"), ("is too wide", None, "triton"), ("is too wide", "is too old", "eager")],
)
@pytest.mark.parametrize("op", backend.OPS)
def test_auto_takes_the_first_fused_backend_that_can_run(plant, op, cuda, triton, chosen, agree, eager):
    calls = plant(op, cuda=cuda, triton=triton)
    case = make_case(op, masked=0.4)
    agree(run(case), eager(case))
    for name in backend.FUSED:
        assert calls(name) == (["forward", "backward"] if name == chosen else [])
    explanation = explain(op, **case.tensors)
    assert explanation.backend == chosen
    assert explanation.reasons == {"cuda": cuda, "triton": triton, "eager": None}


def test_named_backend_runs_and_is_not_replaced_by_a_better_one(plant):
    calls = plant("memory_read", cuda=None, triton=None)
    case = make_case("memory_read")
    run(case, "triton")
    assert calls("triton") == ["forward", "backward"] and calls("cuda") == []
    run(case, "eager")
    assert calls("triton") == ["forward", "backward"] and calls("cuda") == []


def test_named_backend_that_cannot_run_raises_its_reason(plant):
    calls = plant("memory_read", cuda="slots are not round", triton=None)
    case = make_case("memory_read")
    message = "^memory_read: backend 'cuda' cannot run this call: slots are not round$"
    with pytest.raises(NotImplementedError, match=message):
        run(case, "cuda")
    assert calls("triton") == []


def test_backend_that_does_not_exist_says_so(plant):
    plant("memory_read")
    case = make_case("memory_read")
    reasons = explain("memory_read", **case.tensors).reasons
    assert reasons["triton"] == "memory_read has no triton kernel in this version"
    with pytest.raises(NotImplementedError, match="'cuda' cannot run this call: memory_read has no cuda kernel"):
        run(case, "cuda")


@pytest.mark.parametrize(
    "source, reason",
    [
        ("import no_such_library", r"cannot be imported \(.*No module named 'no_such_library'\)"),
        ("raise ImportError('libcuda.so.1: not found')", r"cannot be imported \(.*libcuda.so.1: not found\)"),
        ("raise RuntimeError('0 active drivers')", r"cannot be imported \(.*0 active drivers"),
    ],
)
def test_backend_that_cannot_be_imported_is_explained_and_passed_over(plant, source, reason):
    calls = plant("memory_forget", cuda=source, triton=None)
    case = make_case("memory_forget")
    run(case)
    assert calls("triton") == ["forward", "backward"]
    with pytest.raises(NotImplementedError, match=reason):
        run(case, "cuda")


def test_unknown_backend_is_refused_before_anything_runs(plant):
    calls = plant("memory_read", cuda=None)
    with pytest.raises(ValueError, match="memory_read: backend must be one of auto, cuda, triton, eager, got 'Cuda'"):
        run(make_case("memory_read"), "Cuda")
    assert explain("memory_read", **make_case("memory_read").tensors).backend == "cuda" and calls("cuda") == []


def test_transforms_of_torch_func_run_on_eager(plant):
    calls = plant("memory_forget", cuda=None)
    slots, bias = make_case("memory_forget").tensors.values()
    vmapped = torch.func.vmap(lambda row: memory_forget(row[None], bias)[0])(slots)
    torch.testing.assert_close(vmapped, memory_forget(slots, bias, backend="eager"))
    assert calls("cuda") == []
    with pytest.raises(NotImplementedError, match="torch.func transforms are active; only eager composes with them"):
        torch.func.vmap(lambda row: memory_forget(row[None], bias, backend="cuda")[0])(slots)


@pytest.mark.guarantee("G15")
@pytest.mark.parametrize("requested", ["auto", "triton"])
@pytest.mark.parametrize("op", backend.OPS)
def test_choice_of_a_fused_backend_compiles_as_one_graph(plant, op, requested, agree, eager):
    calls = plant(op, cuda="is too wide", triton=None)
    function = getattr(importlib.import_module(f"memformer_kernels.ops.{op}"), op)

    def call(**arguments):
        return function(**arguments, backend=requested)

    case = make_case(op, masked=0.4)
    agree(run(case, function=torch.compile(call, fullgraph=True, backend="aot_eager")), eager(case))
    assert set(calls("triton")) == {"forward", "backward"}


class Watch(TorchDispatchMode):
    """Somebody who looks at every operation, as a profiler of products or a tracer does."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.guarantee("G15")
@pytest.mark.parametrize("op", backend.OPS)
def test_who_watches_operations_sees_the_registered_ops(op, registered, same_bits):
    case = make_case(op)
    alone = run(case, function=registered(op))
    with Watch() as watch:
        watched = run(case, function=registered(op))
    assert {f"memformer_kernels.{op}_{direction}.default" for direction in ("forward", "backward")} <= watch.seen
    assert same_bits(watched, alone)


@pytest.mark.guarantee("G13")
def test_calls_from_many_threads_find_the_same_backend(plant):
    calls = plant("memory_forget", cuda=None)
    tensors, barrier, failures = make_case("memory_forget").tensors, threading.Barrier(8), []

    def work():
        barrier.wait()
        try:
            memory_forget(**tensors)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and calls("cuda") == ["forward"] * 8


def test_eager_on_a_gpu_warns_once_and_names_the_caller(plant):
    plant("memory_read")
    tensors = on_gpu(make_case("memory_read"))
    with pytest.warns(RuntimeWarning, match="memory_read: no fused kernel can run this call on the GPU") as caught:
        memory_read(*tensors)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory_read(*tensors)


def test_eager_is_quiet_where_it_is_no_surprise(plant):
    plant("memory_read")
    case = make_case("memory_read")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        memory_read(*case.tensors.values())
        memory_read(*on_gpu(case), backend="eager")


def test_explaining_does_not_use_up_the_warning(plant):
    plant("memory_read")
    tensors = on_gpu(make_case("memory_read"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert explain(memory_read, *tensors).backend == "eager"
    with pytest.warns(RuntimeWarning, match="no fused kernel"):
        memory_read(*tensors)


def test_explanation_reads_as_text(plant):
    plant("memory_forget", cuda="slots are not round", triton=None)
    tensors = make_case("memory_forget").tensors.values()
    assert str(explain(memory_forget, *tensors)).splitlines() == [
        "memory_forget runs on triton",
        "  not cuda: slots are not round",
        "  not eager: it can run, but is not the one chosen",
    ]


def test_explain_checks_what_a_call_would_check():
    slots, bias = make_case("memory_forget").tensors.values()
    with pytest.raises(ValueError, match=r"memory_forget: bias must have shape \[M, C\]"):
        explain("memory_forget", slots, slots)
    with pytest.raises(ValueError, match="explain: op must be one of memory_read, .*, memory_replay, got 'forget'"):
        explain("forget", slots, bias)
    assert explain("memory_forget", slots, bias, backend="eager").backend == "eager"


# Checks are left out where like arguments passed them.


def test_what_passed_once_is_checked_again_where_it_differs():
    case = make_case("memory_read", masked=0.4)

    def call(**different):
        return memory_read(**{**case.tensors, **different}, backend="eager")

    before = call(scale=1.0)
    assert torch.equal(call(scale=1.0), before)
    wrong = {
        "key": (case.tensors["key"][:, :, :, 1:], case.tensors["key"].long(), case.tensors["key"].double(), None),
        "slot_mask": (case.tensors["slot_mask"].long(), case.tensors["slot_mask"][:, 1:]),
        "scale": (True, float("nan"), float("inf"), 0.0, 0, "1"),
    }
    for name, values in wrong.items():
        for value in values:
            for _ in range(2):  # what did not pass is not known either
                with pytest.raises((TypeError, ValueError), match=f"memory_read: {name} must"):
                    call(**{"scale": 1.0, name: value})


def test_checks_remember_a_bounded_number_of_calls(monkeypatch):
    monkeypatch.setattr(checks, "MOST_KNOWN", 2)
    seen = []
    check = checks.once(seen.append)
    for number in (1.0, 1.0, 2.0, 3.0, 1.0, float("nan"), float("nan")):
        check(number)
    assert seen[:4] == [1.0, 2.0, 3.0, 1.0] and len(seen) == 6


def test_checks_remember_no_tensor():
    class Own(torch.Tensor):
        pass

    seen = []
    check = checks.once(seen.append)
    for kind in (Own, torch.Tensor):
        for _ in range(2):
            check(torch.ones(2).as_subclass(kind))
    assert len(seen) == 3  # a subclass may say what it likes of itself, and is asked each time
