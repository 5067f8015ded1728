"""A model small enough to train inside a test: 2x2 positions, 3 timesteps, 16 codes."""

import os
import signal
import subprocess
import tempfile
from contextlib import contextmanager
from typing import ClassVar

import processes
import pytest
import torch
import yaml
from PIL import Image

from mmrdpm import recipe, text_tokenizer
from mmrdpm.data.emoji import load_emoji
from mmrdpm.evaluation import drawn
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.rdpm.autoencoder import AutoencoderConfig
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from mmrdpm.train_model import train

KL = {  # sizes of tiny autoencoders as diffusers makes them
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 16,
}
DC = {
    "latent_channels": 8,
    "attention_head_dim": 4,
    **{f"{s}_block_types": ("ResBlock",) * 2 for s in ("encoder", "decoder")},
    **{f"{s}_block_out_channels": (8, 16) for s in ("encoder", "decoder")},
    **{f"{s}_layers_per_block": (1, 1) for s in ("encoder", "decoder")},
    **{f"{s}_qkv_multiscales": ((), ()) for s in ("encoder", "decoder")},
}


def pytest_configure(config):
    """What is cached goes into a folder of this session's own, not into the user's home."""
    home = tempfile.TemporaryDirectory(prefix="mmrdpm-tests-", ignore_cleanup_errors=True)
    config.add_cleanup(home.cleanup)
    os.environ["XDG_CACHE_HOME"] = os.environ["HF_HOME"] = home.name
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests run in two processes


@pytest.fixture(autouse=True)
def one_thread():
    """Whatever ran before, and whatever is set here."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_orphans(monkeypatch):
    """Processes that a failed test has left would slow all that follow."""
    started = []

    class Remembered(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Remembered)
    yield
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()
    processes.end_all()


def pytest_collection_modifyitems(config, items):
    """Slow tests run only where they are asked for."""
    if "slow" not in config.getoption("-m"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: run it with -m slow"))


@pytest.fixture(scope="session")
def tiny_tokenizers(tmp_path_factory):
    """A folder with `image` and `text`."""
    folder = tmp_path_factory.mktemp("tokenizers")
    torch.manual_seed(0)
    shape = AutoencoderConfig(image_size=16, latent_channels=4, widths=(8, 16), blocks=1)
    images = ImageTokenizer(ImageTokenizerConfig(shape, num_timesteps=3, codebook_size=16))
    images.codebook.codes.normal_()
    images.save(folder / "image")
    text_tokenizer.train_bpe(load_emoji(16).names, 320).save(folder / "text")
    return folder


@pytest.fixture(scope="session")
def tiny_recipe(tiny_tokenizers, tmp_path_factory):
    """The file of a recipe that trains in a second or two."""
    mapping = {
        "kind": "model",
        "tokenizers": {t: str(tiny_tokenizers / t) for t in ("image", "text")},
        "model": {"layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "ffn": 48},
        "data": {"rows": 2, "seq_len": 96, "steps_per_image": 2},
        "train": {"steps": 12, "warmup": 2, "threads": 1},
        "checkpoint": {"every": 4, "log_every": 2},
        "samples": {"every": 12, "prompts": ["red heart"]},
    }
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(mapping))
    return path


@pytest.fixture(scope="session")
def tiny_run(tiny_recipe, tmp_path_factory):
    """The folder of a finished run of that recipe."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    assert train(recipe.load(ModelRecipe, tiny_recipe), run)
    return run


@pytest.fixture(scope="module")
def shared_recipe(tiny_recipe, tmp_path_factory):
    """20 updates of four rows, a checkpoint in the middle, the weights averaged, all in float32."""
    mapping = yaml.safe_load(tiny_recipe.read_text())
    mapping["data"]["rows"] = 4
    mapping["train"] |= {"steps": 20, "timeout": 60, "ema": 0.9, "precision": "fp32"}
    mapping["checkpoint"] = {"every": 10, "keep": 3, "log_every": 1}
    path = tmp_path_factory.mktemp("shared") / "shared.yaml"
    path.write_text(yaml.safe_dump(mapping))
    return path


@pytest.fixture(scope="module")
def on_the_cpu():
    """Two ranks would want two GPUs: here they meet on the CPU, whatever the machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the ranks
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def alone(shared_recipe, on_the_cpu, tmp_path_factory):
    """The run of that recipe by one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert train(recipe.load(ModelRecipe, shared_recipe), run)
    return run


class PixelFeatures:
    """Stands in for the network that judges pictures: the picture at 4x4 pixels."""

    width = 48
    protocol: ClassVar = {"evaluator": "pixels"}

    def __call__(self, pictures):
        small = [torch.tensor(list(p.resize((4, 4)).tobytes())).float() for p in pictures]
        return torch.stack(small) / 255


