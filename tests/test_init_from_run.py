"""`model.init_from`: the weights of an earlier run."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

import mmrdpm
from mmrdpm import checkpoint, pretrained, recipe, weights
from mmrdpm.cli import main
from mmrdpm.errors import CheckpointError, RecipeError
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.plan import make_plan
from mmrdpm.train_model import Trainer, train


def test_an_earlier_run_gives_shape_text_tokenizer_and_weights(tiny_run, tmp_path, recipe_from):
    path = recipe_from(tiny_run)
    loaded = pretrained.complete(recipe.load(ModelRecipe, path))
    assert (loaded.model.width, loaded.model.layers, loaded.model.norm_inputs) == (32, 2, True)
    trainer = Trainer(loaded, tmp_path / "run")
    old = mmrdpm.load(tiny_run).transformer.state_dict()
    for name, parameter in trainer.transformer.named_parameters():
        assert torch.equal(parameter, old[name]), name


def test_a_text_tokenizer_left_out_is_that_of_the_origin_else_the_shipped_one(
    tiny_run, recipe_from
):
    path = recipe_from(tiny_run)
    assert recipe.load(ModelRecipe, path, ["model={}"]).tokenizers.text == "emoji-bpe-4k"
    bare = recipe.load(ModelRecipe, path)
    named = pretrained.complete(bare)
    shaped = replace(bare, model=named.model)
    sizes = {make_plan(r, 1, "cpu").parameters for r in (bare, shaped, named)}
    assert len(sizes) == 1


def test_only_the_way_in_for_images_is_drawn_anew(tiny_run, tmp_path, recipe_from):
    path = recipe_from(tiny_run, sees_start_noise=False)
    trainer = Trainer(pretrained.complete(recipe.load(ModelRecipe, path)), tmp_path / "run")
    assert trainer.describe().endswith("drawn anew: from_latents.weight")
    old = mmrdpm.load(tiny_run).transformer.state_dict()
    assert torch.equal(trainer.transformer.table.weight, old["table.weight"])


def test_scores_by_the_codes_geometry_can_be_added_but_not_lost(tiny_run, tmp_path, recipe_from):
    loaded = recipe.load(ModelRecipe, recipe_from(tiny_run, code_geometry=True))
    trainer = Trainer(pretrained.complete(loaded), tmp_path / "run")
    assert trainer.describe().endswith("drawn anew: from_codes.weight")
    assert train(loaded, tmp_path / "run")
    without = recipe.load(ModelRecipe, recipe_from(tmp_path / "run"))
    with pytest.raises(RecipeError, match=r"model\.code_geometry=true: write the same"):
        pretrained.complete(without)


def test_an_earlier_run_goes_on_with_larger_pictures(
    tiny_run, tiny_tokenizers, tmp_path, capsys, recipe_from
):
    """The same tokeniser on twice the side: 4x4 positions instead of 2x2."""
    larger = shutil.copytree(tiny_tokenizers / "image", tmp_path / "larger")
    spec = larger / "tokenizer.yaml"
    spec.write_text(spec.read_text().replace("image_size: 16", "image_size: 32"))
    path, run = recipe_from(tiny_run), tmp_path / "run"
    command = ["train", str(path), f"tokenizers.image={larger}", "--run", str(run)]
    assert main(command) == 0
    assert "drawn anew" not in capsys.readouterr().err
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss/text"]
    before = (tiny_run / "metrics.jsonl").read_text().splitlines()
    assert first < json.loads(before[0])["loss/text"]  # what was learned is there
    assert mmrdpm.load(run).generate(["red heart"])[0].size == (32, 32)


def test_an_earlier_run_with_another_vocabulary_is_refused(
    tiny_run, tiny_tokenizers, tmp_path, recipe_from
):
    shutil.copytree(tiny_tokenizers / "image", tmp_path / "image")
    spec = tmp_path / "image" / "tokenizer.yaml"
    spec.write_text(spec.read_text().replace("codebook_size: 16", "codebook_size: 15"))
    held = tmp_path / "image" / "tokenizer.safetensors"
    tensors, _ = weights.load(held)
    tensors["codebook.codes"] = tensors["codebook.codes"][..., :15, :].clone()
    weights.save(tensors, held)
    path = recipe_from(tiny_run)
    loaded = recipe.load(ModelRecipe, path, [f"tokenizers.image={tmp_path / 'image'}"])
    with pytest.raises(CheckpointError, match=r"320 text ids and 16 .* 320 and 15"):
        train(loaded, tmp_path / "run")


def test_all_of_a_run_that_goes_on_meanwhile_is_of_one_checkpoint(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    model = mmrdpm.load(run)
    origin, old = pretrained.Run(run), model.transformer.table.weight.cpu().clone()
    origin.check(model.vocabulary)
    tensors, metadata = weights.load(checkpoint.newest(run))
    later = {name: tensor + 1 for name, tensor in tensors.items()}
    weights.save(later, run / "step-9000000.safetensors", metadata)
    assert torch.equal(origin.tensor("table.weight", old.shape, model.vocabulary), old)


def test_an_earlier_run_attends_as_it_learned_to(tiny_run, recipe_from):
    path = recipe_from(tiny_run, history=True)
    with pytest.raises(RecipeError, match=r"trained with model\.history=false: write the same"):
        pretrained.complete(recipe.load(ModelRecipe, path))
