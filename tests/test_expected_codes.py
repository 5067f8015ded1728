"""Soft labels, the length of their mean, and drawing by it."""

import math
from dataclasses import replace

import pytest
import torch

import mmrdpm
from mmrdpm import shipped
from mmrdpm.data.emoji import load_emoji
from mmrdpm.data.emoji_stream import latents_of
from mmrdpm.document import ImageSegment, TextSegment, pack
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.rdpm.autoencoder import AutoencoderConfig
from mmrdpm.rdpm.codebook import Codebook
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from mmrdpm.rdpm.soft_labels import shortening, soft_labels
from mmrdpm.sampling.choose import Choice, probabilities
from mmrdpm.sampling.image import Guided, Request, sample_images
from mmrdpm.transformer import Transformer, TransformerConfig
from mmrdpm.vocabulary import Vocabulary

V = Vocabulary(text_size=20, codebook_size=8)
CAPTION = (3, 4, 5)


@pytest.fixture
def pair():
    torch.manual_seed(0)
    autoencoder = AutoencoderConfig(image_size=16, latent_channels=4, widths=(8, 16), blocks=1)
    config = ImageTokenizerConfig(autoencoder, num_timesteps=3, codebook_size=8)
    tokenizer = ImageTokenizer(config).eval()
    tokenizer.codebook.codes.normal_(std=0.7)
    shape = TransformerConfig(layers=2, width=64, heads=2, kv_heads=1, ffn=48)
    model = Transformer(shape, V.size, 4, 3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.12)
    return model, tokenizer


def draw(pair, *requests, labels=0.0, **how):
    how = Guided(**{"temperature": 1.0, "guidance_scale": 1.0, "codes": "expected", **how})
    return sample_images(*pair, V, requests or [Request(CAPTION, 7)], how, labels)


def test_soft_labels_worked_by_hand():
    codes = torch.tensor([[1.0], [-1.0], [3.0]])
    found = soft_labels(torch.tensor([[1.0], [0.0]]), codes, temperature=2.0)
    by_hand = [[1, math.exp(-2), math.exp(-2)], [math.exp(-0.5), math.exp(-0.5), math.exp(-4.5)]]
    by_hand = torch.tensor(by_hand)
    torch.testing.assert_close(found, by_hand / by_hand.sum(1, keepdim=True))


def test_the_length_of_a_mean_worked_by_hand():
    # codes of mean square 1 leave no error: residuals are the codes, their means tanh(2 / tau)
    codes = torch.tensor([[1.0], [-1.0]])
    for tau in (0.5, 2.0, 8.0):
        assert shortening(codes, tau) == pytest.approx(1 / math.tanh(2 / tau))
    assert shortening(codes, 0.0) == 1.0
    assert shortening(torch.zeros(4, 2), 2.0) == 0.0  # before the codes are fitted: a number


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0, 4.0])
def test_the_length_of_a_mean_is_that_of_real_residuals(tau):
    images = image_tokenizer.load(shipped.resolve("tokenizers", "emoji-rdpm-32"))
    data = load_emoji(images.image_size)
    latents = latents_of(images, data)[::40]
    seeds = range(len(latents))
    code_indices, states = images.encode_latents(latents, seeds)
    residuals, codes = images.residuals(latents, seeds, states), images.codebook.codes[0]
    means = soft_labels(residuals, codes, tau) @ codes
    factor = (codes[code_indices] * means).sum() / means.square().sum()
    assert shortening(codes, tau) == pytest.approx(factor.item(), rel=0.12)


def test_the_expected_code_of_a_sure_choice_is_that_code():
    codebook = Codebook(num_timesteps=2, size=3, dim=2)
    codebook.codes.copy_(torch.tensor([[[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]]))
    codebook.gains.copy_(torch.tensor([1.0, 0.5]))
    chosen = torch.tensor([[2, 0], [1, 1]])
    sure = torch.nn.functional.one_hot(chosen, 3).float()
    assert torch.equal(codebook.expected(sure, 2), codebook.lookup(chosen, 2))
    mean = codebook.expected(torch.tensor([0.5, 0.25, 0.25]), 2)
    assert mean.tolist() == [0.5, 0.375]


def test_probabilities_keep_what_is_drawn_from():
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]])
    assert probabilities(logits, Choice(1.0))[0].tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    assert probabilities(logits, Choice(0.5))[0].tolist() == pytest.approx(
        [1 / 30, 4 / 30, 25 / 30]
    )
    assert probabilities(logits, Choice(1.0, top_k=2))[0].tolist() == pytest.approx(
        [0, 2 / 7, 5 / 7]
    )
    assert probabilities(logits, Choice(0.0))[0].tolist() == [0, 0, 1]


