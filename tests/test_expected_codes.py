"""Soft labels, the length of their mean, and steps that add it."""

import math
from dataclasses import replace

import pytest
import torch

import mmrdpm
from mmrdpm import machine, shipped
from mmrdpm.bench.peers.ours import Ours
from mmrdpm.data.emoji import load_emoji
from mmrdpm.data.emoji_stream import latents_of
from mmrdpm.document import ImageSegment, TextSegment, pack
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.rdpm.autoencoder import AutoencoderConfig
from mmrdpm.rdpm.codebook import Codebook
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from mmrdpm.rdpm.soft_labels import lengthening, softened
from mmrdpm.sampling.image import Guided, Request, sample_images
from mmrdpm.transformer import Transformer, TransformerConfig
from mmrdpm.vocabulary import Vocabulary

V = Vocabulary(text_size=20, codebook_size=8)
CAPTION = (3, 4, 5)


def make_pair(**tokenizer):
    torch.manual_seed(0)
    autoencoder = AutoencoderConfig(image_size=16, latent_channels=4, widths=(8, 16), blocks=1)
    config = ImageTokenizerConfig(autoencoder, num_timesteps=3, codebook_size=8, **tokenizer)
    images = ImageTokenizer(config).eval()
    images.codebook.codes.normal_(std=0.7)
    shape = TransformerConfig(layers=2, width=64, heads=2, kv_heads=1, ffn=48)
    model = Transformer(shape, V.size, 4, 3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.12)
    return model, images


@pytest.fixture
def pair():
    return make_pair()


@pytest.fixture(scope="module")
def emoji():
    """The shipped tokeniser, latents of training pictures, and their noise."""
    images = image_tokenizer.load(shipped.resolve("tokenizers", "emoji-rdpm-32"))
    data = load_emoji(images.image_size)
    latents = latents_of(images, replace(data, images=data.images[::40]))
    return images, latents, range(len(latents))


def draw(pair, *requests, labels=0.0, **how):
    model, tokenizer = pair
    model.lengthening = lengthening(tokenizer.codebook.codes[0], labels)
    how = Guided(**{"guidance_scale": 1.0, "expected_steps": 3, **how})
    return sample_images(model, tokenizer, V, requests or [Request(CAPTION, 7)], how)


def scores(model, states, timestep):
    """Of the codes at every position, by a whole forward pass: `[4, K]`."""
    segment = ImageSegment(torch.zeros(3, 2, 2, dtype=torch.int64), states, (timestep,))
    row = pack([[[TextSegment((V.bos, *CAPTION, V.image_start)), segment]]], 9, V, 4)
    return model.logits(model(row))[0, -4:, V.code_offset :]


def test_soft_labels_worked_by_hand():
    codes = torch.tensor([[1.0], [-1.0], [3.0]])
    found = softened(torch.tensor([[1.0], [0.0]]), codes, tau=2.0)
    by_hand = [[1, math.exp(-2), math.exp(-2)], [math.exp(-0.5), math.exp(-0.5), math.exp(-4.5)]]
    by_hand = torch.tensor(by_hand)
    torch.testing.assert_close(found, by_hand / by_hand.sum(1, keepdim=True))


def test_the_length_of_a_mean_worked_by_hand():
    # codes of mean square 1 leave no error: residuals are the codes, their means tanh(2 / tau)
    codes = torch.tensor([[1.0], [-1.0]])
    for tau in (0.5, 2.0, 8.0):
        assert lengthening(codes, tau) == pytest.approx(1 / math.tanh(2 / tau))
    assert lengthening(codes, 0.0) == 1.0
    assert lengthening(torch.zeros(4, 2), 2.0) == 0.0  # before the codes are fitted: a number


def test_the_length_of_a_mean_is_nearly_that_of_real_residuals(emoji):
    images, latents, seeds = emoji
    code_indices, states = images.encode_latents(latents, seeds)
    residuals, codes = images.residuals(latents, seeds, states), images.codebook.codes[0]
    means = softened(residuals, codes, 2.0) @ codes
    factor = (codes[code_indices] * means).sum() / means.square().sum()
    assert lengthening(codes, 2.0) == pytest.approx(factor.item(), rel=0.08)


def test_the_expected_code_of_a_sure_choice_is_that_code():
    codebook = Codebook(num_timesteps=2, size=3, dim=2)
    codebook.codes.copy_(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]]))
    codebook.gains.copy_(torch.tensor([1.0, 0.5]))
    chosen = torch.tensor([[2, 0], [1, 1]])
    sure = torch.nn.functional.one_hot(chosen, 3).float()
    assert torch.equal(codebook.expected(sure, 2), codebook.lookup(chosen, 2))
    mean = codebook.expected(torch.tensor([0.5, 0.25, 0.25]), 2)
    assert mean.tolist() == [0.5, 0.375]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        exact = codebook.expected(torch.full((3, 3), 1 / 3), 1)
    assert exact.dtype == torch.float32 and exact[0, 0].item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("labels", [0.0, 2.0])
