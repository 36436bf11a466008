"""What Triton kernels refuse, and the tiles that they are launched with."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

pytest.importorskip("triton")

from memformer_kernels import MemformerLM, MemformerLMConfig, launch, tiles, tuning
from memformer_kernels.testing import make_case, oracle

DEVICE = torch.device("cpu")  # takes the tiles of an H100


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, for machines without one."""

    is_cuda = True


def reason(op, *, width=8, heads=2, dtype=torch.float32, **options):
    api, backend = (importlib.import_module(f"memformer_kernels.ops.{op}.{room}") for room in ("api", "triton"))
    case = make_case(op, width=width, heads=heads, dtype=dtype).map(lambda t: t.as_subclass(OnGpu))
    return backend.unsupported_reason(*api.prepare(**case.tensors, **options))


@pytest.fixture
def capable(monkeypatch):
    monkeypatch.setattr(launch, "_unsupported_device", lambda index: None)


@pytest.mark.guarantee("G10", "G14")
@pytest.mark.parametrize(
    "op, call, words",
    [
        ("memory_read", {}, None),
        ("memory_read", {"width": 256}, None),
        ("memory_read", {"width": 257}, "query must have at most 256 channels a head, got 257"),
        ("memory_read", {"dtype": torch.float64}, "query must be float32, float16 or bfloat16, got torch.float64"),
        ("memory_read", {"scale": 1e-31}, "the scale must be from 2**-100 to 2**100, got 1e-31"),
        ("memory_write", {"width": 257}, "query must have at most 256 channels a head, got 257"),
        ("memory_write", {"width": 128, "heads": 128}, None),
        ("memory_write", {"width": 128, "heads": 129}, "slots must have at most 16384 channels, got 16512"),
        ("memory_write", {"scale": 1e31}, "the scale must be from 2**-100 to 2**100"),
        ("memory_write", {"eps": 1e38}, "eps must be from 2**-126 to 2**126, got 1e+38"),
        ("memory_forget", {"width": 1024, "heads": 32}, None),
        ("memory_forget", {"width": 1024, "heads": 33}, "slots must have at most 32768 channels, got 33792"),
        ("memory_forget", {"eps": 1e38}, "eps must be from 2**-126 to 2**126, got 1e+38"),
    ],
)
def test_what_cannot_run_is_refused_with_its_reason(capable, op, call, words):
    got = reason(op, **call)
    assert got is None if words is None else words in got


@pytest.mark.guarantee("G14")
def test_cpu_tensors_are_refused():
    call = tuple(make_case("memory_forget").tensors.values())
    backend = importlib.import_module("memformer_kernels.ops.memory_forget.triton")
    assert backend.unsupported_reason(*call) == "slots must be on a CUDA device, got cpu"


@pytest.mark.guarantee("G14")
def test_the_interpreter_is_no_backend():
    tensors = [t.as_subclass(OnGpu) for t in make_case("memory_forget").tensors.values()]
    backend = importlib.import_module("memformer_kernels.ops.memory_forget.triton")
    assert "TRITON_INTERPRET is set" in backend.unsupported_reason(*tensors)


PRODUCTS = ("memory_read", "memory_write")
of_products = pytest.mark.parametrize("op", PRODUCTS)
one_tile_or_several = pytest.mark.parametrize("slots", [5, 17], ids=["one tile", "tiles"])


@pytest.mark.parametrize("allow_tf32", [False, True])
@one_tile_or_several
@of_products
def test_float32_is_rounded_to_tf32_where_that_is_allowed_only(launches, small_tiles, op, slots, allow_tf32):
    made = launches(make_case(op, slots=slots), allow_tf32=allow_tf32)
    found = {run.constants["PRECISION"] for run in made if "PRECISION" in run.constants}
    assert found == {"tf32" if allow_tf32 else "ieee"}


