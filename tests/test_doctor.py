"""`mmrdpm doctor` of runs by several processes, of other disks and of other kinds of recipes."""

import re
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmrdpm import doctor, machine
from mmrdpm.checkpoint import CheckpointPolicy
from mmrdpm.cli import main

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    """Nor are the seconds spent that the measuring of a CPU takes."""
    for measured in ("measured_rate", "measured_bandwidth"):
        monkeypatch.setattr(machine, measured, lambda *_, **__: 1e10)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def told(tiny_recipe, capsys):
    """What is said of the tiny recipe, and the exit status that it must have."""

    def run(*words, status=0):
        assert main(["doctor", str(tiny_recipe), *words]) == status
        return capsys.readouterr().out

    return run


def test_a_model_is_planned_for_as_many_as_are_asked_for(told):
    """And no more rows are made than one of them takes at once."""
    said = told("data.rows=8", "--gpus", "4")
    assert re.search(r"  needs +0\.\d\d GB at once in each of 4 processes, of .* for all", said)
    assert "  data         the first 2 rows are there, " in said
    said = told("data.rows=8", "train.micro_batch_size=4")
    assert re.search(r"  needs +0\.\d\d GB at once in one process", said)
    assert "  data         the first 4 rows are there, " in said
    said = told("data.rows=8", "--gpus", "3", status=1)
    assert "! recipe       data.rows is 8, no multiple of 3 GPUs" in said


def test_by_default_as_many_devices_as_can_share_the_rows(told, monkeypatch):
    planned = []
    make_plan = doctor.make_plan

    def remember(loaded, gpus, kind):
        planned.append(gpus)
        return make_plan(loaded, gpus, kind)

    monkeypatch.setattr(doctor, "make_plan", remember)
    card = SimpleNamespace(name="a card", total_memory=8e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    told("data.rows=6")
    assert planned == [3]


def test_a_plan_comes_before_data_that_are_not_there(told):
    sources = "data.sources={t: {type: text, path: /nowhere/at/all}}"
    said = told(sources, "data.max_caption_tokens=8", status=1)
    assert "! recipe       /nowhere/at/all: " in said and "  needs  " in said


def test_the_disk_is_that_of_the_run(told, tmp_path, monkeypatch):
    looked_at = []

    def full(place):
        looked_at.append(Path(place))
        return Usage(10, 10, 0)

    monkeypatch.setattr(shutil, "disk_usage", full)
    run = tmp_path / "not" / "yet"
    said = told("--run", str(run), status=1)
    assert set(looked_at) == {tmp_path}
    assert f"  disk         0 GB free at {tmp_path}\n" in said
    assert re.search(rf"! needs +0\.00 GB for checkpoints, 0 GB are free at {tmp_path}\n", said)


def test_checkpoints_that_are_kept_for_good_take_room_too(tmp_path):
    """Of 120 updates those after 30, 60 and 90, beside the last one and a new one."""
    policy = CheckpointPolicy(keep=1, keep_every=30)
    assert doctor._disk(policy, 120, 10**9, tmp_path).text.startswith("20.00 GB")
    assert doctor._disk(replace(policy, keep_every=0), 120, 10**9, tmp_path).text.startswith("8.00")


def test_a_number_of_gpus_is_for_models(image_recipe_file, capsys):
    path = str(image_recipe_file)
    assert main(["doctor", path, "--gpus", "2"]) == 1
    (line,) = (o for o in capsys.readouterr().out.splitlines() if o.startswith("!"))
    assert line.startswith(f"! recipe       {path}: is of an image tokeniser")
    assert "for 2 GPUs: leave out --gpus" in line


@pytest.mark.parametrize(
    ("recipe", "instead"),
    [
        ("emoji_bpe_4k", "kind 'text', which is not looked into: mmrdpm tokenizer train"),
        ("ablations/noise", "kind 'sweep', which is not looked into: name its model_recipe"),
        ("peers/smoke", "kind 'peers', which is not looked into: mmrdpm bench peers"),
    ],
)
def test_what_to_do_with_a_recipe_of_another_kind_is_said(recipe, instead, capsys):
    assert main(["doctor", recipe]) == 1
    said = capsys.readouterr().out
    (line,) = (line for line in said.splitlines() if line.startswith("!"))
    assert line.startswith("! recipe ") and instead in line and "  torch " in said