@pytest.mark.parametrize("per_step", [False, True])
def test_the_last_steps_add_the_mean_code_of_a_whole_forward_pass(labels, per_step):
    model, tokenizer = pair = make_pair(per_step_codebook=per_step)
    labels = 0.0 if per_step else labels
    how = {"labels": labels, "temperature": 0.0, "top_k": 1, "expected_steps": 2}
    states = draw(pair, **how)[:, 0]
    assert torch.equal(states[-1], tokenizer.noise([7])[0, 0])
    length = lengthening(tokenizer.codebook.codes[0], labels)
    assert (length == 1) == (labels == 0)
    likeliest = tokenizer.codebook.lookup(scores(model, states, 3).argmax(-1), 3)
    torch.testing.assert_close(states[2] - states[3], likeliest.view(2, 2, 4))
    for timestep in (2, 1):  # temperature and top-k are of the codes that are drawn
        step = length * scores(model, states, timestep).softmax(-1)
        step = (step @ tokenizer.codebook.table(timestep)).view(2, 2, 4)
        moved = states[timestep - 1] - states[timestep]
        torch.testing.assert_close(moved, step, rtol=1e-4, atol=1e-5)


def test_only_codes_that_a_step_has_are_expected(pair):
    _, tokenizer = pair
    tokenizer.codebook.sizes = (8, 8, 1)
    states = draw(pair)[:, 0]
    only = tokenizer.codebook.lookup(torch.zeros(2, 2, dtype=torch.int64), 3)
    torch.testing.assert_close(states[2], states[3] + only)


def test_all_steps_can_be_expected_and_none(pair):
    all_, more, none = (draw(pair, expected_steps=n) for n in (3, 99, 0))
    assert torch.equal(all_, more) and not torch.equal(all_, none)
    how = Guided(guidance_scale=1.0)
    assert torch.equal(none, sample_images(*pair, V, [Request(CAPTION, 7)], how))


def test_an_image_is_the_same_to_the_bit_in_every_company(pair, monkeypatch):
    captions = [(3,), (4, 5), (1, 2, 3), (6,) * 20]
    requests = [Request(captions[0 if i < 16 else i % 4], i) for i in range(20)]
    how = {"labels": 2.0, "guidance_scale": 2.0, "expected_steps": 2}
    shapes, expected = set(), Codebook.expected
    monkeypatch.setattr(
        Codebook,
        "expected",
        lambda self, p, timestep: shapes.add(p.shape) or expected(self, p, timestep),
    )
    alone = [draw(pair, request, **how)[:, 0] for request in requests]
    together = draw(pair, *requests, **how).unbind(1)
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))
    assert shapes == {(1, 4, 8)}  # whatever a sum's order depends on, it is the same


def test_a_model_that_knows_the_residuals_moves_as_far_as_the_codes_and_ends_nearer(emoji):
    images, latents, seeds = emoji
    codebook, noise = images.codebook, images.noise(seeds)
    _, states = images.encode_latents(latents, seeds)
    length = lengthening(codebook.codes[0], 2.0)
    for timestep in range(images.num_timesteps, 0, -1):
        residual = images.trajectory.residual(latents, noise, states[timestep], timestep)
        labels = softened(residual / codebook.gains[timestep - 1], codebook.codes[0], 2.0)
        mean = length * codebook.expected(labels, timestep)
        moved = states[timestep - 1] - states[timestep]
        assert (mean * moved).sum() / mean.square().sum() == pytest.approx(1, abs=0.1)
    ended = states[1] + mean
    left, left_by_codes = ((latents - each).square().mean() for each in (ended, states[0]))
    assert left < 0.7 * left_by_codes


@pytest.fixture(scope="module")
def shipped_model():
    return mmrdpm.load("emoji-tiny")


def test_a_shipped_model_knows_how_soft_its_labels_were(shipped_model):
    codes = shipped_model.images.codebook.codes[0]
    assert shipped_model.transformer.lengthening == lengthening(codes, 2.0) > 1.4
    assert shipped_model.sampling.expected_steps == 5


def test_what_is_not_decided_is_averaged_and_the_first_steps_decide(shipped_model):
    """Without a caption any picture could be meant: all steps expected give one for all seeds."""
    model = replace(shipped_model, sampling=Guided(0.4, guidance_scale=1.0))
    requests = [Request((), seed) for seed in range(6)]
    spread = []
    for steps in (10, 5, 0):
        how = replace(model.sampling, expected_steps=steps)
        together = (model.transformer, model.images, model.vocabulary, requests, how)
        spread.append(sample_images(*together)[0].std(0).mean().item())
    assert spread[0] < 0.2 < 0.5 < spread[1]
    assert spread[1] > 0.7 * spread[2]


@pytest.mark.parametrize("steps", [0, 2, 3])
def test_peers_judge_ours_at_temperatures_while_codes_are_drawn(peer_recipe, peer_scene, steps):
    torch.manual_seed(0)
    peer = Ours(replace(peer_recipe.ours, expected_steps=steps), peer_scene)
    peer.to(machine.device())  # where the tokeniser is
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    judging = replace(peer_recipe.judging, temperatures=(0.4, 9.0))
    drawn = []
    for how in peer.ways(judging):
        torch.manual_seed(0)
        drawn.append((how.temperature, peer.draw([(3, 4)], how)))
    assert [t for t, _ in drawn] == ([None] if steps == 3 else [0.4, 9.0])
    assert steps == 3 or not torch.equal(drawn[0][1], drawn[1][1])
