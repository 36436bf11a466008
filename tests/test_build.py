"""The package installs with nvcc, without it and around a kernel that does not compile, and says which it was.

Every installation is a real `pip install` of a copy of the tree into an environment of its own, which borrows the
packages of this one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "csrc", "memformer_kernels")
BROKEN_KERNEL = "csrc/memory_forget_forward.cu"
OUTPUTS = ("*.so", "_build_info.json", "__pycache__")


def nvcc():
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    return shutil.which("nvcc", path=os.pathsep.join([*(f"{home}/bin" for home in homes), os.environ["PATH"]]))


needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="nvcc is neither on PATH nor in CUDA_HOME")


def copy_tree(destination: Path) -> Path:
    destination.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, destination / name, ignore=shutil.ignore_patterns(*OUTPUTS))
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, destination / name)
    return destination


def variables(with_nvcc: bool, **extra: str) -> dict[str, str]:
    """The environment of a build. Without nvcc, PATH keeps what does not hold it, and CUDA_HOME leads nowhere."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MEMFORMER_", "PYTHON"))}
    path = [str(Path(sys.executable).parent), *kept["PATH"].split(os.pathsep)]  # the first holds ninja
    if not with_nvcc:
        path = [folder for folder in path if not Path(folder, "nvcc").exists()]
        kept |= {"CUDA_HOME": "/nonexistent", "CUDA_PATH": "/nonexistent"}
    return kept | {"PATH": os.pathsep.join(path)} | extra


