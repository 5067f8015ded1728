"""Guesses of the latent and the residual, scores that begin from them, and soft labels."""

import math
from dataclasses import replace

import pytest
import torch

import mmrdpm
from mmrdpm import recipe
from mmrdpm.data.loader import Loader
from mmrdpm.data.plan import DataPlan
from mmrdpm.document import NO_TARGET, ImageSegment, TextSegment, pack
from mmrdpm.errors import RecipeError
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.objective import loss
from mmrdpm.plan import make_plan
from mmrdpm.positions import sinusoids
from mmrdpm.pretrained import complete
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.rdpm.codebook import Codebook, CodebookFit
from mmrdpm.rdpm.estimates import coefficients, estimates
from mmrdpm.rdpm.schedule import Schedule
from mmrdpm.rdpm.trajectory import make_trajectory, walk
from mmrdpm.sampling.image import Guided, Request, sample_images
from mmrdpm.sampling.text import text_log_likelihood
from mmrdpm.sweep.information import information
from mmrdpm.text_tokenizer import load as load_text
from mmrdpm.train_model import Trainer, train
from mmrdpm.transformer import Transformer, TransformerConfig
from mmrdpm.vocabulary import Vocabulary

V = Vocabulary(text_size=10, codebook_size=8)
ON = {"code_geometry": True, "preconditioning": True, "places": True}
SHAPE = {"layers": 2, "width": 64, "heads": 2, "kv_heads": 1, "ffn": 48}
KINDS = [("path", 0.0), ("injected", 0.0), ("residual", 0.0), ("ancestral", 0.3)]


def trajectory_of(kind, eta, schedule="cosine", steps=4):
    return make_trajectory(kind, Schedule(schedule, steps), eta)


@pytest.fixture
def images(tiny_tokenizers):
    return image_tokenizer.load(tiny_tokenizers / "image")


def make_model(images, std=0.2, **variant):
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**SHAPE, **{**ON, **variant}), V.size + 8, 4, 3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    model.know_codes(images.codebook.codes, images.estimates(True))
    return model


def rows_of(states, timesteps, seq_len=32):
    codes = torch.zeros(3, 2, 2, dtype=torch.int64)
    prompt = TextSegment((V.bos, 3, V.image_start))
    return pack([[[prompt, ImageSegment(codes, states, timesteps)]]], seq_len, V, 4)


def test_coefficients_of_each_residual_by_hand():
    linear = Schedule("linear", 4)  # alpha_t = 1 - t / 4, sigma_t = t / 4
    assert coefficients(make_trajectory("path", linear), 3) == (0.5, -1, 0.5, 0)
    assert coefficients(make_trajectory("injected", linear), 3) == (0.5, -0.5, 0, 0.25)
    assert coefficients(make_trajectory("residual", linear), 3) == (1, -1, 0, 0)
    # DDIM from (0.25, 0.75) to (0.5, 0.5): 0.5 z + (x - 0.25 z) * 2 / 3 - x
    found = coefficients(make_trajectory("ancestral", linear, 0.0), 3)
    assert found == pytest.approx((1 / 3, -1 / 3, 0, 0))


@pytest.mark.parametrize("sees", [True, False])
@pytest.mark.parametrize(("kind", "eta"), KINDS)
def test_guesses_are_the_best_that_are_linear(kind, eta, sees):
    """Against least squares over walks of normal latents by a codebook that was fitted to them."""
    torch.manual_seed(0)
    trajectory, generator = trajectory_of(kind, eta), torch.Generator().manual_seed(0)
    codebook = Codebook(4, 16, 4)  # coarse: codes are far shorter than residuals
    fit = CodebookFit(codebook)
    shape = (trajectory.num_noises, 3000, 4)
    for _ in range(30):
        latents, noise = torch.randn(shape[1:]), torch.randn(shape)
        state = trajectory.start(noise)
        for timestep in range(4, 0, -1):
            residual = trajectory.residual(latents, noise, state, timestep)
            state = state + fit.observe(residual, timestep, generator)
    table = estimates(trajectory, codebook, sees)
    assert sees or not table[..., 1].any()
    latents, noise = torch.randn(shape[1:]), torch.randn(shape)
    start = trajectory.start(noise).flatten()
    for timestep, state, residual, _ in walk(trajectory, codebook, latents, noise):
        if timestep == 4:
            assert not table[4, 0].any()  # nothing tells of the latent
        seen = torch.stack([state.flatten(), start if sees else torch.zeros_like(start)], 1)
        wanted = [latents.flatten(), residual.flatten() / codebook.gains[timestep - 1]]
        for guess, true in zip(table[timestep], wanted, strict=True):
            solved = torch.linalg.lstsq(seen, true[:, None], driver="gelsd").solution[:, 0]
            best = (true - seen @ solved).square().mean()
            assert (true - seen @ guess).square().mean() < 1.05 * best


