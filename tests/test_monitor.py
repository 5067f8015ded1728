"""TensorBoard, read back, and Weights & Biases, by a module that stands in for it."""

import json
import os
import signal
import sys

import pytest
from PIL import Image
from ranks import remove_after
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmrdpm import recipe
from mmrdpm.errors import RecipeError
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.monitor import Monitor
from mmrdpm.train_model import train


class Wandb:
    """Remembers every call, as the package of that name would get it."""

    class Error(Exception):
        pass

    def __init__(self):
        self.begun, self.logged, self.finished = [], [], 0

    def init(self, **options):
        self.begun.append(options)
        return self

    def log(self, figures, step):
        self.logged.append((step, figures))

    def finish(self):
        self.finished += 1

    def Image(self, image):
        return ("image", image.size)


@pytest.fixture
def wandb(monkeypatch):
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_every_figure_and_goes_on_as_the_same_run(wandb, tmp_path):
    run = tmp_path / "mine"
    run.mkdir()
    with Monitor(run, "title", total=9, wandb="project") as monitor:
        monitor.record(1, {"loss": 2.0, "lr": 0.1}, {"loss": "2.0"})
        monitor.picture("samples", 1, Image.new("RGB", (3, 2)))
        monitor.text("completion", 1, "a heart")
        assert not wandb.finished
    assert wandb.logged == [
        (1, {"loss": 2.0, "lr": 0.1}),
        (1, {"samples": ("image", (3, 2))}),
        (1, {"completion": "a heart"}),
    ]
    with Monitor(run, "title", total=9, done=1, wandb="project") as monitor:
        monitor.record(2, {"loss": 1.0}, {})
    assert wandb.logged[-1] == (2, {"loss": 1.0}) and wandb.finished == 2
    first, again = wandb.begun
    assert first == again and len(first["id"]) == 32
    given = {"project": "project", "name": "mine", "resume": "allow", "dir": str(run)}
    assert first == given | {"id": first["id"]}
    (tmp_path / "other").mkdir()
    with Monitor(tmp_path / "other", "title", total=9, wandb="project"):
        pass
    assert wandb.begun[-1]["id"] != first["id"]


def test_wandb_is_told_by_the_first_rank_alone_and_only_where_asked(wandb, tmp_path, monkeypatch):
    with Monitor(tmp_path, "title", total=9) as monitor:
        monitor.record(1, {"loss": 2.0}, {})
    monkeypatch.setenv("RANK", "1")
    with Monitor(tmp_path, "title", total=9, wandb="project") as monitor:
        monitor.record(1, {"loss": 2.0}, {})
    assert not wandb.begun and not wandb.logged


def test_wandb_that_is_missing_or_refuses_is_one_line(wandb, tmp_path, monkeypatch):
    def refuse(**_):
        raise Wandb.Error("no API key\n  configured")

    monkeypatch.setattr(wandb, "init", refuse)
    with (
        pytest.raises(RecipeError, match=r"could not begin \(no API key configured\): log in"),
        Monitor(tmp_path, "title", total=9, wandb="project"),
    ):
        pass
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it was not installed
    with (
        pytest.raises(RecipeError, match="wandb is not installed: pip install wandb"),
        Monitor(tmp_path, "title", total=9, wandb="project"),
    ):
        pass


@pytest.mark.parametrize("done", [0, 4])
def test_tensorboard_shows_a_run_that_went_on_once(done, tiny_recipe, tmp_path):
    """Updates from there on are made twice: their first scalars are hidden."""
    loaded = recipe.load(ModelRecipe, tiny_recipe, ["checkpoint.keep=9"])
    assert train(loaded, tmp_path)
    remove_after(tmp_path, done)
    assert train(loaded, tmp_path, resume=True)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss/text", "lr", "tokens_per_second"):  # the last differs between the two
        read = {event.step: event.value for event in board.Scalars(name)}
        assert len(read) == len(board.Scalars(name)) == 6
        assert read == pytest.approx({record["step"]: record[name] for record in records})


def test_a_second_ctrl_c_kills_and_the_handlers_come_back(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), Monitor(tmp_path, "title", total=9) as monitor:
            os.kill(os.getpid(), signal.SIGINT)
            assert monitor.stopping
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert "once more to kill" in capsys.readouterr().err