@one_tile_or_several
@of_products
def test_every_product_has_the_precision_of_its_kernel(triton, small_tiles, monkeypatch, op, slots):
    from triton.runtime.interpreter import InterpreterBuilder

    multiply, found = InterpreterBuilder.create_dot, set()

    def create_dot(self, a, b, d, input_precision, *rest):
        found.add(input_precision.name)
        return multiply(self, a, b, d, input_precision, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
    triton(make_case(op, batch=1, heads=1, slots=slots, tokens=3))
    assert found == {"IEEE"}


def test_rows_of_heads_are_computed_without_fused_multiply_adds(launches):
    """So that a kept slot's own logit has a gradient of exactly 0, and saving changes no bit."""
    rows = [run for run in launches(make_case("memory_write")) if "BLOCK_H" in run.constants]
    assert rows and not any(run.constants.get("enable_fp_fusion", True) for run in rows)


# What of a launch may follow the batch. Where Triton looks at such a number, a batch of one takes another kernel
OF_THE_BATCH = {"B", "group", "at_once", "parts", "part_rows"}
ADDS_UP = "sum_partials_kernel"  # and does nothing else, so that no variant of it rounds otherwise


@pytest.mark.parametrize("slots", [5, 40], ids=["one tile", "tiles"])
@pytest.mark.parametrize("op", [*PRODUCTS, "memory_forget"])
def test_how_a_row_is_computed_does_not_depend_on_the_batch(launches, op, slots):
    def by_kernel(batch):
        made = launches(make_case(op, batch=batch, slots=slots, tokens=5000, heads=1))
        return {run.kernel.__name__: run for run in made if run.kernel.__name__ != ADDS_UP}

    alone = by_kernel(1)
    for batch in (2, 33):
        for name, run in by_kernel(batch).items():
            assert run.constants == alone[name].constants
            given = {*run.constants, "OVERLAPS"}
            names = [n for n in run.kernel.arg_names if n not in given][-len(run.arguments) :]
            changed = {n for n, a, b in zip(names, run.arguments, alone[name].arguments, strict=True) if a != b}
            assert changed <= OF_THE_BATCH and changed <= {*run.kernel.rewriter.kwargs["do_not_specialize"]}, name


@pytest.mark.guarantee("G10")
@pytest.mark.parametrize("op, heads", [("memory_forget", 512), ("memory_write", 256)])
def test_the_widest_slots_are_right(triton, agree, op, heads):
    case = make_case(op, batch=1, heads=heads, slots=1, tokens=2, width=64)
    agree(triton(case), oracle(case))


def test_a_table_of_ones_own_comes_before_the_packages(tmp_path):
    before = tiles.config("memory_read_forward", DEVICE, 2, 64)
    own = {"BLOCK_L": 16, "BLOCK_M": 16, "num_warps": 1, "num_stages": 1}
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"kernels": {"memory_read_forward": {tiles.row_name(2, 64, 0): own}}}))
    try:
        tiles.load_table(file)
        assert tiles.config("memory_read_forward", DEVICE, 2, 64) == own != before
        assert tiles.config("memory_read_forward", DEVICE, 2, 128) != own
    finally:
        tiles.use_rows({})
    assert tiles.config("memory_read_forward", DEVICE, 2, 64) == before


def test_a_table_decides_how_the_next_call_is_launched(triton, agree):
    case = make_case("memory_read", slots=40, tokens=20)
    agree(triton(case), oracle(case))
    own = {"BLOCK_L": 64, "BLOCK_M": 16, "num_warps": 4, "num_stages": 1}
    try:
        tiles.use_rows({"memory_read_forward": {tiles.row_name(4, 16, 0): own}})
        plan = importlib.import_module("memformer_kernels.ops.memory_read.triton")._forward_plan
        agree(triton(case), oracle(case))
        assert plan.cache_info()[:2] == (0, 1)  # no hit, one miss: the plan made before the change is gone
    finally:
        tiles.use_rows({})


HOPPER = {"BLOCK_L": 64, "BLOCK_M": 128, "chunk": 512, "num_warps": 4}


@pytest.fixture
def read_plan(monkeypatch):
    """`plan(query, key, ...)` of a read as it would be on Hopper, where the kernel in Gluon has a row."""
    pytest.importorskip("triton.experimental.gluon")
    read = importlib.import_module("memformer_kernels.ops.memory_read.triton")
    monkeypatch.setattr(read, "_hopper_tiles", lambda *_: dict(HOPPER))
    monkeypatch.setattr(tiles, "multiprocessors", lambda device: 132)
    launch.forget_plans()

    def plan(query, key, aligned=True, slot_mask=None):
        strides = query.stride(), key.stride(), key.stride(), None if slot_mask is None else slot_mask.stride()
        dtype, options = torch.bfloat16, (0.125, False, aligned, False)
        return read._forward_plan(query.shape, key.shape[2], *strides, dtype, DEVICE, *options)

    yield plan
    launch.forget_plans()


def virtual(*shape):
    return torch.empty(shape, device="meta")


