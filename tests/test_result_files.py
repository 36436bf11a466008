"""Files of figures: two compared, a folder shown as a page."""

import copy
import json
import math
import re
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from memformer_kernels.benchmarking import page, plots, results
from memformer_kernels.benchmarking.compare import compare
from memformer_kernels.benchmarking.peers import OURS
from memformer_kernels.cli.compare import compare as compare_command

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
OPS = RESULTS / "ops_h200.json"
PNG = b"\x89PNG"


@pytest.fixture
def after(tmp_path):
    """The measured ops again: one row twice as slow, one in half the time, one whose time is lost, one left out."""
    content = json.loads(OPS.read_text())
    rows = content["rows"]
    rows[0]["results"][OURS]["ms"] *= 2
    rows[1]["results"][OURS]["ms"] /= 2
    rows[2]["results"][OURS]["ms"] = None
    del rows[3]
    path = tmp_path / "after.json"
    path.write_text(json.dumps(content))
    return path


def name_of(index):
    return results._row_name(json.loads(OPS.read_text())["rows"][index])


def test_every_committed_file_is_known():
    kinds = {path.name: results.kind(results.read(path)) for path in RESULTS.glob("*.json")}
    expected = {"ops_h200": "ops", "rollout_h200": "rollouts", "replay_memory_cpu": "replay memory", "demo_cpu": "demo"}
    expected |= {"forgetting": "forgetting", "memory_gain_L32": "memory gain", "triton_checks_h200": "checks"}
    expected |= {"counters_h200": "counters", "read_forms_h200": "read forms"}
    assert {name: kinds[f"{name}.json"] for name in expected} == expected


def test_ratios_worst_first_and_what_is_missing(after):
    found = compare(OPS, after)
    assert (found.rows[0].name, found.rows[-1].name) == (name_of(0), name_of(1))
    assert found.rows[0].ratio == 2 and found.rows[-1].ratio == 0.5
    assert all(row.ratio == 1 for row in found.rows[1:-1])
    assert found.mean == pytest.approx(1)
    assert found.lost == [name_of(2)] and found.only_before == [name_of(3)] and found.only_after == []


def test_rollouts_are_compared_too(tmp_path):
    content = json.loads((RESULTS / "rollout_h200.json").read_text())
    for part in content["shapes"].values():
        for row in part["rows"]:
            row["ms"] *= 3
    part["rows"].append({"run": "another", "failed": "out of memory"})
    (tmp_path / "after.json").write_text(json.dumps(content))
    found = compare(RESULTS / "rollout_h200.json", tmp_path / "after.json")
    assert all(row.ratio == pytest.approx(3) for row in found.rows) and len(found.only_after) == 1


@pytest.mark.parametrize(("most", "passes"), [(None, True), (3.0, False), (1.5, False)])
def test_the_command_says_all_of_it_and_judges(after, tmp_path, capsys, most, passes):
    picture, file = tmp_path / "compare.png", tmp_path / "compare.json"
    assert compare_command(OPS, after, picture, most, file) is passes
    out = " ".join(capsys.readouterr().out.split())
    assert f"worst 2.000 {name_of(0)}" in out and f"best 0.500 {name_of(1)}" in out
    assert f"no time any more: {name_of(2)}" in out and "in the first file only: 1 rows" in out
    assert picture.read_bytes()[:4] == PNG
    said = json.loads(file.read_text())
    assert said["passes"] is passes and said["worst"]["ratio"] == 2 and said["lost"] == [name_of(2)]


def test_a_ratio_at_the_limit_passes_and_one_above_fails(tmp_path):
    content = json.loads(OPS.read_text())
    for row in content["rows"]:
        row["results"][OURS]["ms"] *= 1.0625  # a number of few bits: the ratio is exact
    path = tmp_path / "after.json"
    path.write_text(json.dumps(content))
    found = compare(OPS, path)
    worst = found.rows[0].ratio
    assert found.passes(worst) and not found.passes(math.nextafter(worst, 0))


def test_standard_output_can_be_the_json_alone(after, capsys):
    compare_command(OPS, after, None, None, Path("-"))
    captured = capsys.readouterr()
    assert json.loads(captured.out)["best"]["ratio"] == 0.5 and "geometric mean" in captured.err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must hold an object"),
        ("{}", "holds no times"),
        ('{"rows": [], "rates": {}}', "no row has a time in both"),
    ],
)
def test_a_file_without_times_is_one_line(content, says, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=says) as caught:
        compare(tmp_path / "x.json", OPS)
    assert str(tmp_path / "x.json") in str(caught.value)


# The page.


def test_the_page_of_the_committed_results(tmp_path):
    written, skipped = page.write(RESULTS, tmp_path / "page")
    assert skipped == {}
    text = written[0].read_text()
    images = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert sorted(images) == sorted(str(path.relative_to(tmp_path / "page")) for path in written[1:])
    assert all(path.read_bytes()[:4] == PNG for path in written[1:])
    for path in RESULTS.glob("*.json"):
        assert path.stem in text, path
    row = json.loads(OPS.read_text())["rows"][0]
    ours = f"{row['results'][OURS]['ms'] * 1e3:.1f} | {row['floor_ms'] * 1e3:.1f}"
    assert f"| {row['op']} | {row['pass']} | {row['shape']} | {ours} |" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):  # as many cells in every line
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table


def test_what_it_cannot_show_is_named(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "older.json").write_text('{"half_life": {"0.1": {}}, "recall": {}}')
    (tmp_path / "forgetting.json").write_bytes(OPS.read_bytes())  # known by its fields, not by its name
    written, skipped = page.write(tmp_path, tmp_path / "page")
    assert "## Operations: forgetting" in written[0].read_text()
    assert set(skipped) == {"broken.json", "other.json", "older.json"}
    assert "'formula'" in skipped["older.json"]
    for file in ("forgetting", "older"):
        (tmp_path / f"{file}.json").unlink()
    with pytest.raises(ValueError, match="holds no JSON file of figures"):
        page.write(tmp_path, tmp_path / "page")


def test_rollouts_of_every_kind_are_drawn(tmp_path):
    """What `benchmarks/rollout.py` can measure: plain, compiled, failed ones, and other horizons."""
    content = copy.deepcopy(results.read(RESULTS / "rollout_h200.json"))
    for part in content["shapes"].values():
        for way in ("plain bptt", "plain checkpoint", "plain replay", "compiled bptt", "compiled replay"):
            part["rows"].append({"run": way, "ms": 100.0, "peak_MiB": 1000})
        part["rows"].append({"run": "compiled replay", "failed": "out of memory"})
    rows = [{"horizon": h, "run": "plain bptt", "ms": 3.0 * h, "peak_MiB": 10 * h} for h in (1, 2, 64)]
    content["horizons"] = {"rows": [*rows, {"horizon": 64, "run": "ours replay", "failed": "no"}]}
    assert plots.draw_rollouts(content, tmp_path / "all.png").read_bytes()[:4] == PNG