@pytest.mark.parametrize("labels", [0.0, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_every_step_adds_the_mean_code_of_a_whole_forward_pass(pair, labels, temperature):
    model, tokenizer = pair
    states = draw(pair, labels=labels, temperature=temperature)[:, 0]
    assert torch.equal(states[-1], tokenizer.noise([7])[0, 0])
    codes = tokenizer.codebook.codes[0]
    length = shortening(codes, labels * temperature)
    assert (length == 1) == (labels == 0)
    for timestep in (3, 2, 1):
        zeros = torch.zeros(3, 2, 2, dtype=torch.int64)
        segment = ImageSegment(zeros, states, (timestep,))
        row = pack([[[TextSegment((V.bos, *CAPTION, V.image_start)), segment]]], 9, V, 4)
        logits = model.logits(model(row))[0, -4:, V.code_offset :]
        step = length * (logits / temperature).softmax(-1) @ codes
        moved = states[timestep - 1] - states[timestep]
        torch.testing.assert_close(moved, step.view(2, 2, 4), rtol=1e-4, atol=1e-5)


def test_only_codes_that_a_step_has_are_expected(pair):
    _, tokenizer = pair
    tokenizer.codebook.sizes = (8, 8, 1)
    states = draw(pair)[:, 0]
    only = tokenizer.codebook.lookup(torch.zeros(2, 2, dtype=torch.int64), 3)
    torch.testing.assert_close(states[2], states[3] + only)


def test_at_temperature_0_the_expected_code_is_the_likeliest(pair):
    expected, drawn = (draw(pair, temperature=0.0, codes=codes) for codes in ("expected", "drawn"))
    assert torch.equal(expected, drawn)
    assert not torch.equal(draw(pair), drawn)


def test_an_image_of_expected_codes_is_the_same_to_the_bit_in_every_company(pair):
    captions = [(3,), (4, 5), (1, 2, 3), (6,) * 20]
    requests = [Request(captions[0 if i < 16 else i % 4], i) for i in range(20)]
    alone = [draw(pair, request, labels=2.0, guidance_scale=2.0)[:, 0] for request in requests]
    together = draw(pair, *requests, labels=2.0, guidance_scale=2.0).unbind(1)
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))


def test_soft_labels_shorten_what_a_perfect_model_expects():
    """A model that knows the residuals and learned soft labels moves as far as the codes do."""
    images = image_tokenizer.load(shipped.resolve("tokenizers", "emoji-rdpm-32"))
    latents = latents_of(images, load_emoji(images.image_size))[:64]
    codebook, seeds = images.codebook, range(64)
    _, states = images.encode_latents(latents, seeds)
    noise = images.noise(seeds)
    length, walked = shortening(codebook.codes[0], 2.0), images.trajectory.start(noise)
    for timestep in range(images.num_timesteps, 0, -1):
        residual = images.trajectory.residual(latents, noise, walked, timestep)
        labels = soft_labels(residual / codebook.gains[timestep - 1], codebook.codes[0], 2.0)
        walked = walked + length * codebook.expected(labels, timestep)
    left = (walked - latents).square().mean()
    assert left < (states[0] - latents).square().mean()  # nearer than the codes themselves


def test_a_shipped_model_knows_how_soft_its_labels_were():
    model = mmrdpm.load("emoji-tiny")
    assert model.soft_labels == 2.0
    drawn = model.generate(["dog face"], codes="drawn", temperature=1.0)
    expected = model.generate(["dog face"], codes="expected", temperature=1.0)
    harder = replace(model, soft_labels=0.0).generate(
        ["dog face"], codes="expected", temperature=1.0
    )
    assert len({picture.tobytes() for picture in (*drawn, *expected, *harder)}) == 3