def test_before_the_first_code_nothing_shows_but_the_scores_know_the_noise(images):
    model, states = make_model(images), torch.randn(4, 2, 2, 4)
    other = states.clone()
    other[3] = torch.randn(2, 2, 4)
    one, two = (model(rows_of(s, (3,)))[0, 3:7] for s in (states, other))
    assert torch.equal(one[:, :64], two[:, :64])
    assert (model.logits(one) - model.logits(two)).abs().max() > 0.1


def test_guesses_follow_from_the_codes_while_a_model_is_built_elsewhere(images):
    made = image_tokenizer.ImageTokenizer(images.config)  # in memory, not loaded
    made.load_state_dict(images.state_dict())
    with torch.device("meta"):
        found = made.estimates(True)
    assert torch.equal(found, estimates(images.trajectory, images.codebook, True))


def test_codes_are_normally_distributed_about_the_guess(images):
    model, codes = make_model(images), images.codebook.codes[0]
    for name, parameter in model.named_parameters():
        if name.startswith(("table", "from_codes", "precision.")):
            parameter.data.zero_()
    model.precisions.weight.data.fill_(math.log(1.7))
    states = torch.randn(4, 2, 2, 4)
    hidden = model(rows_of(states, (2,)))[0]
    log_p = model.logits(hidden[3:7])[:, -16:].log_softmax(-1)
    weights = images.estimates(True)[2, 1]
    guess = (weights[0] * states[2] + weights[1] * states[3]).view(4, 1, 4)
    wanted = torch.distributions.Normal(guess, 1.7**-0.5).log_prob(codes).sum(-1).log_softmax(-1)
    torch.testing.assert_close(log_p, wanted, atol=1e-4, rtol=1e-4)
    assert not hidden[:3, 64:].any()  # text has no guess
    some = slice(V.text_size, len(model.table.weight) - 5)
    torch.testing.assert_close(model.logits(hidden, some), model.logits(hidden)[:, some])
    assert model.logits(hidden, slice(5)).shape == (32, 5)


def test_a_preconditioned_model_can_be_blind_to_the_start_noise(images):
    model = make_model(images, sees_start_noise=False)
    model.know_codes(images.codebook.codes, images.estimates(sees_start_noise=False))
    states = torch.randn(4, 2, 2, 4)
    other = states.clone()
    other[3] = torch.randn(2, 2, 4)
    scores = [model.logits(model(rows_of(s, (2,)))[0, 3:7]) for s in (states, other)]
    assert torch.equal(*scores)


def test_sinusoids_tell_places_apart():
    places = torch.cartesian_prod(torch.arange(8), torch.arange(8))
    found = sinusoids(places[None], 66)[0]
    assert found.shape == (64, 66) and not found[:, 64:].any()
    torch.testing.assert_close(found.square().sum(1), torch.full((64,), 64.0))
    distance = torch.cdist(found, found) + 100 * torch.eye(64)
    assert distance.min() > 1


def test_drawing_equals_a_whole_forward_pass_at_every_step(tiny_tokenizers, images):
    vocabulary = Vocabulary(text_size=10, codebook_size=16)
    model = make_model(images, std=0.12)
    how, prompt = Guided(0.0, guidance_scale=1.0), (vocabulary.bos, 3, 4, vocabulary.image_start)
    states = sample_images(model, images, vocabulary, [Request((3, 4), 7)], how)[:, 0]
    for timestep in (3, 2, 1):
        segment = ImageSegment(torch.zeros(3, 2, 2, dtype=torch.int64), states, (timestep,))
        row = pack([[[TextSegment(prompt), segment]]], 8, vocabulary, 4)
        codes = model.logits(model(row))[0, -4:, vocabulary.code_offset :].argmax(-1)
        step = images.codebook.lookup(codes.view(2, 2), timestep)
        torch.testing.assert_close(states[timestep - 1], states[timestep] + step)


def test_what_is_packed_is_what_the_target_is_nearest_to(tiny_tokenizers, images):
    texts = load_text(tiny_tokenizers / "text")
    vocabulary = Vocabulary(texts.size, 16)
    plan = DataPlan(rows=2, seq_len=96, steps_per_image=2)
    packed = Loader(plan, 0, images, texts, vocabulary).batch()
    learned = (packed.targets != NO_TARGET) & (packed.timesteps > 0)
    nearest = torch.cdist(packed.residuals[learned], images.codebook.codes[0]).argmin(-1)
    assert torch.equal(nearest + vocabulary.code_offset, packed.targets[learned])
    assert not packed.residuals[packed.timesteps <= 0].any()


