"""What the README shows is what happens."""

import re
import shlex
from pathlib import Path

import pytest

from mmrdpm.cli import _parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line.partition("#")[0].strip()
    for block in re.findall(r"```console\n(.*?)```", README, re.S)
    for line in block.splitlines()
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_that_the_program_knows(command):
    program, *arguments = shlex.split(command)
    assert program == "mmrdpm"
    options, rest = _parser().parse_known_args(arguments)
    assert callable(options.command)
    assert all("=" in word and not word.startswith("-") for word in rest)


def test_the_python_example_does_what_its_comments_say(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(example, "README.md", "exec"), {})
    caption, text, score = capsys.readouterr().out.splitlines()
    assert caption == "['red heart']" and f"# {caption}" in example
    assert text.startswith("A hospital is")
    assert -1 < float(score) < 0


def test_every_file_and_picture_that_is_named_exists():
    named = re.findall(r"\]\((?!http)([^)]+)\)", README)
    named += re.findall(r"`?((?:mmrdpm|docs|recipes|tests|models)/[\w./-]+)", README)
    assert "docs/pictures/drawn.png" in named
    for path in named:
        assert (ROOT / path.rstrip(".")).exists(), path


def test_the_two_commands_are_in_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^    make (\w+)", README, re.M)
    assert set(targets) == {"quickstart", "test"}
    assert all(f"\n{target}:" in makefile for target in targets)