def new_python(folder: Path) -> Path:
    """An environment without packages of its own, that sees those of this one after them."""
    venv.create(folder, symlinks=True)
    (site_packages,) = folder.glob("lib/python*/site-packages")
    borrowed = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    (site_packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return folder / "bin" / "python"


def install(python: Path, tree: Path, environment: dict[str, str], editable: bool = False) -> str:
    options = "--no-build-isolation --no-deps --no-index --ignore-installed --disable-pip-version-check --no-cache-dir"
    target = ["-e", str(tree)] if editable else [str(tree)]
    command = [python, "-m", "pip", "install", *options.split(), *target]
    result = subprocess.run(command, env=environment, cwd=tree.parent, capture_output=True, text=True)
    output = result.stdout + result.stderr
    if result.returncode != 0:
        raise RuntimeError(output)
    return output


def report(python: Path) -> dict:
    """What the installed package says of its compiled module."""
    code = "import json; from memformer_kernels import _extension; print(json.dumps(_extension.report()))"
    command = [python, "-E", "-c", code]  # not the tree that PYTHONPATH may name
    return json.loads(subprocess.run(command, cwd=python.parent, check=True, capture_output=True, text=True).stdout)


def build_in_place(tree: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A tree whose module has been compiled once, in place. Tests that change it take a copy. Beside it lie what ptxas
    said of the kernels, in `resources`, and their PTX, in `kept`."""
    tree = copy_tree(tmp_path_factory.mktemp("built") / "tree")
    kept = tree.with_name("kept")
    kept.mkdir()
    flags = f"-Xptxas -v --keep --keep-dir={kept}"
    result = build_in_place(tree, variables(with_nvcc=True, MEMFORMER_KERNELS_CUDA="1", NVCC_APPEND_FLAGS=flags))
    assert result.returncode == 0, result.stderr
    tree.with_name("resources").write_text(result.stderr)
    return tree


@needs_nvcc
@pytest.mark.parametrize("editable", [False, True])
def test_installs_with_nvcc(built, tmp_path, editable):
    python = new_python(tmp_path / "environment")
    install(python, built, variables(with_nvcc=True), editable)
    got = report(python)
    assert got["loaded"] and got["reason"] is None
    assert Path(got["path"]).is_relative_to(built if editable else tmp_path)
    assert got["architectures"] == "80;90a"
    release = subprocess.run([nvcc(), "--version"], capture_output=True, text=True).stdout
    assert f"release {got['cuda_version']}," in release


@pytest.mark.parametrize("editable", [False, True])
def test_installs_without_nvcc_and_says_so(tmp_path, editable):
    python = new_python(tmp_path / "environment")
    install(python, copy_tree(tmp_path / "tree"), variables(with_nvcc=False), editable)
    got = report(python)
    assert not got["loaded"]
    assert got["reason"] == "the CUDA kernels are not compiled: no nvcc on PATH or in CUDA_HOME"


@needs_nvcc
def test_goes_on_when_a_kernel_does_not_compile(built, tmp_path):
    tree = broken(built, tmp_path)
    python = new_python(tmp_path / "environment")
    install(python, tree, variables(with_nvcc=True))
    got = report(python)
    assert not got["loaded"]
    assert re.search(r"not compiled: the compiler failed: .*memory_forget_forward\.cu\(1\): error", got["reason"])


@needs_nvcc
def test_fails_when_told_to_build_and_a_kernel_does_not_compile(built, tmp_path):
    result = build_in_place(broken(built, tmp_path), variables(with_nvcc=True, MEMFORMER_KERNELS_CUDA="1"))
    assert result.returncode != 0
    assert "MEMFORMER_KERNELS_CUDA is 1, but the compiler failed" in result.stderr


def broken(built: Path, tmp_path: Path) -> Path:
    tree = shutil.copytree(built, tmp_path / "tree")
    kernel = tree / BROKEN_KERNEL
    kernel.write_text("this is no C++;\n" + kernel.read_text())
    return tree


def test_fails_when_told_to_build_without_nvcc(tmp_path):
    result = build_in_place(copy_tree(tmp_path / "tree"), variables(with_nvcc=False, MEMFORMER_KERNELS_CUDA="1"))
    assert result.returncode != 0
    assert "MEMFORMER_KERNELS_CUDA is 1, but no nvcc on PATH or in CUDA_HOME" in result.stderr


@needs_nvcc
def test_a_module_of_an_earlier_build_does_not_stay(built, tmp_path):
    tree = shutil.copytree(built, tmp_path / "tree")
    assert list(tree.glob("memformer_kernels/_C.*"))
    result = build_in_place(tree, variables(with_nvcc=True, MEMFORMER_KERNELS_CUDA="0"))
    assert result.returncode == 0, result.stderr
    assert not list(tree.rglob("memformer_kernels/_C.*"))
    info = json.loads((tree / "memformer_kernels/_build_info.json").read_text())
    assert not info["built"] and info["reason"] == "MEMFORMER_KERNELS_CUDA=0 at installation"


@needs_nvcc
def test_a_second_build_compiles_nothing(built, tmp_path):
    tree = shutil.copytree(built, tmp_path / "tree")
    result = build_in_place(tree, variables(with_nvcc=True, MEMFORMER_KERNELS_CUDA="1"))
    assert "no work to do" in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MEMFORMER_KERNELS_CUDA", "yes", "MEMFORMER_KERNELS_CUDA must be auto, 1 or 0, got 'yes'"),
        ("MEMFORMER_KERNELS_ARCHS", "sm_90", "MEMFORMER_KERNELS_ARCHS must look like \"80;90a\", got 'sm_90'"),
    ],
)
def test_refuses_a_variable_it_does_not_understand(tmp_path, name, value, message):
    result = build_in_place(copy_tree(tmp_path / "tree"), variables(with_nvcc=False, **{name: value}))
    assert result.returncode != 0 and message in result.stderr


def test_source_distribution_can_build(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    command = [sys.executable, "setup.py", "-q", "sdist", "--formats", "tar", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=tree, env=variables(with_nvcc=False), check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    expected = [path.relative_to(tree) for path in (tree / "csrc").rglob("*") if path.is_file()]
    assert all((unpacked / path).exists() for path in [*expected, "setup.py", "memformer_kernels/py.typed"])
    assert not list(unpacked.rglob("*.so"))


KERNELS = sorted(path.stem for path in (ROOT / "csrc").glob("*.cu"))


@needs_nvcc
def test_no_kernel_spills_registers(built):
    spills = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    found = re.findall(spills, built.with_name("resources").read_text())
    entries = sum(path.read_text().count(".entry ") for path in built.with_name("kept").glob("*.ptx"))
    assert len(found) >= entries > len(KERNELS) and set(found) == {("0", "0", "0")}


@needs_nvcc
@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_of_attention_waits_for_those_before_it_and_looks_at_memory_afterwards(built, name):
    """As it is launched while they end. `memory_forget`'s are launched afterwards."""
    ptx = (built.with_name("kept") / f"{name}.compute_90a.ptx").read_text()
    for kernel in ptx.split(".entry ")[1:]:
        waits = kernel.find("griddepcontrol.wait")
        looks = re.search(r"\b(ld|st|red|cp\.async\.bulk(\.tensor\.\d+d)?)\.(global|shared::cluster)|\batom\b", kernel)
        assert (waits >= 0) == ("forget" not in name), kernel[:200]
        assert looks and waits < looks.start(), kernel[:200]


DIVISIONS = """
#include <iostream>
#include "memformer_kernels/common.cuh"

int main() {
  constexpr int64_t kEnd = int64_t{1} << 31;
  const auto check = [](int64_t number, int64_t dividend) {
    if (dividend < 0 || dividend >= kEnd) return;
    int quotient = static_cast<int>(dividend);
    const int rest = memformer_kernels::Divisor(number).split(quotient);
    if (quotient == dividend / number && rest == dividend % number) return;
    std::cout << dividend << " / " << number << ": " << quotient << ", " << rest << std::endl;
  };
  const auto check_all_of = [&](int64_t number) {
    for (int64_t dividend = 0; dividend < 300; ++dividend) check(number, dividend);
    for (int64_t i = 0; i < 400; ++i) {  // about multiples, small and large, where a quotient changes
      for (const int64_t multiple : {i * number, (kEnd / number - i) * number, i * (kEnd / 400) / number * number}) {
        for (int64_t near = -1; near <= 1; ++near) check(number, multiple + near);
      }
    }
  };
  for (int64_t number = 1; number < 3000; ++number) check_all_of(number);
  for (int64_t power = 4; power < kEnd; power *= 2) {
    for (int64_t near = -2; near <= 2; ++near) check_all_of(power + near);
  }
  std::cout << "done" << std::endl;
}
"""


@needs_nvcc
def test_a_divisor_divides(tmp_path):
    (tmp_path / "divisions.cu").write_text(DIVISIONS)
    command = [nvcc(), "-std=c++20", "-O2", f"-I{ROOT}/csrc/include", str(tmp_path / "divisions.cu")]
    subprocess.run([*command, "-o", str(tmp_path / "divisions")], check=True)
    said = subprocess.run([tmp_path / "divisions"], check=True, capture_output=True, text=True).stdout
    assert said == "done\n", said[:500]


GROUPS = """
#include <iostream>

#include "memformer_kernels/attention_forward.cuh"

int main() {
  const auto narrow = [](int rows, int heads) { return memformer_kernels::fastest_groups(rows, heads, 132, 3, 2); };
  const auto wide = [](int rows, int heads) { return memformer_kernels::fastest_groups(rows, heads, 132, 2, 1); };
  std::cout << narrow(128, 64) << narrow(128, 512) << narrow(1024, 512) << narrow(32, 512) << narrow(180, 89) << ' '
            << wide(128, 64) << wide(96, 768) << wide(64, 768) << std::endl;
}
"""


@needs_nvcc
def test_blocks_have_the_groups_that_leave_the_least_idle(tmp_path):
    """Of 132 multiprocessors: one group where more would leave many without a block, three where they fill rows."""
    (tmp_path / "groups.cu").write_text(GROUPS)
    command = [nvcc(), "-std=c++20", f"-I{ROOT}/csrc/include", str(tmp_path / "groups.cu")]
    subprocess.run([*command, "-o", str(tmp_path / "groups")], check=True)
    said = subprocess.run([tmp_path / "groups"], check=True, capture_output=True, text=True).stdout
    assert said == "12313 121\n"


FORMS = """
#include <iostream>

#include "memformer_kernels/memory_read_forms.cuh"

using namespace memformer_kernels;

int main(int count, char** sizes) {
  const auto form = [](int64_t tokens, int64_t slots, int channels, int64_t heads) {
    return kMemoryReadForms[fastest_memory_read_form(tokens, slots, channels, heads, 132)];
  };
  for (int channels = 8; channels <= 128; channels += 8) {
    for (int64_t tokens : {1, 64, 65, 128, 200, 256, 384, 512, 1000, 1024, 3000, 1 << 20, 2000000000}) {
      for (int64_t slots : {65, 96, 97, 128, 192, 200, 256, 288, 300, 384, 512, 1024, 4096, 2000000000}) {
        const MemoryReadForm alone = form(tokens, slots, channels, 1);
        if (alone.width < channels) std::cout << "narrower than " << channels << " channels" << std::endl;
        for (int64_t heads : {2, 8, 64, 500, 4096, 1 << 20}) {
          const MemoryReadForm other = form(tokens, slots, channels, heads);
          if (other.width == alone.width && other.slots == alone.slots) continue;
          std::cout << "other bits with " << heads << " heads: L" << tokens << " M" << slots << " D" << channels
                    << std::endl;
        }
      }
    }
  }
  for (int i = 1; i + 3 < count; i += 4) {
    const auto size = [&](int place) { return std::stoi(sizes[i + place]); };
    const MemoryReadForm found = form(size(1), size(2), size(3), size(0));
    std::cout << found.width << ' ' << found.slots << ' ' << found.groups << std::endl;
  }
}
"""
# heads, tokens, slots, channels: width and slots of the tile, groups
FASTEST = {
    (64, 128, 128, 64): (64, 128, 1),
    (512, 512, 128, 64): (64, 64, 4),
    (512, 768, 96, 64): (64, 96, 3),
    (64, 128, 96, 64): (64, 96, 1),
    (512, 1024, 1024, 64): (64, 128, 3),
    (64, 256, 128, 48): (64, 64, 1),
    (64, 128, 96, 80): (96, 96, 1),
    (768, 1000, 96, 96): (96, 96, 3),
    (768, 1000, 128, 96): (96, 128, 2),
    (768, 512, 384, 80): (96, 96, 3),
    (64, 128, 128, 112): (128, 128, 1),
    (128, 4096, 192, 128): (128, 96, 2),
    (128, 4096, 1024, 128): (128, 128, 2),
}


@needs_nvcc
@pytest.mark.guarantee("G7")
def test_a_read_takes_the_fastest_form_with_tiles_that_no_batch_changes(tmp_path):
    (tmp_path / "forms.cu").write_text(FORMS)
    command = [nvcc(), "-std=c++20", f"-I{ROOT}/csrc/include", str(tmp_path / "forms.cu")]
    subprocess.run([*command, "-o", str(tmp_path / "forms")], check=True)
    sizes = [str(size) for call in FASTEST for size in call]
    said = subprocess.run([tmp_path / "forms", *sizes], check=True, capture_output=True, text=True).stdout
    assert said.splitlines() == [" ".join(map(str, form)) for form in FASTEST.values()]


@needs_nvcc
def test_the_command_builds_beside_the_package(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    command = [sys.executable, "-m", "memformer_kernels.cli", "build", "--archs", "80"]  # not Hopper's, which take long
    environment = variables(with_nvcc=True) | {"PYTHONPATH": str(tree)}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"memformer_kernels/_C\..*\.so, for 80, CUDA \d+\.\d+$", done.stdout.strip()), done.stdout
