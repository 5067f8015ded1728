"""Every shipped recipe and suite fits its schema, and says in its header how to run it."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from mmrdpm import hub, recipe, shipped
from mmrdpm.api import build
from mmrdpm.data import sources
from mmrdpm.errors import MmrdpmError
from mmrdpm.evaluation import suite
from mmrdpm.language_model import LanguageModel
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.plan import make_plan
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer
from mmrdpm.train_tokenizer import ImageTokenizerRecipe, TextTokenizerRecipe, train_image
from mmrdpm.vocabulary import Vocabulary

SCHEMAS = {"image": ImageTokenizerRecipe, "text": TextTokenizerRecipe, "model": ModelRecipe}
DOCS = Path(__file__).parent.parent / "docs"
RECIPES = sorted(shipped.folder("recipes").glob("*.yaml"))
SUITES = sorted(shipped.folder("eval").glob("*.yaml"))
OWN, PUBLISHED = "tokenizer_256_f16", "tokenizer_published_256"
LARGE = [p for p in RECIPES if p.stem.startswith(("imagenet256", "t2i", "unified"))]
TEXT_IDS = {  # of the published tokenizers
    "emoji-bpe-4k": 4096,
    "HuggingFaceTB/SmolLM2-135M": 49_152,
    "Qwen/Qwen3-8B-Base": 151_669,
}
MILLIONS = {  # what the names promise, embeddings included
    "imagenet256_b": 91,
    "imagenet256_l": 317,
    "imagenet256_xl": 566,
    "t2i_256": 809,
    "unified_1b": 1053,
    "unified_1b_512": 1053,
    "unified_7b": 8222,
}
QWEN3_8B_BASE = {  # the published config.json
    "model_type": "qwen3",
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
SD_VAE_FT_MSE = {  # the same of stabilityai/sd-vae-ft-mse
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_shipped_recipe_fits_its_schema(path):
    loaded = recipe.load(SCHEMAS[recipe.read(path)["kind"]], path)
    assert recipe.from_dict(type(loaded), recipe.to_dict(loaded), "again") == loaded
    header = path.read_text().split("kind:")[0]
    assert f"recipes/{path.name}" in header and "Hardware:" in header
    if isinstance(loaded, ModelRecipe) and path not in LARGE:
        shipped.resolve("tokenizers", loaded.tokenizers.image)
        shipped.resolve("tokenizers", loaded.tokenizers.text)


@pytest.mark.parametrize("path", SUITES, ids=lambda p: p.stem)
def test_a_shipped_suite_fits_its_schema(path):
    assert f"--suite {path.stem}" in path.read_text().split("kind:")[0]
    suite.load(path)


def test_shipped_things_are_found_by_name_and_by_path():
    by_name = shipped.resolve("recipes", "emoji_cpu")
    assert by_name == shipped.resolve("recipes", "recipes/emoji_cpu.yaml").resolve()
    with pytest.raises(MmrdpmError, match="did you mean emoji_cpu"):
        shipped.resolve("recipes", "emoji_cpv")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """In the hub's place: text tokenizers with as many ids as the published ones."""

    def fetch(name, files):
        folder = tmp_path / name
        if not folder.is_dir():
            folder.mkdir(parents=True)
            letters = sorted(pre_tokenizers.ByteLevel.alphabet())
            fillers = [f"<{i}>" for i in range(TEXT_IDS[name] - len(letters))]
            vocabulary = {token: i for i, token in enumerate([*letters, *fillers])}
            model = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
            model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            model.decoder = decoders.ByteLevel()
            model.save(str(folder / "tokenizer.json"))
        return folder

    monkeypatch.setattr(hub, "fetch", fetch)


def image_recipe(name, *overrides):
    return recipe.load(ImageTokenizerRecipe, shipped.resolve("recipes", name), overrides)


def bare(config):
    """A tokeniser without memory, and the parameters of its autoencoder in millions."""
    with torch.device("meta"):
        made = ImageTokenizer(config)
    return made, sum(p.numel() for p in made.autoencoder.parameters()) / 1e6


