"""Scores of image codes by their vectors, and timesteps drawn by how far the path goes in them."""

import numpy as np
import pytest
import torch

import mmrdpm
from mmrdpm import recipe, text_tokenizer
from mmrdpm.data.documents import Drafter
from mmrdpm.data.plan import DataPlan
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.rdpm.schedule import Schedule
from mmrdpm.rdpm.trajectory import make_trajectory
from mmrdpm.train_model import Trainer, train
from mmrdpm.transformer import Transformer, TransformerConfig
from mmrdpm.vocabulary import Vocabulary

SHAPE = {"layers": 1, "width": 32, "heads": 2, "kv_heads": 1, "ffn": 16}


@pytest.fixture
def codes():
    return torch.randn(1, 7, 4, generator=torch.Generator().manual_seed(0))


ESTIMATES = torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(2))


def make(codes, **changes):
    torch.manual_seed(1)
    model = Transformer(TransformerConfig(**SHAPE, **changes), 20, 4, 3)
    model.know_codes(codes, ESTIMATES)
    return model


def test_it_starts_as_if_it_were_not_there(codes):
    hidden = torch.randn(5, 32)
    plain, geometric = make(codes), make(codes, code_geometry=True)
    geometric.table.load_state_dict(plain.table.state_dict())
    assert torch.equal(plain.logits(hidden), geometric.logits(hidden))


@pytest.mark.parametrize("tied", [True, False])
def test_scores_written_out(codes, tied):
    model = make(codes, code_geometry=True, tied=tied)
    torch.nn.init.normal_(model.from_codes.weight)
    rows = (model.table if tied else model.unembedding).weight
    hidden = torch.randn(5, 32)
    length = codes[0].square().sum(1)
    length = (length - length.mean()) / length.std(correction=0)
    wanted = hidden @ rows.T
    for k in range(7):
        seen = torch.cat([codes[0, k], length[k : k + 1]])
        wanted[:, 13 + k] += hidden @ (model.from_codes.weight @ seen)
    torch.testing.assert_close(model.logits(hidden), wanted)
    for ids in (slice(10), slice(13), slice(13, None), slice(15, 18), slice(9, 16)):
        torch.testing.assert_close(model.logits(hidden, ids), wanted[:, ids])


def test_a_code_that_few_tables_have_keeps_its_length(codes):
    small = codes.clone()
    small[0, 3:] = 0
    both, alone = (
        make(c, code_geometry=True).code_features for c in (torch.cat([codes, small]), codes)
    )
    torch.testing.assert_close(both, alone)


def test_a_run_with_it_comes_back_from_its_folder(tiny_recipe, tmp_path):
    loaded = recipe.load(
        ModelRecipe, tiny_recipe, ["model.code_geometry=true", "data.timesteps=path"]
    )
    assert train(loaded, tmp_path / "run")
    model = mmrdpm.load(tmp_path / "run").transformer
    again = Trainer(loaded, tmp_path / "run")
    again.restore(tmp_path / "run" / "step-0000012.safetensors")
    assert model.from_codes.weight.abs().max() > 0
    hidden = torch.randn(5, 32).to(model.table.weight.device)
    plain = torch.nn.functional.linear(hidden, model.table.weight)
    assert not torch.allclose(model.logits(hidden)[:, -16:], plain[:, -16:])
    torch.testing.assert_close(model.logits(hidden), again.transformer.logits(hidden))


def test_timesteps_are_drawn_as_far_as_the_path_goes(tiny_tokenizers):
    images = image_tokenizer.load(tiny_tokenizers / "image")
    images.trajectory = make_trajectory("path", Schedule("cubic", 3))
    texts = text_tokenizer.load(tiny_tokenizers / "text")
    vocabulary, random = Vocabulary(texts.size, 16), np.random.default_rng(0)
    found = {}
    for how in ("path", "alike"):
        drafter = Drafter(DataPlan(steps_per_image=1, timesteps=how), texts, vocabulary, images)
        drawn = [drafter._timesteps(random)[0] for _ in range(3000)]
        found[how] = np.bincount(drawn, minlength=4)[1:] / 3000
    # sigma is 0, 1/27, 8/27, 1
    wanted = 0.75 * np.array([1, 7, 19]) / 27 + 0.25 / 3
    assert found["path"] == pytest.approx(wanted, abs=0.03)
    assert found["alike"] == pytest.approx(np.full(3, 1 / 3), abs=0.03)
