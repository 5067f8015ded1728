import pytest
import torch

from mmrdpm.document import ImageSegment, TextSegment, pack
from mmrdpm.errors import UsageError
from mmrdpm.rdpm.autoencoder import AutoencoderConfig
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from mmrdpm.sampling.choose import Choice, choose, keep
from mmrdpm.sampling.image import Guided, guidance_at, sample_image
from mmrdpm.sampling.text import sample_text
from mmrdpm.transformer import Transformer, TransformerConfig
from mmrdpm.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=20, codebook_size=8)


def make_models(**variant):
    torch.manual_seed(0)
    autoencoder = AutoencoderConfig(image_size=16, latent_channels=4, widths=(8, 16), blocks=1)
    config = ImageTokenizerConfig(autoencoder, num_timesteps=3, codebook_size=8)
    tokenizer = ImageTokenizer(config).eval()
    tokenizer.codebook.codes.normal_()
    shape = TransformerConfig(layers=2, width=32, heads=4, kv_heads=2, ffn=48, **variant)
    model = Transformer(shape, VOCABULARY.size, 4, 3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model, tokenizer


def test_greedy_drawing_equals_a_whole_forward_pass_at_every_step():
    model, tokenizer = make_models()
    v, caption = VOCABULARY, (3, 4, 5)
    states = sample_image(model, tokenizer, v, caption, 7, Guided(0.0, guidance_scale=1.0))
    codes = torch.zeros(3, 2, 2, dtype=torch.int64)
    for timestep in (3, 2, 1):
        image = ImageSegment(codes, states, (timestep,))
        row = pack([[[TextSegment((v.bos, *caption, v.image_start)), image]]], 9, v, 4)
        logits = model.logits(model(row))[0, -4:, v.code_offset :]
        codes[timestep - 1] = logits.argmax(-1).view(2, 2)
    noise = tokenizer.noise([7])
    assert torch.equal(states[-1], noise[0, 0])
    for timestep in (3, 2, 1):
        step = tokenizer.codebook.lookup(codes[timestep - 1], timestep)
        torch.testing.assert_close(states[timestep - 1], states[timestep] + step)


def test_drawing_with_history_equals_a_forward_pass_over_all_steps():
    model, tokenizer = make_models(history=True)
    v, caption = VOCABULARY, (3, 4, 5)
    states = sample_image(model, tokenizer, v, caption, 7, Guided(0.0, guidance_scale=1.0))
    image = ImageSegment(torch.zeros(3, 2, 2, dtype=torch.int64), states, (3, 2, 1))
    row = pack([[[TextSegment((v.bos, *caption, v.image_start)), image]]], 17, v, 4)
    codes = model.logits(model(row))[0, -12:, v.code_offset :].argmax(-1).view(3, 2, 2)
    for timestep, chosen in zip((3, 2, 1), codes, strict=True):
        step = tokenizer.codebook.lookup(chosen, timestep)
        torch.testing.assert_close(states[timestep - 1], states[timestep] + step)


def test_only_codes_that_a_step_has_are_drawn():
    model, tokenizer = make_models()
    tokenizer.codebook.sizes = (8, 8, 1)
    states = sample_image(model, tokenizer, VOCABULARY, (3,), 1, Guided())
    only = tokenizer.codebook.lookup(torch.zeros(2, 2, dtype=torch.int64), 3)
    torch.testing.assert_close(states[2], states[3] + only)


def test_guidance_schedules_worked_by_hand():
    def scales(schedule):
        how = Guided(guidance_scale=3.0, guidance_schedule=schedule)
        return [guidance_at(how, t, 5) for t in (5, 4, 3, 2, 1)]

    assert scales("constant") == [3.0] * 5
    assert scales("rising") == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert scales("falling") == [3.0, 2.5, 2.0, 1.5, 1.0]


def test_seeds_and_guidance_change_the_image_and_nothing_else_does():
    model, tokenizer = make_models()

    def draw(seed, **how):
        return sample_image(model, tokenizer, VOCABULARY, (3,), seed, Guided(**how))

    first = draw(1)
    torch.randn(5)  # the global random state plays no part
    assert torch.equal(first, draw(1))
    assert not torch.equal(first, draw(2))
    assert not torch.equal(first, draw(1, guidance_scale=9.0))


def test_cached_text_equals_reading_everything_anew():
    model, _ = make_models()
    prompt = (VOCABULARY.bos, 4, 9)
    context = pack([[[TextSegment(prompt)]]], 3, VOCABULARY, 4)
    found = sample_text(model, VOCABULARY, context, 6)
    ids = list(prompt)
    for _ in range(6):
        row = pack([[[TextSegment(tuple(ids))]]], len(ids), VOCABULARY, 4)
        logits = model.logits(model(row))[0, -1]
        logits = torch.cat([logits[:20], logits[VOCABULARY.eos : VOCABULARY.eos + 1]])
        choice = int(logits.argmax())
        if choice == 20:
            break
        ids.append(choice)
    assert found == ids[3:]


def test_top_k_and_top_p_keep_what_they_should():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert keep(logits, 2, 1.0).isfinite().tolist() == [True, True, False, False]
    assert keep(logits, 0, 0.6).isfinite().tolist() == [True, True, False, False]
    assert keep(logits, 0, 0.4).isfinite().tolist() == [True, False, False, False]


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.7, 0.2, 0.1]).log().expand(20_000, 3)
    draws = choose(logits, Choice(), torch.Generator().manual_seed(0))
    share = torch.bincount(draws, minlength=3) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.7, 0.2, 0.1]), atol=0.02, rtol=0)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError, match="must be at least"):
        Choice(**wrong)