def test_the_image_tokenisers_are_of_the_size_that_the_docs_say():
    table = (DOCS / "tokenizers.md").read_text()
    own, millions = bare(image_recipe(OWN).tokenizer)
    assert f"{OWN}.yaml` | our own, 256 pixels, f=16, K=4096, T=10, {millions:.0f}M para" in table
    assert (own.grid, own.codebook_size, own.num_timesteps) == ((16, 16), 4096, 10)
    config = image_recipe(PUBLISHED).tokenizer
    filled = replace(config.autoencoder, architecture=json.dumps(SD_VAE_FT_MSE))
    theirs, millions = bare(replace(config, autoencoder=filled))
    assert f"{PUBLISHED}.yaml` | published, frozen, 256 pixels, f=8, K=4096, T=10 |" in table
    assert (theirs.grid, theirs.latent_channels) == ((32, 32), 4) and f"{millions:.1f}" == "83.7"


def shrunk(path, tmp_path, *keys):
    """The recipe of an image tokeniser on the few pictures of a test."""
    small = ("batch_size=4", "codebook_batch=8", "statistics_images=8", "threads=1")
    return image_recipe(
        path,
        f"data.sources.pictures.path={tmp_path / 'pictures'}",
        "data.workers=0",
        "checkpoint.log_every=1",
        *(f"train.{key}" for key in small),
        *keys,
    )


def test_the_recipe_on_a_published_autoencoder_trains_on_a_tiny_one(
    published, image_recipe_file, tmp_path
):
    tiny = shrunk(
        PUBLISHED,
        tmp_path,
        f"tokenizer.autoencoder.diffusers={published / 'AutoencoderKL'}",
        "tokenizer.autoencoder.image_size=16",
        "train.steps=3",
    )
    assert train_image(tiny, tmp_path / "run")
    made = image_tokenizer.load(tmp_path / "run")
    assert (made.grid, made.codebook_size, made.num_timesteps) == ((8, 8), 4096, 10)
    logged = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert ["loss/codebook" in json.loads(line) for line in logged] == [True] * 3


def test_the_recipe_of_our_own_autoencoder_trains_small_through_all_its_losses(
    backbone, image_recipe_file, tmp_path
):
    shape = ("image_size=32", "widths=[8,8,16]", "blocks=1")
    how = ("steps=10", f"loss.backbone={backbone}", "loss.adversarial_start=2")
    tiny = shrunk(
        OWN,
        tmp_path,
        *(f"tokenizer.autoencoder.{key}" for key in shape),
        *(f"train.{key}" for key in how),
    )
    assert train_image(tiny, tmp_path / "run")
    made = image_tokenizer.load(tmp_path / "run")
    assert (made.grid, made.codebook_size, made.num_timesteps) == ((2, 2), 4096, 10)
    logged = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    named = [{name for name in json.loads(line) if name.startswith("loss/")} for line in logged]
    judged = {"loss/pixels", "loss/perceptual"}
    against = {f"loss/{name}" for name in ("adversarial", "adaptive_weight", "discriminator")}
    first, whole = ({"loss/autoencoder"} | judged, {"loss/autoencoder"} | judged | against)
    last = {"loss/decoder"} | judged | against
    assert named == [first] * 2 + [whole] * 5 + [{"loss/codebook"}] + [last] * 2


@pytest.mark.parametrize("path", LARGE, ids=lambda p: p.stem)
def test_the_size_of_a_large_model(path):
    loaded = recipe.load(ModelRecipe, path)
    with torch.device("meta"):
        images = ImageTokenizer(image_recipe(OWN).tokenizer)
        model = build(loaded.model, Vocabulary(TEXT_IDS[loaded.tokenizers.text], 4096), images)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(
        MILLIONS[path.stem], abs=0.5
    )


def planned(path, tmp_path):
    """The plan for the GPUs that the header names, on the recipe of a tokeniser as it says."""
    spec, header = shipped.resolve("recipes", OWN), path.read_text().split("kind:")[0]
    if made := re.search(rf"sed 's/(.+)/(.+)/' recipes/{OWN}\.yaml > (\S+)", header):
        before, after, name = made.groups()
        text, spec = spec.read_text(), tmp_path / name
        assert text.count(before) == 1
        spec.write_text(text.replace(before, after))
    assert f" tokenizers.image={spec.name}" in header
    loaded = recipe.load(ModelRecipe, path, [f"tokenizers.image={spec}"])
    return make_plan(loaded, promised(path)[0], "h100")


