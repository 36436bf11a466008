"""`benchmarks/read_forms.py`: the times of the read's forms, but for what needs a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import read_forms  # noqa: E402
import variants  # noqa: E402

HEADER = (variants.ROOT / read_forms.HEADER).read_text()
FORMS = read_forms.table(HEADER)


def test_the_table_is_read_and_written():
    lines = HEADER.split("kMemoryReadForms[] = {\n")[1].split("};")[0].splitlines()
    assert len(FORMS) == len(lines) and {form.width for form in FORMS} == set(read_forms.BATCH)
    assert "".join(map(str, FORMS)).replace("0.5}", "0.50}").splitlines() == lines
    two = read_forms.with_table(HEADER, FORMS[3:5])
    assert read_forms.table(two) == FORMS[3:5]
    assert re.sub(read_forms.LINE, "", two) == re.sub(read_forms.LINE, "", HEADER)


def test_every_form_runs_alone_once():
    lots = read_forms.lots(FORMS)
    assert {form for lot in lots for form in lot} == set(FORMS)
    assert all([form.width for form in lot] == list(read_forms.BATCH) for lot in lots)


def test_times_are_found_again(tmp_path, monkeypatch, capsys):
    """Of forms that take exactly what they are said to, by a run whose every step but the GPU's is made."""
    true = {form: read_forms.replace(form, row_time=7 + i, slot_time=0.25 + i / 64) for i, form in enumerate(FORMS)}
    built = []

    def measure(tree, arguments, out):
        ms = {}
        for form in read_forms.table((tree / read_forms.HEADER).read_text()):
            truth = true[next(f for f in FORMS if str(f) == str(form))]
            for size in arguments[5::2]:
                B, L, M, H, D = map(int, re.findall(r"\d+", size))
                if form.width == D:
                    name = f"memory_read forward B{B} L{L} M{M} H{H} D{D}"
                    ms[name] = (truth.row_time + truth.slot_time * M) * B * L * H / 1e9
        return ms

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    monkeypatch.setattr(variants, "build", built.append)
    monkeypatch.setattr(variants, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["read_forms.py", "--out", str(tmp_path / "forms.json")])
    read_forms.main()
    said = capsys.readouterr().out
    assert len(built) == len(read_forms.lots(FORMS))
    found = read_forms.table(said.split("lines of")[1])
    written = json.loads((tmp_path / "forms.json").read_text())["forms"]
    assert "".join(str(read_forms.Form(**form)) for form in written) == "".join(map(str, found))
    assert [(f.row_time, f.slot_time) for f in found] == [
        (t.row_time, pytest.approx(t.slot_time, rel=5e-3)) for t in true.values()
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it would measure")
def test_without_a_gpu_it_says_so():
    environment = os.environ | {"PYTHONPATH": str(variants.ROOT)}
    command = [sys.executable, BENCHMARKS / "read_forms.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode and "needs a GPU" in done.stderr
