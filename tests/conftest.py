"""What the tests share: fixed randomness, the ways to run an op, hostile layouts, and what "the same" means.

Shared functions are fixtures that return the function, so that every folder of tests can ask for them by name.
"""

import ctypes
import functools
import importlib
import mmap
import os

import layouts
import pytest
import torch

# Read when a module with Triton kernels is imported. On a GPU machine too: what needs the GPU is in tests/gpu.
os.environ.setdefault("TRITON_INTERPRET", "1")

from contract import pytest_addoption, pytest_configure, record_figure  # noqa: F401

import memformer_kernels
from memformer_kernels import testing


def _patch_triton_once_a_launch():
    """The interpreter puts its own functions in the place of those of Triton that a module sees, again at every call of
    one of the module's functions: two fifths of its time. Once a launch is enough."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def patch_once(function):
        if function.__module__ not in patched:
            patched.add(function.__module__)
            return patch(function)

    def launch_and_forget(self, *arguments, **options):
        try:
            return launch(self, *arguments, **options)
        finally:
            patched.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch_and_forget


_patch_triton_once_a_launch()

# A result is rounded once at the store; what is computed before, in float32 or float64, may be off by this many
# roundings of the largest value. The most that the tests have seen is 13.
COMPUTE_ROUNDINGS = 32


def shared(function):
    return pytest.fixture(scope="session", name=function.__name__)(lambda: function)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=[torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=lambda d: str(d)[6:])
def dtype(request):
    return request.param


# How an op runs: `path(case, grad_output=None, autocast=None) -> Result`.


def _definition(op):
    return functools.partial(getattr(memformer_kernels, op), backend="eager")


def _registered(op, backend="eager"):
    api, autograd = (importlib.import_module(f"memformer_kernels.ops.{op}.{room}") for room in ("api", "autograd"))
    return lambda **arguments: autograd.apply(*api.prepare(**arguments), backend)


def _eager(case, grad_output=None, autocast=None):
    return _run(_definition(case.op), case, grad_output, autocast)


def _explicit(case, grad_output=None, autocast=None):
    return _run(_registered(case.op), case, grad_output, autocast)


def _run(function, case, grad_output, autocast):
    def forward(**arguments):
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            return function(**arguments)

    return testing.run(case, grad_output=grad_output, function=forward)


@pytest.fixture(scope="session")
def eager():
    """The definition, differentiated by autograd."""
    return _eager


@pytest.fixture(scope="session")
def explicit():
    """The registered op, as a fused backend runs it, on the forward and backward that every kernel mirrors."""
    return _explicit


def _triton(case, grad_output=None, autocast=None):
    """The Triton kernels in the interpreter, which knows neither float64 nor, rightly, bfloat16."""
    dtypes = {t.dtype if autocast is None else autocast for t in case.tensors.values() if t.is_floating_point()}
    if dtypes & {torch.float64, torch.bfloat16}:
        pytest.skip("the Triton interpreter computes in float32 and float16 only")
    return _run(_registered(case.op, "triton"), case, grad_output, autocast)


# How often a 16-bit result is rounded to its dtype: Triton's weights too, before they enter a product
_eager.roundings = _explicit.roundings = 1
_triton.roundings = 3


PATHS = {"eager": _eager, "explicit": _explicit, "triton": _triton}


@pytest.fixture(params=PATHS.values(), ids=PATHS)
def path(request):
    if request.param is _triton:
        pytest.importorskip("triton")
    return request.param


@pytest.fixture(scope="session")
def triton():
    """The Triton kernels, in the interpreter."""
    pytest.importorskip("triton")
    return _triton


@pytest.fixture
def nothing_left_over():
    """New memory is full of NaN: what a kernel was to write and did not is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch, nothing_left_over):
    """Tiles and chunks as small as kernels take, so that a few tokens, slots and batch rows make several of each."""
    pytest.importorskip("triton")
    from memformer_kernels import launch, tiles

    measured, small = tiles.config, {"chunk": 32}

    def config(*arguments):
        return {n: 16 if n.startswith("BLOCK") else small.get(n, v) for n, v in measured(*arguments).items()}

    monkeypatch.setattr(tiles, "config", config)
    monkeypatch.setattr(tiles, "slot_tile", lambda *_: 16)
    monkeypatch.setattr(tiles, "token_chunk", lambda *_: small["chunk"])
    monkeypatch.setattr(tiles, "grouped_chunks", lambda *_: (small["chunk"], 2))
    monkeypatch.setattr(tiles, "MOST_GROUPS", 2)
    launch.forget_plans()
    yield
    launch.forget_plans()


