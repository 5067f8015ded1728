"""The built wheel carries what the package needs, and works from any folder."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The folder of an unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    assert wheel.stat().st_size < 40e6
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_draws_with_its_shipped_model_from_any_folder(unpacked, tmp_path):
    code = "import mmrdpm, sys; from mmrdpm.cli import main; print(mmrdpm.__file__); main()"
    arguments = ["generate", "red heart", "--out", "heart.png"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=True,
    )
    place, path = done.stdout.splitlines()
    assert Path(place).is_relative_to(unpacked)
    assert (tmp_path / path).stat().st_size > 0


def test_the_wheel_carries_all_that_is_shipped_and_nothing_else(unpacked):
    carried = unpacked / "mmrdpm" / "_shipped"
    for kind in ("tokenizers", "recipes", "eval", "models"):
        here = {p.relative_to(ROOT / kind) for p in (ROOT / kind).rglob("*") if p.is_file()}
        assert {p.relative_to(carried / kind) for p in (carried / kind).rglob("*.*")} == here
    assert not list(unpacked.rglob("test_*.py"))


def test_emoji_tiny_takes_at_most_20_megabytes():
    files = [p for p in (ROOT / "models" / "emoji-tiny").rglob("*") if p.is_file()]
    assert 0 < sum(p.stat().st_size for p in files) <= 20e6