@pytest.fixture
def pixel_features(monkeypatch, tmp_path):
    """Judges by `PixelFeatures`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(drawn, "EfficientNetLite0", PixelFeatures)


@pytest.fixture
def interrupted():
    """A context in which Ctrl-C comes right after an update of a kind of trainer."""

    @contextmanager
    def at(trainer, step):
        update = trainer.update

        def interrupting(self):
            done = update(self)
            if self.step == step:
                os.kill(os.getpid(), signal.SIGINT)
            return done

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trainer, "update", interrupting)
            yield

    return at


@pytest.fixture(scope="session")
def backbone(tmp_path_factory):
    """A tiny network to judge by, as transformers saves it."""
    from transformers import ResNetConfig, ResNetModel

    folder = tmp_path_factory.mktemp("backbone")
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def image_recipe_file(tmp_path):
    """The file of a recipe of an image tokeniser on nine pictures without captions."""
    (tmp_path / "pictures").mkdir()
    for i in range(9):
        Image.new("RGB", (30, 20), (20 * i, 0, 0)).save(tmp_path / "pictures" / f"{i}.png")
    shape = {"image_size": 16, "latent_channels": 4, "widths": [8, 16], "blocks": 1}
    mapping = {
        "kind": "image",
        "tokenizer": {"autoencoder": shape, "num_timesteps": 3, "codebook_size": 16},
        "data": {"sources": {"p": {"type": "folder", "path": str(tmp_path / "pictures")}}},
        "train": {"batch_size": 4, "codebook_batch": 8, "threads": 1},
    }
    path = tmp_path / "images.yaml"
    path.write_text(yaml.safe_dump(mapping))
    return path


@pytest.fixture(scope="session")
def published(tmp_path_factory):
    """Tiny autoencoders as diffusers saves them, by class."""
    from diffusers import AutoencoderDC, AutoencoderKL

    torch.manual_seed(0)
    made = {"AutoencoderKL": AutoencoderKL(**KL), "AutoencoderDC": AutoencoderDC(**DC)}
    folder = tmp_path_factory.mktemp("published")
    for name, model in made.items():
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture
def recipe_from(tiny_recipe, tmp_path):
    """Makes the file of a recipe that begins with `origin`, and leaves out what is given by it."""

    def make(origin, **model):
        mapping = yaml.safe_load(tiny_recipe.read_text())
        del mapping["tokenizers"]["text"]
        mapping["model"] = {"init_from": str(origin), **model}
        mapping["train"]["steps"] = 4
        mapping["checkpoint"] = {"every": 2, "keep": 9, "log_every": 1}
        path = tmp_path / "from.yaml"
        path.write_text(yaml.safe_dump(mapping))
        return path

    return make


@pytest.fixture(scope="session")
def peer_mapping(tiny_tokenizers):
    """A recipe of peers for pictures of 2x2 positions, as plain mappings."""
    size = {"layers": 2, "width": 32, "heads": 2, "ffn": 48, "batch_size": 4, "lrs": [0.01]}
    return {
        "kind": "peers",
        "tokenizers": {t: str(tiny_tokenizers / t) for t in ("image", "text")},
        "budget": {"flops": 2e7, "search_flops": 1e7, "points": 2},
        "equal": {"tolerance": 9.0, "levels": 4, "threads": 1},
        "checkpoint": {"every": 2, "keep": 1, "log_every": 1},
        "judging": {"concepts": 5, "guidance_scales": [2.0], "repeats": 1, "speed_batches": [2]},
        **{name: dict(size) for name in ("ours", "masked", "raster", "scales")},
        "flow": {**size, "ffn": 128, "steps": [3, 2]},
        "masked": {**size, "steps": [3]},
        "transfusion": {**size, "steps": [2]},
        "causal_flow": {**size, "steps": [2]},
    }


@pytest.fixture(scope="session")
def peer_recipe(peer_mapping):
    from mmrdpm.bench.peers.protocol import PeerBench

    return recipe.from_dict(PeerBench, peer_mapping, "tiny")


@pytest.fixture(scope="session")
def peer_scene(peer_recipe):
    from mmrdpm.bench.peers.protocol import Scene

    return Scene(peer_recipe)


@pytest.fixture(scope="session")
def build_peer(peer_recipe, peer_scene, tmp_path_factory):
    """Makes a peer by its name."""
    from mmrdpm.bench.peers.peers import make

    folder = tmp_path_factory.mktemp("codes")

    def built(name):
        torch.manual_seed(0)
        peer = make(name, peer_recipe, peer_scene, folder)
        for parameter in peer.parameters():  # zeros would hide mistakes
            if parameter.requires_grad and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
        return peer

    return built