@pytest.mark.guarantee("G10", "G11")
def test_gluon_takes_what_it_can_copy_16_bytes_at_a_time(read_plan):
    query, key = virtual(64, 8, 512, 64), virtual(64, 8, 200, 64)
    saves, takes, run = read_plan(query, key)
    assert takes and not saves and run.kernel.__name__ == "_memory_read_forward_hopper_kernel"
    assert run.programs == 64 * 8 and run.constants["TILES"] == 2 and not run.constants["ALL_SLOTS"]
    for what, arguments in {
        "an odd address": (query, key, False),
        "channels apart": (query.transpose(2, 3).contiguous().transpose(2, 3), key),
        "rows 72 elements apart": (virtual(64, 8, 512, 72)[..., :64], key),
        "heads of 60 channels": (query[..., :60], key[..., :60]),
        "rows too far apart for 32 bits": (
            torch.empty_strided((1, 8, 8, 64), (0, 64, 2**24, 1), device="meta"),
            key[:1],
        ),
    }.items():
        *_, run = read_plan(*arguments)
        assert run.kernel.__name__ == "_memory_read_forward_kernel", what
        assert run.constants["BLOCK_M"] == HOPPER["BLOCK_M"], f"{what}: other tiles of slots, other bits"


@pytest.mark.parametrize("batch, heads, tokens, programs", [(64, 8, 512, 512), (1, 16, 4096, 256), (1, 1, 1000, 16)])
def test_gluon_has_a_program_for_every_multiprocessor(read_plan, batch, heads, tokens, programs):
    *_, run = read_plan(virtual(batch, heads, tokens, 64), virtual(batch, heads, 256, 64))
    assert run.programs == programs and run.constants["ALL_SLOTS"]


def test_every_measured_row_is_a_candidate_of_the_tuner():
    table = tiles._table(90)
    assert set(table) == set(tuning.SPACES)
    for kernel, rows in table.items():
        for row in rows.values():
            assert set(row) == set(tuning.SPACES[kernel])


@pytest.mark.parametrize("channel_bytes", [4, 10, 16])
def test_loads_ahead_of_time_fit_any_gpu(channel_bytes):
    for heads in (1, 3, 16, 64):
        for width in (8, 40, 64, 256):
            config = tiles.heads_row(heads, width, channel_bytes)
            ahead = channel_bytes * config["BLOCK_H"] * config["BLOCK_D"] * (config["STAGES"] - 1)
            assert 1 <= config["STAGES"] <= 3 and ahead <= 48 * 2**10