def test_soft_labels_written_out(images):
    model, generator = make_model(images), torch.Generator().manual_seed(1)
    residuals = torch.randn(3, 2, 2, 4, generator=generator)
    states = torch.randn(4, 2, 2, 4, generator=generator)
    codes, tau = images.codebook.codes[0], 0.8
    nearest = torch.cdist(residuals.view(-1, 4), codes).argmin(-1).view(3, 2, 2)
    segment = ImageSegment(nearest, states, (3, 1), residuals=residuals)
    v = Vocabulary(text_size=10, codebook_size=16)
    row = pack([[[TextSegment((v.bos, 3, v.image_start)), segment]]], 12, v, 4)
    log_p = model.logits(model(row))[0].log_softmax(-1)
    text = -log_p[[0, 1], [3, v.image_start]].sum()
    near = residuals[[2, 0]].view(8, 1, 4)
    wanted = (-(near - codes).square().sum(-1) / tau).softmax(-1)
    soft = -(wanted * log_p[3:11, v.code_offset :]).sum()
    found = loss(model, row, text_weight=0.5, soft_labels=tau)
    torch.testing.assert_close(found.total, (0.5 * text + soft) / (0.5 * 2 + 8))
    hard = loss(model, row, text_weight=0.5)
    assert torch.equal(found.per_token, hard.per_token)
    near_hard = loss(model, row, text_weight=0.5, soft_labels=1e-6)
    torch.testing.assert_close(near_hard.total, hard.total)
    assert abs(found.total - hard.total) > 0.01


def test_codes_apart_are_scored_among_themselves_and_text_among_the_rest(images):
    """A softmax over the whole, written out, of which each keeps its own part."""
    model, generator = make_model(images), torch.Generator().manual_seed(1)
    residuals = torch.randn(3, 2, 2, 4, generator=generator)
    codes = torch.cdist(residuals.view(-1, 4), images.codebook.codes[0]).argmin(-1).view(3, 2, 2)
    states = torch.randn(4, 2, 2, 4, generator=generator)
    segment = ImageSegment(codes, states, (3, 1), residuals=residuals)
    v = Vocabulary(text_size=10, codebook_size=16)
    row = pack([[[TextSegment((v.bos, 3, v.image_start)), segment]]], 12, v, 4)
    logits = model.logits(model(row))[0]
    first = v.code_offset
    text = -logits[:2, :first].log_softmax(-1)[[0, 1], [3, v.image_start]]
    log_p = logits[3:11, first:].log_softmax(-1)
    exact = -log_p.gather(1, torch.cat([codes[2], codes[0]]).view(8, 1))[:, 0]
    near = torch.cat([residuals[2], residuals[0]]).view(8, 1, 4)
    wanted = (-(near - images.codebook.codes[0]).square().sum(-1) / 0.8).softmax(-1)
    found = loss(model, row, text_weight=0.5, soft_labels=0.8, codes_apart=True)
    total = (0.5 * text.sum() - (wanted * log_p).sum()) / (0.5 * 2 + 8)
    torch.testing.assert_close(found.total, total)
    torch.testing.assert_close(found.per_token, torch.cat([text, exact]))
    assert found.timesteps.tolist() == [-1] * 2 + [3] * 4 + [1] * 4
    hard = loss(model, row, z_weight=0.1, codes_apart=True)
    squared = sum(
        part.logsumexp(-1).square().sum() for part in (logits[3:11, first:], logits[:2, :first])
    )
    torch.testing.assert_close(hard.total, (exact.sum() + text.sum() + 0.1 * squared) / 10)


def test_text_is_judged_among_what_is_no_code(images):
    """As it is written: by codes apart the scores of codes at text positions are never learned."""
    model = make_model(images)
    v = Vocabulary(text_size=10, codebook_size=16)
    row = pack([[[TextSegment((v.bos, 3, 4, v.eos))]]], 4, v, 4)
    found = text_log_likelihood(model, row, 2)
    with torch.no_grad():
        among_all = model.logits(model(row))[0, 1:3].double().log_softmax(-1)
        model.table.weight[v.code_offset :] += 0.5
    assert text_log_likelihood(model, row, 2) == pytest.approx(found, abs=1e-6)
    assert found > among_all[[0, 1], [4, v.eos]].sum() + 0.1


