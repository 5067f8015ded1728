"""Faults of the data while a model is trained: they cost no update that was done."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from test_train_model import changed, losses, newest_bytes

from mmrdpm import checkpoint, recipe, text_tokenizer
from mmrdpm.data import rows as data_rows
from mmrdpm.data.loader import Loader
from mmrdpm.data.packing import Lane
from mmrdpm.data.plan import DataPlan
from mmrdpm.errors import CheckpointError, DataError
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.train_model import Trainer, train
from mmrdpm.vocabulary import Vocabulary

LOADERS = {"image": image_tokenizer.load, "text": text_tokenizer.load}


@pytest.fixture
def texts_recipe(tiny_recipe, tmp_path):
    """Trains on lines of text; no step but the last would be saved."""
    lines = [{"text": f"line {i} " + "word " * (i % 9)} for i in range(300)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = {"sources": {"t": {"type": "text", "path": str(tmp_path / "t.jsonl")}}}
    data |= {"max_caption_tokens": 16, "look_ahead": 4}
    policy = {"every": 500, "keep": 9, "log_every": 2}
    return changed(tiny_recipe, tmp_path, data=data, checkpoint=policy)


@pytest.mark.skipif(torch.cuda.is_available(), reason="bits are promised for CPUs alone")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_source_that_fails_costs_no_update(workers, texts_recipe, tmp_path, monkeypatch):
    whole, run, made = tmp_path / "whole", tmp_path / "run", f"data.workers={workers}"
    loaded = recipe.load(ModelRecipe, texts_recipe, [made])
    assert train(loaded, whole)
    given, read, fails = 0, Lane.row, 8 if workers else 16  # of a process

    def fail_once(lane):
        nonlocal given
        given += 1
        if given == fails:  # the other row of its batch is read already
            raise DataError("the network is gone")
        return read(lane)

    with monkeypatch.context() as patch:
        patch.setattr(Lane, "row", fail_once)
        with pytest.raises(DataError, match="the network is gone"):
            train(loaded, run)
    assert checkpoint.step_of(checkpoint.newest(run)) == 7
    assert train(loaded, run, resume=True)
    assert losses(run) == losses(whole)
    assert newest_bytes(run) == newest_bytes(whole)


def test_a_source_that_fails_at_once_leaves_nothing_and_says_so(
    texts_recipe, tmp_path, monkeypatch, capsys
):
    def fail(lane):
        raise DataError("the network is gone")

    monkeypatch.setattr(Lane, "row", fail)
    with pytest.raises(DataError, match="the network is gone"):
        train(recipe.load(ModelRecipe, texts_recipe), tmp_path / "run")
    said = capsys.readouterr().err
    assert "step 0  no next batch: nothing was done yet, nothing is saved" in said
    assert checkpoint.newest(tmp_path / "run") is None
    monkeypatch.undo()
    corrected = recipe.load(ModelRecipe, texts_recipe, ["train.warmup=3"])
    with pytest.raises(CheckpointError, match=r"warmup=2, .*or begin anew without --resume or in"):
        train(corrected, tmp_path / "run", resume=True)
    assert train(corrected, tmp_path / "run")
    assert recipe.read(tmp_path / "run" / "recipe.yaml")["train"]["warmup"] == 3
    with pytest.raises(CheckpointError, match="holds a run already"):
        train(corrected, tmp_path / "run")


def end(worker, *signals):
    """Sends them; whoever waits for the worker would take away how it ended."""
    for number in signals:
        os.kill(worker.pid, number)
        time.sleep(0.3)  # two that are both waiting are one
    while Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)


def too_late(*_):
    pytest.fail("it waits for ever")  # no Exception, which torch would take for the worker's end


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
@pytest.mark.parametrize(
    "signals", [[signal.SIGKILL], [signal.SIGTERM] * 2], ids=["killed", "left"]
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_ends_in_the_middle_of_a_batch_is_noticed(
    workers, signals, tiny_tokenizers, tmp_path, monkeypatch
):
    """Of rows that are larger than a pipe: half of them are in it, the rest never comes."""
    monkeypatch.setattr(data_rows, "SIGNALS_TOGETHER", 0.0)  # the second SIGTERM is of another stop
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "red heart " * 3000}))
    shape = {"rows": 64, "seq_len": 2048, "steps_per_image": 2, "workers": workers}
    sources = {"t": {"type": "text", "path": str(tmp_path / "t.jsonl")}}
    plan = recipe.from_dict(DataPlan, {"sources": sources, **shape}, "test")
    images, texts = (load(tiny_tokenizers / kind) for kind, load in LOADERS.items())
    loader = Loader(plan, 0, images, texts, Vocabulary(texts.size, images.codebook_size))
    loader.rows.next()
    time.sleep(1.0)  # it fills the pipe
    end(multiprocessing.active_children()[0], *signals)
    before = signal.signal(signal.SIGALRM, too_late)
    signal.alarm(60)
    try:
        with pytest.raises(DataError, match=r"DataLoader worker .*lower data\.workers"):
            for _ in range(9):
                loader.rows.next()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="bits are promised for CPUs alone")
def test_a_killed_worker_costs_no_update(texts_recipe, tmp_path, monkeypatch):
    whole, run, update = tmp_path / "whole", tmp_path / "run", Trainer.update
    loaded = recipe.load(ModelRecipe, texts_recipe, ["data.workers=1"])
    assert train(loaded, whole)

    def killing(self):
        if self.step == 5:
            (worker,) = multiprocessing.active_children()
            end(worker, signal.SIGKILL)
        return update(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "update", killing)
        with pytest.raises(DataError, match=r"DataLoader worker .*lower data\.workers"):
            train(loaded, run)
    assert checkpoint.step_of(checkpoint.newest(run)) >= 5
    assert train(loaded, run, resume=True)
    assert losses(run) == losses(whole)
    assert newest_bytes(run) == newest_bytes(whole)