@pytest.mark.parametrize("tokens", [1, 512, 513, 4096, 65536, 10**6 + 1])
@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
def test_chunks_are_whole_tiles_and_few(tokens, block_m):
    chunk = tiles.token_chunk(tokens, block_m)
    assert chunk % 128 == 0 and chunk >= 16 * block_m and -(-tokens // chunk) <= tiles.MOST_CHUNKS


@pytest.mark.parametrize("tokens", [0, 1, 2048, 2049, 4096, 10**4, 65536, 10**6 + 1])
@pytest.mark.parametrize("block_m", [16, 32, 64, 128])
def test_groups_are_of_whole_chunks_and_about_as_long_as_one_chunk_would_be(tokens, block_m):
    chunk, group = tiles.grouped_chunks(tokens, block_m, 64, DEVICE)
    alone = tiles.token_chunk(tokens, block_m)
    assert chunk % 128 == 0 and chunk >= tiles.LEAST_CHUNK and -(-tokens // chunk) <= tiles.MOST_CHUNKS
    assert alone - chunk < chunk * group <= alone and (group == 1 or tokens > alone)
    assert tiles.grouped_chunks(tokens, block_m, 128, DEVICE) == (alone, 1)


def test_a_small_batch_has_a_program_for_every_chunk_and_a_large_one_for_every_group(launches):
    def programs(batch, heads):
        made = launches(
            make_case("memory_write", batch=batch, heads=heads, slots=65, tokens=4096, dtype=torch.bfloat16)
        )
        return {run.kernel.__name__: run.programs // (batch * heads) for run in made if "GROUPED" in run.constants}

    kernels = "_memory_write_forward_attend_kernel", "_memory_write_backward_resident_kernel"
    few, many = programs(1, 2), programs(33, 2)
    assert {few[name] for name in kernels} == {8} and {many[name] for name in kernels} == {2}


@pytest.fixture
def tuner(monkeypatch):
    """`tuner(microseconds)`: the tuner with this clock, on a GPU and with compilers that are made up: two stages do not
    run."""

    class Now:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def submit(self, function, *arguments):
            result = function(*arguments)
            return SimpleNamespace(result=lambda: result)

    def try_one(problem, candidate):
        return "out of resource" if candidate.get("num_stages") == 2 else None

    monkeypatch.setattr(tuning, "ProcessPoolExecutor", Now)
    monkeypatch.setattr(tuning, "try_one", try_one)
    monkeypatch.setattr(tuning, "calls", lambda problem: None)
    monkeypatch.setattr(tiles, "_capability", lambda index: 90)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Pretend GPU")
    return lambda microseconds: monkeypatch.setattr(tuning, "microseconds", microseconds)


def test_the_tuner_keeps_the_fastest_that_runs_and_tells_how_far_it_is(tuner, tmp_path, capsys):
    def narrow_is_fast(call):
        (row,) = tiles._user_table["memory_read_forward_resident"].values()
        return 100.0 * row["num_stages"] + row["BLOCK_L"] + row["chunk"] / 1e4

    tuner(narrow_is_fast)
    told = []
    table, measured = tuning.run(tmp_path, "read_forward_resident", 1, told.append)
    found = json.loads(table.read_text())
    assert table.name == "sm_90.json" and found["gpu"] == "Pretend GPU"
    rows = found["kernels"]["memory_read_forward_resident"]
    assert len(rows) == 8 and all(r == dict(BLOCK_L=64, chunk=256, num_warps=4, num_stages=1) for r in rows.values())
    times = next(iter(json.loads(measured.read_text())["measured"].values()))
    assert len(times) == 24 and not any(candidate["num_stages"] == 2 for _, candidate in times)
    assert told == [i / 8 for i in range(8)] and capsys.readouterr().out.count("memory_read_forward_resident") == 8
    assert not tiles._user_table  # what was tried is taken away again


def test_the_tuner_gives_gluon_a_row_where_it_is_ahead_and_none_elsewhere(tuner, tmp_path):
    def ahead_at_256_slots(call):
        ((name, row),) = tiles._user_table[tuning.HOPPER].items()
        return 2.0 if not row else 1.0 + row["chunk"] / 1e4 if name.endswith("M 256") else 3.0

    tuner(ahead_at_256_slots)
    table, measured = tuning.run(tmp_path, tuning.HOPPER, 1, lambda part: None)
    rows = json.loads(table.read_text())["kernels"][tuning.HOPPER]
    assert set(rows) == {"16 bits, D 64, M 256", "16 bits, D 128, M 256"}
    assert all(row["chunk"] == 512 for row in rows.values())
    times = json.loads(measured.read_text())["measured"]
    assert all([2.0, {}] in of_row and len(of_row) == 25 for of_row in times.values()) and len(times) == 4


def test_the_tuner_tries_other_kernels_without_gluon(monkeypatch):
    monkeypatch.setattr(tiles, "_capability", lambda index: 90)
    gluon = tuning.HOPPER, DEVICE, 2, 128, 128
    try:
        tuning.Problem("memory_read_forward_resident", 128, 128).use({"BLOCK_L": 64})
        assert not tiles.measured_config(*gluon)
    finally:
        tiles.use_rows({})
    assert tiles.measured_config(*gluon)


@pytest.fixture
def gpu(monkeypatch):
    """A mode in which tensors may be on a GPU that is not there: they have no data, and everything else."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    launch._unsupported.cache_clear()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode
    launch._unsupported.cache_clear()


def compiled_graph(function, *arguments, **options):
    """The ops of this package that are called by the one graph that `torch.compile` makes."""
    called = []

    def backend(graph, inputs):
        called.extend(n.target for n in graph.graph.nodes if "memformer_kernels" in str(n.target))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(function, fullgraph=True, backend=backend)(*arguments, **options)
    return [str(op) for op in called]


@pytest.mark.guarantee("G15")
@pytest.mark.parametrize("op", ["memory_read", "memory_write", "memory_forget"])
def test_a_call_on_a_gpu_compiles_as_one_graph(op, gpu):
    """There the choice of a backend asks for the device, and for what Triton is told by the environment."""
    case = make_case(op, masked=0.4, dtype=torch.float16)
    tensors = {n: torch.empty(t.shape, dtype=t.dtype, device="cuda") for n, t in case.tensors.items()}
    function = getattr(importlib.import_module("memformer_kernels"), op)
    assert compiled_graph(function, **tensors) == [f"memformer_kernels.{op}_forward.default"]


@pytest.mark.guarantee("G15")
def test_models_on_a_gpu_compile_as_one_graph(gpu):
    model = MemformerLM(MemformerLMConfig(width=32, heads=2, hidden=64, layers=2, slots=4, segment_length=8))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                there = torch.empty(parameter.shape, dtype=torch.float16, device="cuda")
                module._parameters[name] = torch.nn.Parameter(there, requires_grad=False)
    tokens = torch.empty(2, 8, dtype=torch.long, device="cuda")
    memory = torch.empty(2, 4, 32, dtype=torch.float16, device="cuda")
    names = "memory_read", "memory_read", "memory_write"
    assert compiled_graph(model, tokens, memory) == [f"memformer_kernels.{name}_forward.default" for name in names]