@pytest.mark.parametrize("apart", [False, True])
def test_a_run_with_all_of_it_comes_back_and_keeps_it(tiny_recipe, tmp_path, apart):
    overrides = [f"model.{key}=true" for key in ON] + ["train.soft_labels=2.0"]
    overrides.append(f"train.codes_apart={str(apart).lower()}")
    loaded = recipe.load(ModelRecipe, tiny_recipe, overrides)
    assert train(loaded, tmp_path / "run")
    model = mmrdpm.load(tmp_path / "run")
    again = Trainer(loaded, tmp_path / "run")
    again.restore(tmp_path / "run" / "step-0000012.safetensors")
    assert model.transformer.precisions.weight.abs().max() > 0
    packed = again.loader.batch()
    device = again.transformer.table.weight.device
    learned, *_ = again.parallel.module(packed.to(device), torch.tensor(1.0, device=device))
    how = {"divisor": torch.tensor(1.0, device=device), "soft_labels": 2.0, "codes_apart": apart}
    soft = loss(again.transformer, packed.to(device), **how).total
    torch.testing.assert_close(learned, soft)
    one, two = (m(packed.to(m.table.weight.device)) for m in (model.transformer, again.transformer))
    torch.testing.assert_close(one, two)
    assert model.generate(["red heart"])[0].size == (16, 16)
    for key in ("preconditioning", "places"):
        changed = replace(loaded.model, init_from=str(tmp_path / "run"), **{key: False})
        with pytest.raises(RecipeError, match=rf"model\.{key}=true: write the same"):
            complete(replace(loaded, model=changed))


def test_what_does_not_go_together_is_refused(tiny_recipe, tiny_tokenizers, tmp_path):
    def refused(match, *overrides):
        with pytest.raises(RecipeError, match=match):
            recipe.load(ModelRecipe, tiny_recipe, list(overrides))

    refused("it needs code_geometry", "model.preconditioning=true")
    refused("needs norm_inputs", "model.places=true", "model.norm_inputs=false")
    refused("soft_labels compares codes by their vectors", "train.soft_labels=1.0")
    old = image_tokenizer.load(tiny_tokenizers / "image")
    per_step = image_tokenizer.ImageTokenizer(replace(old.config, per_step_codebook=True))
    per_step.save(tmp_path / "per-step")
    image = f"tokenizers.image={tmp_path / 'per-step'}"
    for key in ("train.soft_labels=1.0", "model.preconditioning=true"):
        overrides = [key, "model.code_geometry=true", image]
        with pytest.raises(RecipeError, match=rf"{key.split('=')[0]}: .* codebook for each"):
            Trainer(recipe.load(ModelRecipe, tiny_recipe, overrides), tmp_path / "run")


def test_plans_and_figures_of_codes_know_it(tiny_recipe, tmp_path):
    overrides = [f"model.{key}=true" for key in ON] + ["train.soft_labels=2.0", "train.steps=2"]
    together = [*overrides, "train.codes_apart=false"]
    loaded = recipe.load(ModelRecipe, tiny_recipe, together)
    assert train(loaded, tmp_path / "run")
    model = mmrdpm.load(tmp_path / "run")
    of_trainer = Trainer(loaded, tmp_path / "again").transformer.lengthening
    assert model.transformer.lengthening == of_trainer > 1
    parameters = sum(p.numel() for p in model.transformer.parameters())
    planned = make_plan(loaded, 1, "cpu")
    assert planned.parameters == parameters
    apart = make_plan(recipe.load(ModelRecipe, tiny_recipe, overrides), 1, "cpu")
    # two rows of four drawings, 2 x 4 codes and 12 of text each, and 16 of something shorter
    codes, text, size = 2 * 4 * 8, 2 * (4 * 11 + 15), model.vocabulary.size
    assert planned.memory["logits"] == 4 * (codes + text) * size
    assert apart.memory["logits"] == 4 * (codes * 16 + text * (size - 16))
    assert apart.flops < planned.flops
    found = information(model, batches=1, joint_steps=2, seed=0)
    assert len(found.marginal) == 3


def test_labels_cannot_be_soft_where_nobody_knows_the_residual(images):
    row = rows_of(torch.randn(4, 2, 2, 4), (2,))
    assert loss(make_model(images), row, soft_labels=1.0).total.isnan()
    assert loss(make_model(images), row).total.isfinite()


def test_a_run_that_saw_the_state_alone_learns_anew_what_comes_in(tiny_recipe, tmp_path):
    overrides = ["model.sees_start_noise=false", "model.code_geometry=true", "train.steps=2"]
    first = recipe.load(ModelRecipe, tiny_recipe, overrides)
    assert train(first, tmp_path / "run")
    on = {"preconditioning": True, "sees_start_noise": True, "init_from": str(tmp_path / "run")}
    loaded = replace(first, model=replace(first.model, **on))
    text = str(tmp_path / "run" / "tokenizers" / "text")
    loaded = replace(loaded, tokenizers=replace(loaded.tokenizers, text=text))
    trainer = Trainer(complete(loaded), tmp_path / "then")
    anew = trainer.describe().split("drawn anew: ")[1]
    assert anew == "from_latents.weight, precision.weight, precisions.weight"
