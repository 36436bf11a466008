"""The repository's Markdown: its pages, what stands in their blocks, and whether a command line would be taken."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
PROGRAMS = ("memformer-kernels", "python", "torchrun", "make", "pip", "pytest")
OTHERS = ("cat", "zcat", "jq", "cd", "cp")  # which the commands are piped from and to


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def shown_commands(block: str) -> list[tuple[str, str]]:
    """Of a `console` block, each command after its `$ `, and the output below it."""
    parts = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)
    assert parts[0] == "", f"output without a command: {parts[0]!r}"
    return list(zip(parts[1::2], parts[2::2], strict=True))


def command_lines(text: str) -> list[str]:
    """Every command line of a page: of its blocks, of indented lines, and in the middle of a sentence."""
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
    lines += [command for block in blocks(text, "console") for command, _ in shown_commands(block)]
    program = "|".join(PROGRAMS)
    lines += re.findall(rf"^    (?:\w+=\S* )*((?:{program}) .*)$", text, re.MULTILINE)
    without_blocks = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    lines += re.findall(rf"`((?:{program}) [^`]+)`", without_blocks)
    return [" ".join(line.split()) for line in lines if line.strip() and not line.startswith("#")]


def check_command(line: str) -> None:
    """Fails unless every program of the line exists and would take its arguments; runs nothing."""
    words = shlex.split(line, comments=True)
    while words:
        end = next((i for i, word in enumerate(words) if word in ("|", "&&", ">", "<")), len(words))
        command, words = words[:end], words[end + 1 :]
        while command and re.fullmatch(r"[A-Z_]+=.*", command[0]):  # of the environment
            command = command[1:]
        _check_program(command[0], command[1:], line)


def _check_program(program: str, arguments: list[str], line: str) -> None:
    if program == "memformer-kernels":
        _parse(arguments)
    elif program == "python" and arguments[:2] == ["-m", "memformer_kernels.cli"]:
        _parse(arguments[2:])
    elif program == "python":
        _check_script(arguments, line)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(arguments)
        script = [options.training_script, *options.training_script_args]
        _check_program("python", ["-m", *script] if options.module else script, line)
    elif program == "make":
        assert set(arguments) <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)), line
    elif program == "pip":
        _check_requirement(arguments, line)
    elif program == "pytest":
        assert all((ROOT / a.split("::")[0]).exists() for a in arguments if not a.startswith("-")), line
    else:
        assert program in OTHERS or program.endswith((".png", ".json", ".md", ".txt")), f"unknown program: {line}"


def _parse(arguments: list[str]) -> None:
    typer = pytest.importorskip("typer")
    from memformer_kernels.cli.app import app

    group = typer.main.get_command(app)
    name, command, rest = group.resolve_command(typer.Context(group), arguments)
    command.make_context(name, rest)  # raises what a user would be told


def _check_script(arguments: list[str], line: str) -> None:
    script = ROOT / arguments[0]
    assert script.is_file(), f"no such script: {line}"
    source = script.read_text()
    for module in re.findall(r"^import (\w+)$", source, re.MULTILINE):  # the command may be shared by scripts beside it
        beside = script.with_name(f"{module}.py")
        source += beside.read_text() if beside.is_file() else ""
    for option in (a for a in arguments[1:] if a.startswith("--")):
        assert f'"{option.split("=")[0]}"' in source or script.name == "setup.py", f"{option} is not taken: {line}"


def _check_requirement(arguments: list[str], line: str) -> None:
    assert arguments[0] == "install", line
    project = (ROOT / "pyproject.toml").read_text()
    for target in (a for a in arguments[1:] if not a.startswith("-")):
        name, extra = re.fullmatch(r"([\w.=-]+)(?:\[(\w+)\])?", target).groups()
        assert name in (".", "memformer-kernels") or f'"{name}"' in project, line
        assert extra is None or f"\n{extra} = [" in project, line
