"""Image tokenisers on any data: exact resume, ranks, losses, published autoencoders, collapse."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderDC, AutoencoderKL
from PIL import Image
from processes import start
from ranks import finish, start_ranks

from mmrdpm import checkpoint, recipe, tree, weights
from mmrdpm.cli import main
from mmrdpm.data.images import Cropper, ImagePlan
from mmrdpm.data.sources import SourceConfig
from mmrdpm.errors import CheckpointError, DataError, MmrdpmError, RecipeError, TrainingError
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.rdpm.reconstruction import LossConfig
from mmrdpm.train_model import train
from mmrdpm.train_tokenizer import ImageTokenizerRecipe, train_image

OWN = {"image_size": 32, "latent_channels": 4, "patch": 4, "widths": [8, 16], "blocks": 1}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 30 pictures of many shapes, and one that is none."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(30):
        width, height = random.integers(36, 80, 2)
        x, y = np.meshgrid(np.arange(width), np.arange(height))
        waves = [np.sin(x / random.uniform(2, 20)), np.cos(y / random.uniform(2, 20)), x * 0 + 0.1]
        pixels = (np.stack(waves, -1) * 120 + 127).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


def make_recipe(pictures, autoencoder, train, **more):
    mapping = {
        "kind": "image",
        "tokenizer": {"autoencoder": autoencoder, "num_timesteps": 3, "codebook_size": 16},
        "data": {"sources": {"pictures": {"type": "folder", "path": str(pictures)}}},
        "train": {"batch_size": 4, "codebook_batch": 8, "threads": 1, **train},
        **more,
    }
    return recipe.from_dict(ImageTokenizerRecipe, mapping, "test")


@pytest.fixture(scope="module")
def full_recipe(pictures, backbone):
    """All parts of the loss, averaged weights, random crops."""
    loss = {
        "perceptual": 0.1,
        "backbone": str(backbone),
        "adversarial": 0.1,
        "adversarial_start": 3,
    }
    train = {
        "steps": 20,
        "codebook_share": 0.3,
        "decoder_share": 0.3,
        "ema": 0.9,
        "statistics_images": 16,
        "loss": loss,
    }
    made = make_recipe(pictures, OWN, train, checkpoint={"every": 4, "keep": 100, "log_every": 1})
    mapping = recipe.to_dict(made)
    mapping["data"] |= {"crop": "random", "flip": True}
    return recipe.from_dict(ImageTokenizerRecipe, mapping, "test")


@pytest.fixture(scope="module")
def finished(full_recipe, tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    assert train_image(full_recipe, run)
    return run


def losses(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def cut(run, copy, step):
    """A copy of a run as it was after that step."""
    shutil.copytree(run, copy)
    for path in [*copy.glob("step-*"), *copy.glob("resume/step-*")]:
        if checkpoint.step_of(path) > step:
            path.unlink()
    (copy / "tokenizer.safetensors").unlink()


@pytest.mark.skipif(torch.cuda.is_available(), reason="bits are promised for CPUs alone")
@pytest.mark.parametrize("step", [4, 8, 16])  # phases change after 8 and 14
def test_a_stopped_run_goes_on_as_if_it_had_not(finished, full_recipe, tmp_path, step):
    copy = tmp_path / "copy"
    cut(finished, copy, step)
    assert train_image(full_recipe, copy, resume=True)
    for name in ("tokenizer.safetensors", "metrics.jsonl"):
        assert (copy / name).read_bytes() == (finished / name).read_bytes()


def test_the_log_shows_losses_and_the_use_of_codes_at_every_timestep(finished):
    first, fitting, last = (losses(finished)[i] for i in (4, 12, 19))
    parts = ("autoencoder", "pixels", "perceptual", "adversarial", "discriminator")
    assert {f"loss/{part}" for part in parts} <= first.keys()
    for name in ("codebook_usage", "dead_codes", "reseeded_codes", "latent_error"):
        assert {f"{name}/timestep_{t:02d}" for t in (1, 2, 3)} <= fitting.keys()
    assert "loss/decoder" in last and last["data/skipped"] > 0
    broken = [json.loads(line) for line in (finished / "skipped.jsonl").read_text().splitlines()]
    assert {b["key"] for b in broken} == {"broken.png"}


def test_the_averaged_weights_are_what_is_kept(finished):
    """In the codebook's phase the encoder is the average, and its latents have variance 1."""
    before = tree.load(finished / "resume" / "step-0000008.safetensors")["average"]
    raw, _ = weights.load(finished / "step-0000008.safetensors")
    kept, _ = weights.load(finished / "step-0000012.safetensors")
    name = "encoder.0.weight"
    assert torch.equal(kept[f"autoencoder.{name}"], before[name])
    assert not torch.equal(raw[f"autoencoder.{name}"], before[name])


