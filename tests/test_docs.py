"""What the README and docs/ show runs: their Python, their commands, and the output that is shown of them."""

import contextlib
import doctest
import io
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from doc_pages import PAGES, ROOT, blocks, check_command, command_lines, shown_commands
from generated_tables import renewed

TEXTS = {name: path.read_text() for name, path in PAGES.items()}
COMMANDS = [(name, line) for name, text in TEXTS.items() for line in dict.fromkeys(command_lines(text))]
README_COMMANDS = re.findall(r"^memformer-kernels ([^#\n]*)", TEXTS["README.md"], re.MULTILINE)


def with_(language):
    return [name for name, text in TEXTS.items() if blocks(text, language)]


@pytest.mark.parametrize("page", with_("python"))
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """All blocks of a page, one after another, in one namespace; `pycon` blocks must print what they show."""
    if "from memformer import" in TEXTS[page]:
        pytest.importorskip("memformer")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": page}
    checker = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for language, block in re.findall(r"^```(python|pycon)\n(.*?)^```$", TEXTS[page], re.DOTALL | re.MULTILINE):
        if language == "python":
            exec(compile(block, f"<a block of {page}>", "exec"), names)
            continue
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            checker.run(doctest.DocTestParser().get_doctest(block, names, page, page, 0), clear_globs=False)
        assert checker.summarize(verbose=False).failed == 0, said.getvalue()


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=[f"{page}: {line}" for page, line in COMMANDS])
def test_a_command_line_would_be_taken(page, line):
    check_command(line)


def run(line, folder):
    command = [sys.executable, "-m", "memformer_kernels.cli", *shlex.split(line)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "120", "NO_COLOR": "1"}
    environment.pop("TRITON_INTERPRET", None)  # which the tests set, and a user does not
    options = dict(cwd=folder, env=environment, text=True, errors="replace", timeout=300)  # made bytes are any bytes
    return subprocess.run(command, capture_output=True, **options)


def taken_for_granted(folder):
    """What the pages take for granted: a checkout, and texts of one's own."""
    (folder / "benchmarks").symlink_to(ROOT / "benchmarks")
    (folder / "my_texts").mkdir()
    for name in ("notes", "letters"):
        (folder / "my_texts" / f"{name}.txt").write_text(f"{name}: to be or not to be, that is the question\n" * 100)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return taken_for_granted(tmp_path_factory.mktemp("readme"))


def comparable(output):
    """Without what differs from machine to machine: numbers, the width of columns, and the end of a line."""
    output = re.sub(r"\d+(?:[.,]\d+)*(?:e[+-]?\d+)?", "#", output)
    return re.sub(r"[ \u2500\u2501]+", " ", re.sub(r" +$", "", output, flags=re.MULTILINE)).strip() + "\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the outputs shown are those of a CPU")
@pytest.mark.parametrize("page", with_("console"))
def test_a_page_shows_what_its_commands_print(page, tmp_path):
    """In order, in one folder. Numbers are not compared; a line `...` stands for any lines."""
    folder = taken_for_granted(tmp_path)
    for block in blocks(TEXTS[page], "console"):
        for line, expected in shown_commands(block):
            done = run(line.removeprefix("memformer-kernels "), folder)
            got, wanted = comparable(done.stdout + done.stderr), comparable(expected)
            same = doctest.OutputChecker().check_output(wanted, got, doctest.ELLIPSIS)
            assert same, f"$ {line}\nprints\n{done.stdout}{done.stderr}\n{page} shows\n{expected}"


def test_the_readme_names_every_command():
    typer = pytest.importorskip("typer")
    from memformer_kernels.cli.app import app

    assert {line.split()[0] for line in README_COMMANDS} | {"demo"} == set(typer.main.get_command(app).commands)
    assert "make demo" in TEXTS["README.md"]


@pytest.mark.parametrize("line", README_COMMANDS)
def test_a_command_of_the_readme_runs(line, folder):
    name = line.split()[0]
    if torch.cuda.is_available() and name in ("bench", "tune"):
        pytest.skip("takes minutes on a GPU")
    if name == "build":
        pytest.skip("compiles into the tree; tests/test_build.py runs it in a copy")
    if name == "train":
        line += " --steps 10"
    if line.split() == ["train", "--compare", "--steps", "10"]:
        line = line.replace("train", "train my_texts", 1)  # the standard library's validation takes a minute
    done = run(line, folder)
    if name == "tune":
        assert done.returncode == 1 and "tune: needs a CUDA device" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout


@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if "<!-- table:" in text])
def test_tables_are_those_of_the_package_and_of_its_figures(page):
    pytest.importorskip("triton")
    assert renewed(TEXTS[page]) == TEXTS[page], "stale: python tests/generated_tables.py writes it anew"


def test_the_readme_is_short():
    own = re.sub(r"<!-- table: contract -->.*?<!-- /table -->", "", TEXTS["README.md"], flags=re.DOTALL)
    assert len(own.splitlines()) <= 150


def test_links_lead_somewhere():
    for page, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            if not target.startswith("http"):
                assert (PAGES[page].parent / target).exists(), f"{page}: {target}"


def test_every_page_is_reached_from_the_readme():
    for page in PAGES:
        assert page == "README.md" or f"({page})" in TEXTS["README.md"], page
