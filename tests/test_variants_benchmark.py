"""`benchmarks/variants.py`: states of the sources side by side, but for what needs a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import variants  # noqa: E402


def test_a_folder_takes_the_place_of_what_it_has(tmp_path):
    source = tmp_path / "other" / "csrc"
    source.mkdir(parents=True)
    (source / "own.cu").write_text("// mine")
    variants.lay_out(source.parent, tmp_path / "tree")
    assert [path.name for path in (tmp_path / "tree" / "csrc").iterdir()] == ["own.cu"]
    for here in ("setup.py", "memformer_kernels/benchmarking/ops.toml", "pyproject.toml"):
        assert (tmp_path / "tree" / here).read_bytes() == (variants.ROOT / here).read_bytes()
    assert not list((tmp_path / "tree").rglob("*.so"))
    with pytest.raises(SystemExit, match="nothing must hold one of memformer_kernels, csrc"):
        variants.lay_out(tmp_path / "nothing", tmp_path / "another")


def test_variants_run_in_turns_and_are_held_to_the_first(tmp_path, monkeypatch, capsys):
    runs = []

    def measure(tree, arguments, out):
        runs.append((tree.name, arguments))
        return {"memory_read forward B1": {"before": 0.2, "after": 0.1}[tree.name] * (1 + len(runs) % 2)}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(variants, "build", lambda tree: runs.append(tree.name))
    monkeypatch.setattr(variants, "measure", measure)
    out = tmp_path / "times.json"
    command = [
        f"before={variants.ROOT}",
        f"after={variants.ROOT}",
        "--rounds",
        "3",
        "--out",
        str(out),
        "--",
        "--op",
        "x",
    ]
    monkeypatch.setattr(sys, "argv", ["variants.py", *command])
    variants.main()
    assert sorted(runs[:2]) == ["after", "before"]
    assert runs[2:] == [("before", ["--op", "x"]), ("after", ["--op", "x"])] * 3
    report = json.loads(out.read_text())
    assert report["bench"] == ["--op", "x"] and {len(v) for v in report["ms"]["memory_read forward B1"].values()} == {3}
    assert "400.0" in (printed := capsys.readouterr().out) and "100.0 (0.250)" in printed


def test_calls_that_not_all_variants_have_are_shown():
    table = variants.table_of({"both": {"a": [1.0], "b": [2.0]}, "old": {"a": [1.0]}, "new": {"b": [2.0]}})
    assert [list(column.cells) for column in table.columns] == [
        ["both", "old", "new"],
        ["1000.0", "1000.0", "nan"],
        ["2000.0 (2.000)", "", "2000.0 (nan)"],
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it would measure")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("a=.", "b=csrc/.."), "needs a GPU"), (("a=.", "a=."), "the names different"), (("a",), "must be NAME=FOLDER")],
)
def test_what_it_cannot_do_it_says(arguments, says):
    command = [sys.executable, BENCHMARKS / "variants.py", *arguments]
    environment = os.environ | {"PYTHONPATH": str(variants.ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode and says in done.stderr
