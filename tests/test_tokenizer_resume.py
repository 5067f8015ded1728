"""Image tokenisers whose data fail on the way, and what may change when their training goes on."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from mmrdpm import checkpoint, recipe
from mmrdpm.data.packing import Lane
from mmrdpm.errors import CheckpointError, DataError, TrainingError
from mmrdpm.rdpm.reconstruction import Reconstruction
from mmrdpm.train_tokenizer import ImageTokenizerRecipe, train_image

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="bits are promised for CPUs")


@pytest.fixture(scope="module")
def mapping(tmp_path_factory):
    """A recipe whose phases change after 8 and 14 updates; no checkpoint falls before the ninth."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(30):
        Image.fromarray(random.integers(0, 255, (40, 36, 3), np.uint8)).save(folder / f"{i}.png")
    own = {"image_size": 32, "latent_channels": 4, "patch": 4, "widths": [8, 16], "blocks": 1}
    shares = {"codebook_share": 0.3, "decoder_share": 0.3, "ema": 0.9, "statistics_images": 16}
    return {
        "kind": "image",
        "tokenizer": {"autoencoder": own, "num_timesteps": 3, "codebook_size": 16},
        "data": {
            "sources": {"pictures": {"type": "folder", "path": str(folder)}},
            "crop": "random",
        },
        "train": {"steps": 20, "batch_size": 4, "codebook_batch": 8, "threads": 1, **shares},
        "checkpoint": {"every": 500, "keep": 9, "log_every": 1},
    }


def load(mapping):
    return recipe.from_dict(ImageTokenizerRecipe, mapping, "test")


def test_a_start_that_fails_at_once_does_not_keep_its_folder(mapping, tmp_path, monkeypatch):
    def fail(lane):
        raise DataError("the network is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Lane, "row", fail)
        with pytest.raises(DataError, match="the network is gone"):
            train_image(load(mapping), tmp_path)
    corrected = load({**mapping, "data": {**mapping["data"], "crop": "pad"}})
    assert train_image(corrected, tmp_path)
    with pytest.raises(CheckpointError, match="holds a run already"):
        train_image(corrected, tmp_path)


@pytest.fixture(scope="module")
def finished(mapping, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train_image(load(mapping), run)
    return run


# before the first update, in the first phase, at its end while it settles, and after
@pytest.mark.parametrize(
    ("step", "fails"), [(0, 2), (3, 4 * 3 + 2), (8, 4 * 8 + 6), (10, 4 * 8 + 16 + 8 * 2 + 6)]
)
def test_a_source_that_fails_costs_no_update(
    step, fails, mapping, finished, tmp_path, monkeypatch, capsys
):
    """Four pictures an update at first, 16 to settle, then eight: it fails within a batch."""
    run, given, read = tmp_path / "run", Counter(), Lane.row

    def fail_once(lane):
        given["rows"] += 1
        if given["rows"] == fails:
            raise DataError("the network is gone")
        return read(lane)

    with monkeypatch.context() as patch:
        patch.setattr(Lane, "row", fail_once)
        with pytest.raises(DataError, match="the network is gone"):
            train_image(load(mapping), run)
    newest, said = checkpoint.newest(run), capsys.readouterr().err
    assert (checkpoint.step_of(newest) if newest else 0) == step
    held = "this step is the last saved" if newest else "nothing was done yet, nothing is saved"
    assert f"step {step}  no next batch: {held}" in said
    changed = {
        **mapping,
        "data": {**mapping["data"], "max_broken_share": 0.9},
        "checkpoint": {"every": 6, "keep": 2, "keep_every": 1, "log_every": 1},
    }
    assert train_image(load(changed), run, resume=True)
    for name in ("tokenizer.safetensors", "metrics.jsonl"):
        assert (run / name).read_bytes() == (finished / name).read_bytes()
    assert (run / "step-0000018.safetensors").exists()
    assert recipe.read(run / checkpoint.RECIPE_FILE)["data"]["max_broken_share"] == 0.9


def test_after_a_loss_that_is_no_number_a_lower_rate_goes_on_from_the_last_checkpoint(
    mapping, tmp_path, monkeypatch
):
    often, loss = {**mapping, "checkpoint": {"every": 2, "log_every": 1}}, Reconstruction.loss

    def spoiled(self, output, images, last_layer, step):
        total, parts = loss(self, output, images, last_layer, step)
        return total * (math.nan if step == 5 else 1), parts

    with monkeypatch.context() as patch:
        patch.setattr(Reconstruction, "loss", spoiled)
        with pytest.raises(TrainingError, match=r"step 6: .*--resume and a lower train\.lr"):
            train_image(load(often), tmp_path)
    assert checkpoint.newest(tmp_path).name == "step-0000004.safetensors"
    lower = load({**often, "train": {**mapping["train"], "lr": 1e-4}})
    assert train_image(lower, tmp_path, resume=True)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 21))
    assert recipe.read(tmp_path / checkpoint.RECIPE_FILE)["train"]["lr"] == 1e-4