def promised(path):
    """GPUs, hours and GB in the header."""
    header = " ".join(path.read_text().split("kind:")[0].replace("#", "").split())
    found = re.search(r"Hardware: (\d+) H100 .*?; (\d+) hours, (\d+) GB each", header)
    gpus, hours, gigabytes = (int(number) for number in found.groups())
    assert f"mmrdpm plan recipes/{path.name} --gpus {gpus} --kind h100" in header
    assert "Expected, not measured:" in header
    return gpus, hours, gigabytes


def test_a_plan_without_the_tokenizer_says_what_to_give():
    with pytest.raises(MmrdpmError, match=r"no-such-one: no such path.*tokenizers\.image=RECIPE"):
        path = shipped.resolve("recipes", "imagenet256_b")
        make_plan(recipe.load(ModelRecipe, path, ["tokenizers.image=no-such-one"]), 8, "h100")


@pytest.mark.parametrize("path", LARGE, ids=lambda p: p.stem)
def test_a_large_recipe_runs_dry_as_its_header_says(path, offline, tmp_path):
    plan, (_, hours, gigabytes) = planned(path, tmp_path), promised(path)
    assert plan.tokens_per_image == (10_240 if "512" in path.stem else 2560)
    assert plan.hours == pytest.approx(hours, rel=0.02, abs=0.6) and plan.fits
    assert plan.peak / 1e9 == pytest.approx(gigabytes, rel=0.02)
    row = re.search(rf"\| `{path.stem}` \|.*", (DOCS / "scaling.md").read_text())[0]
    one_after_the_other = plan.hours + plan.exchanged / 50e9 * plan.recipe.train.steps / 3600
    assert row.endswith(f"| {plan.exchanged / 1e9:.1f} | {one_after_the_other:.0f} |")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_command_in_a_header_is_whole(path):
    """Nothing is left out, and ranks of several nodes are told how to find each other."""
    commands = path.read_text().split("kind:")[0].replace("\\\n#", "").splitlines()
    commands = [line for line in commands if line.startswith("#   ")]
    assert commands and not any("..." in line for line in commands)
    for line in commands:
        assert "--rdzv-backend c10d --rdzv-endpoint" in line or "--nnodes" not in line


@pytest.mark.parametrize("path", LARGE, ids=lambda p: p.stem)
def test_a_large_recipe_names_sources_as_they_are_opened(path, monkeypatch):
    opened = []
    monkeypatch.setattr(sources, "_open", lambda config, _: opened.append(config))
    data = recipe.load(ModelRecipe, path).data
    for name, source in data.sources.items():
        sources.open_source(name, source)
    assert len(opened) == len(data.sources) > 0
    # six documents of an image, at least, fit into a row
    positions = 1024 if "512" in path.stem else 256
    longest = data.max_caption_tokens + positions * data.steps_per_image
    assert data.seq_len >= 6 * longest


def test_a_large_recipe_takes_a_latent_cache_in_place_of_its_source():
    cached = "data.sources={pairs: {type: cache, path: cache/pairs}}"
    loaded = recipe.load(ModelRecipe, shipped.resolve("recipes", "imagenet256_b"), [cached])
    assert loaded.data.sources["pairs"].type == "cache"


def test_the_losses_at_the_start_in_headers_are_of_the_codes():
    size = image_recipe(OWN).tokenizer.codebook_size
    for path in (path for path in LARGE if path.stem != "unified_1b_512"):  # which goes on
        header = path.read_text().split("kind:")[0]
        stated = re.search(r"([\d.]+) nats \(ln of ([\d,]+) codes\)", header)
        assert int(stated[2].replace(",", "")) == size
        assert float(stated[1]) == round(math.log(size), 1)


def test_a_run_that_goes_on_at_another_size_has_the_shape_of_the_first():
    first, second = (
        recipe.load(ModelRecipe, shipped.resolve("recipes", name))
        for name in ("unified_1b", "unified_1b_512")
    )
    assert second.model.init_from == "runs/unified_1b"
    assert recipe.to_dict(first.model) | {"init_from": "runs/unified_1b"} == recipe.to_dict(
        second.model
    )
    assert first.tokenizers.text == second.tokenizers.text


def test_the_recipe_from_a_language_model_has_its_shape(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B_BASE))
    expected = recipe.to_dict(LanguageModel(tmp_path).config)
    loaded = recipe.load(ModelRecipe, shipped.resolve("recipes", "unified_7b"))
    assert recipe.to_dict(loaded.model) == {**expected, "init_from": "Qwen/Qwen3-8B-Base"}
    assert loaded.tokenizers.text == loaded.model.init_from