@pytest.fixture
def launches(monkeypatch):
    """`launches(case, **options)`: the launchers of the op's Triton forward and backward, none of which runs."""
    pytest.importorskip("triton")
    from memformer_kernels import launch

    found = []
    monkeypatch.setattr(launch.Launcher, "__call__", lambda self, *tensors: found.append(self))

    def launches(case, **options):
        found.clear()
        launch.forget_plans()
        testing.run(case, function=functools.partial(_registered(case.op, "triton"), **options))
        return list(found)

    yield launches
    launch.forget_plans()


@pytest.fixture(scope="session")
def registered():
    """`registered(op)`: the op of the explicit path as a function of tensors and options by name."""
    return _registered


# What the same means.


def roundoff(dtype):
    return torch.finfo(dtype).eps / 2


@shared
def agree(result, reference, tolerance=None, roundings=1):
    """Asserts that output and gradients are right to the last rounding, or `roundings`, or to `tolerance`."""
    expected = reference.tensors()
    for name, tensor in result.tensors().items():
        wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
        limit = tolerance or roundings * roundoff(tensor.dtype) + COMPUTE_ROUNDINGS * roundoff(wide)
        error = testing.relative_error(tensor, expected[name])
        assert error <= limit, f"{name}: {error:.2e} is above {limit:.2e}"


@shared
def within_bound(result, case, grad_output=None):
    """Asserts the accuracy that is guaranteed, element by element; returns the largest share of it that was used."""
    shares = testing.shares_of_bound(result, testing.oracle(case, grad_output), testing.error_bound(case, grad_output))
    assert all(share <= 1 for share in shares.values()), f"more than 2 error_bound: {shares}"
    return max(shares.values())


@shared
def same_bits(a, b):
    """Bit for bit: 0 is not -0, and a NaN is itself."""
    if isinstance(a, torch.Tensor):
        a, b = {"": a}, {"": b}
    elif isinstance(a, testing.Result):
        a, b = a.tensors(), b.tensors()
    return a.keys() == b.keys() and all(_same_bits(a[name], b[name]) for name in a)


def _same_bits(a, b):
    bits = (tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


@shared
def storage(tensor):
    """A copy of all bytes of the storage that `tensor` is a view of."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).clone()


@pytest.fixture(params=layouts.LAYOUTS, ids=lambda f: f.__name__)
def layout(request):
    return request.param


@pytest.fixture(params=["end", "start"])
def beside_no_memory(request):
    """`beside_no_memory(tensor)`: the same values up against a page that nobody may touch, on one side; who reads past
    that side brings the process down."""
    system, page, held = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE, []

    def place(tensor):
        flat = tensor.detach().contiguous().flatten()
        size = flat.numel() * flat.element_size()
        pages = mmap.mmap(-1, (-(-size // page) + 1) * page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        at_end = request.param == "end"
        begin = len(pages) - page - size if at_end else page
        guard = address + (len(pages) - page if at_end else 0)
        placed = torch.frombuffer(pages, dtype=flat.dtype, count=flat.numel(), offset=begin).view(tensor.shape)
        placed.copy_(tensor)
        assert system.mprotect(ctypes.c_void_p(guard), page, 0) == 0
        held.append((guard, placed))
        return placed

    yield place
    for guard, _ in held:
        system.mprotect(ctypes.c_void_p(guard), page, mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.fixture
def far_apart(tmp_path):
    """`far_apart(tensor, dim)`: the same values with 2^30 elements from one index of `dim` to the next, in a file with
    holes, so that little memory is used."""

    def place(tensor, dim):
        shape, step = tensor.shape, 2**30
        base = torch.from_file(
            str(tmp_path / f"{len(list(tmp_path.iterdir()))}"),
            shared=True,
            size=step * (shape[dim] - 1) + tensor.numel(),
            dtype=tensor.dtype,
        )
        strides = list(tensor.contiguous().stride())
        strides[dim] = step
        return base.as_strided(shape, strides).copy_(tensor)

    return place


@pytest.fixture(scope="session")
def contiguous():
    return layouts.contiguous


@pytest.fixture(scope="session")
def transposed():
    return layouts.transposed