def test_two_ranks_train_the_tokeniser_of_one_process(full_recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # two ranks would want two GPUs
    path, run = tmp_path / "recipe.yaml", tmp_path / "run"
    mapping = recipe.to_dict(full_recipe)
    mapping["train"]["loss"] |= {"perceptual": 0.0, "backbone": ""}
    mapping["train"]["precision"], mapping["checkpoint"]["every"] = "fp32", 20
    plain = recipe.from_dict(ImageTokenizerRecipe, mapping, "test")
    recipe.dump(plain, path)
    program = ("-m", "mmrdpm", "tokenizer", "train")
    alone = [start(*program, path, "--run", tmp_path / "alone")]
    for ranks in (alone, start_ranks(path, run, program=program)):
        codes, _, err = finish(ranks)
        assert not any(codes), err
    for one, two in zip(losses(tmp_path / "alone"), losses(run), strict=True):
        assert one.keys() == two.keys()
        parts = ("autoencoder", "codebook", "decoder", "discriminator")
        same = {f"loss/{part}" for part in parts} & one.keys()
        assert {n: two[n] for n in same} == pytest.approx({n: one[n] for n in same}, rel=5e-3)


def test_the_embedded_pictures_resume_byte_for_byte(tmp_path):
    mapping = {
        "kind": "image",
        "tokenizer": {
            "autoencoder": {**OWN, "image_size": 16}, "num_timesteps": 3, "codebook_size": 16
        },
        "train": {"steps": 12, "batch_size": 8, "codebook_batch": 16, "codebook_share": 0.4,
                  "decoder_share": 0.3, "threads": 1},
        "checkpoint": {"every": 1, "keep": 100},
    }  # fmt: skip
    made = recipe.from_dict(ImageTokenizerRecipe, mapping, "test")
    assert train_image(made, tmp_path / "whole")
    for step in (2, 6, 10):
        copy = tmp_path / str(step)
        cut(tmp_path / "whole", copy, step)
        assert train_image(made, copy, resume=True)
        name = "tokenizer.safetensors"
        assert (copy / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderDC"])
def test_a_codebook_on_a_published_autoencoder(kind, published, pictures, tmp_path, capsys):
    source = tmp_path / "source"
    shutil.copytree(published / kind, source)
    plan = {"steps": 12, "decoder_share": 0.0, "statistics_images": 64}
    made = make_recipe(pictures, {"diffusers": str(source), "image_size": 32}, plan)
    assert train_image(made, tmp_path / "run")
    theirs = {"AutoencoderKL": AutoencoderKL, "AutoencoderDC": AutoencoderDC}[kind]
    theirs = theirs.from_pretrained(source, low_cpu_mem_usage=False)
    shutil.rmtree(source)  # the tokeniser holds what it needs
    ours = image_tokenizer.load(tmp_path / "run")
    assert ours.grid == (16, 16) and ours.config.autoencoder.factor == 2
    cropper = Cropper(made.data, 32)
    squares = [
        cropper.square(Image.open(path).convert("RGB"), np.random.default_rng(0))
        for path in sorted(pictures.glob("[0-9]*.png"))
    ]
    images = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = ours.autoencoder.encode(images)
        encoded = theirs.encode(images)
        wanted = theirs.decode(
            encoded.latent_dist.mode() if kind == "AutoencoderKL" else encoded.latent
        ).sample
        mine = ours.autoencoder.decode(latents)
    assert latents.mean((0, 1, 2)).abs().max() < 0.2
    assert latents.var((0, 1, 2)).sub(1).abs().max() < 0.3
    torch.testing.assert_close(mine, wanted, atol=0.02, rtol=0.02)  # kept as float16
    good = [p for p in pictures.iterdir() if p.name != "broken.png"]
    assert main(["tokenizer", "show", str(good[0]), "--tokenizer", str(tmp_path / "run"),
                 "--out", str(tmp_path / "sheet.png")]) == 0  # fmt: skip
    whole = tmp_path / "whole"
    whole.mkdir()
    for path in good[:8]:
        shutil.copy(path, whole)
    command = ["tokenizer", "eval", str(tmp_path / "run"), "--images", str(whole), "--count", "5"]
    capsys.readouterr()
    assert main(command) == 0
    assert "5 pictures" in capsys.readouterr().out


def test_a_model_learns_on_a_published_autoencoder(
    published, pictures, tiny_recipe, tiny_tokenizers, tmp_path
):
    plan = {"steps": 4, "decoder_share": 0.0, "statistics_images": 16}
    autoencoder = {"diffusers": str(published / "AutoencoderKL"), "image_size": 8}
    images = tmp_path / "images"
    assert train_image(make_recipe(pictures, autoencoder, plan), images)
    mapping = yaml.safe_load(tiny_recipe.read_text())
    mapping["tokenizers"]["image"] = str(images)
    mapping["train"]["steps"] = 2
    run = tmp_path / "run"
    assert train(recipe.from_dict(ModelRecipe, mapping, "test"), run)
    assert image_tokenizer.load(run / "tokenizers" / "image").image_size == 8


def test_a_published_autoencoder_that_changed_is_noticed(published, pictures, tmp_path):
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(published / "AutoencoderKL", source)
    plan = {"steps": 4, "decoder_share": 0.0, "statistics_images": 8}
    autoencoder = {"diffusers": str(source), "image_size": 32}
    made = make_recipe(pictures, autoencoder, plan, checkpoint={"every": 1, "keep": 9})
    assert train_image(made, run)
    cut(run, tmp_path / "copy", 2)
    assert train_image(made, tmp_path / "copy", resume=True)
    name = "tokenizer.safetensors"
    assert (run / name).read_bytes() == (tmp_path / "copy" / name).read_bytes()
    torch.manual_seed(9)
    AutoencoderKL.from_config(AutoencoderKL.load_config(source)).save_pretrained(source)
    cut(run, tmp_path / "other", 2)
    with pytest.raises(CheckpointError, match="which is now"):
        train_image(made, tmp_path / "other", resume=True)
    spec = recipe.load(image_tokenizer.ImageTokenizerConfig, run / "tokenizer.yaml")
    pinned = make_recipe(pictures, {**autoencoder, "sha256": spec.autoencoder.sha256}, plan)
    with pytest.raises(CheckpointError, match="they changed"):
        train_image(pinned, tmp_path / "pinned")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda f: shutil.rmtree(f), "no such folder"),
        (lambda f: (f / "config.json").unlink(), r"holds no config\.json"),
        (lambda f: next(f.glob("*.safetensors")).rename(f / "a.bin"), "pickled weights are never"),
        (lambda f: next(f.glob("*.safetensors")).write_bytes(b"x" * 99), "could be loaded"),
        (lambda f: change(f, _class_name="UNet2DModel"), "of class 'UNet2DModel', not Auto"),
        (lambda f: change(f, in_channels=1), "has in_channels 1, but pictures have 3"),
        (lambda f: change(f, latent_channels=9), "could be loaded"),
        (lambda f: change(f, latent_channels="4"), "does not make sense"),
        (lambda f: change(f, block_out_channels=[]), "does not make sense"),
        (lambda f: change(f, block_out_channels=5), "does not make sense"),
        (lambda f: change(f, norm_num_groups=0), "could be loaded"),
        (lambda f: (f / "config.json").write_text("[]"), "could be loaded|is no mapping"),
    ],
)
def test_what_is_no_published_autoencoder_is_refused(make, says, published, pictures, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(published / "AutoencoderKL", source)
    make(source)
    autoencoder = {"diffusers": str(source), "image_size": 32}
    made = make_recipe(pictures, autoencoder, {"decoder_share": 0.0})
    with pytest.raises(MmrdpmError, match=says) as caught:
        train_image(made, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def change(folder, **keys):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_mistakes_of_a_recipe_are_refused(published, pictures, tmp_path, monkeypatch):
    kl = {"diffusers": str(published / "AutoencoderKL"), "image_size": 32}
    refused = [
        (kl, {"decoder_share": 0.1}, "stays as it is: set it to 0"),
        (kl, {"decoder_share": 0.0, "ema": 0.9}, "stays as it is: leave them out"),
        ({**kl, "image_size": 33}, {"decoder_share": 0.0}, "a multiple of 2"),
        (
            OWN,
            {"steps": 20, "loss": {"adversarial": 0.1, "adversarial_start": 20}},
            "are 20 updates",
        ),
        (OWN, {"loss": {"adversarial": 0.1}, "batch_size": 3}, "multiple of train.batch_size, 3"),
        ({**OWN, "image_size": 16}, {"loss": {"adversarial": 0.1}}, "at least 32 pixels, not 16"),
        (OWN, {"loss": {"perceptual": 1.0, "backbone": "/nowhere"}}, "no network could be loaded"),
    ]
    for autoencoder, plan, says in refused:
        with pytest.raises(MmrdpmError, match=says):
            train_image(make_recipe(pictures, autoencoder, plan), tmp_path / "run")
    for broken, says in [
        ({"widths": [12]}, "multiple of 8"),
        ({"image_size": 30}, "must be a multiple of 8"),
    ]:
        with pytest.raises(RecipeError, match=says):
            make_recipe(pictures, {**OWN, **broken}, {})
    with pytest.raises(RecipeError, match="give both or neither"):
        LossConfig(perceptual=1.0)
    with pytest.raises(RecipeError, match="holds no pictures"):
        ImagePlan({"words": SourceConfig("glosses")})
    with pytest.raises(RecipeError, match=r"are for data\.sources"):
        ImagePlan(flip=True)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(RecipeError, match=r"pip install 'mmrdpm\[autoencoders\]'"):
        train_image(make_recipe(pictures, kl, {"decoder_share": 0.0}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_of_broken_pictures_stops_the_run(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"in a row are broken.*or the source.s keys in the recipe"):
        train_image(make_recipe(tmp_path, OWN, {}), tmp_path / "run")


def test_a_loss_that_is_no_number_stops_the_run_before_it_is_saved(pictures, tmp_path):
    run = tmp_path / "run"
    made = make_recipe(pictures, OWN, {"lr": 1e30}, checkpoint={"every": 1, "keep": 99})
    with pytest.raises(TrainingError, match=r"the loss of the autoencoder is no number.*--resume"):
        train_image(made, run)
    last = checkpoint.newest(run)
    assert last is not None and checkpoint.step_of(last) == len(list(run.glob("step-*")))


def test_a_codebook_that_stays_out_of_use_stops_the_run(pictures, published, tmp_path):
    kl = {"diffusers": str(published / "AutoencoderKL"), "image_size": 32}
    plan = {
        "decoder_share": 0.0,
        "statistics_images": 8,
        "collapse": {"min_usage": 1.0, "patience": 3},
    }
    with pytest.raises(TrainingError, match=r"collapsed: at timestep \d.* at 3 checks in a row"):
        train_image(make_recipe(pictures, kl, plan, checkpoint={"log_every": 2}), tmp_path / "run")
    assert [record["step"] for record in losses(tmp_path / "run")] == [2, 4]


def test_the_autoencoder_of_a_stopped_run_is_not_lost(finished, full_recipe, tmp_path):
    cut(finished, tmp_path / "stopped", 12)
    mapping = recipe.to_dict(full_recipe)
    mapping["train"]["autoencoder_from"] = str(tmp_path / "stopped")
    assert train_image(recipe.from_dict(ImageTokenizerRecipe, mapping, "test"), tmp_path / "run")
    there, _ = weights.load(tmp_path / "stopped" / "step-0000012.safetensors")
    here = image_tokenizer.load(tmp_path / "run").autoencoder.encoder.state_dict()
    wanted = {name: there[f"autoencoder.encoder.{name}"] for name in here}
    torch.testing.assert_close(here, wanted, atol=1e-3, rtol=1e-3)
