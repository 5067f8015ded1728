import threading

import pytest
import torch

from mmrdpm.api import build
from mmrdpm.document import ImageSegment, TextSegment, pack
from mmrdpm.errors import UsageError
from mmrdpm.rdpm.autoencoder import AutoencoderConfig
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from mmrdpm.sampling import image
from mmrdpm.sampling import text as text_sampling
from mmrdpm.sampling.cache import Cache
from mmrdpm.sampling.choose import Choice, choose, keep
from mmrdpm.sampling.image import (
    _SEEN,
    Guided,
    Request,
    Sampler,
    _draws,
    guidance_at,
    sample_images,
)
from mmrdpm.sampling.text import by_run, sample_text
from mmrdpm.sampling.writer import Writer, suits
from mmrdpm.transformer import Transformer, TransformerConfig
from mmrdpm.vocabulary import Vocabulary

VOCABULARY = Vocabulary(text_size=20, codebook_size=8)
_SHAPE = {"layers": 2, "width": 64, "heads": 2, "kv_heads": 1, "ffn": 48}


def make_models(**variant):
    torch.manual_seed(0)
    autoencoder = AutoencoderConfig(image_size=16, latent_channels=4, widths=(8, 16), blocks=1)
    config = ImageTokenizerConfig(autoencoder, num_timesteps=3, codebook_size=8)
    tokenizer = ImageTokenizer(config).eval()
    tokenizer.codebook.codes.normal_()
    shape = TransformerConfig(**{**_SHAPE, **variant})
    model = Transformer(shape, VOCABULARY.size, 4, 3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.12)
    return model, tokenizer


def draw(caption, seed, **how):
    model, tokenizer = make_models()
    requests = [Request(caption, seed)]
    return sample_images(model, tokenizer, VOCABULARY, requests, Guided(**how))[:, 0]


def test_greedy_drawing_equals_a_whole_forward_pass_at_every_step():
    model, tokenizer = make_models()
    v, caption = VOCABULARY, (3, 4, 5)
    states = draw(caption, 7, temperature=0.0, guidance_scale=1.0)
    codes = torch.zeros(3, 2, 2, dtype=torch.int64)
    for timestep in (3, 2, 1):
        segment = ImageSegment(codes, states, (timestep,))
        row = pack([[[TextSegment((v.bos, *caption, v.image_start)), segment]]], 9, v, 4)
        logits = model.logits(model(row))[0, -4:, v.code_offset :]
        codes[timestep - 1] = logits.argmax(-1).view(2, 2)
    noise = tokenizer.noise([7])
    assert torch.equal(states[-1], noise[0, 0])
    for timestep in (3, 2, 1):
        step = tokenizer.codebook.lookup(codes[timestep - 1], timestep)
        torch.testing.assert_close(states[timestep - 1], states[timestep] + step)


def test_guidance_mixes_the_scores_with_and_without_the_caption():
    model, tokenizer = make_models()
    v, caption = VOCABULARY, (3, 4, 5)
    states = draw(caption, 7, temperature=0.0, guidance_scale=3.0)
    mattered = False
    for timestep in (3, 2, 1):
        image = ImageSegment(torch.zeros(3, 2, 2, dtype=torch.int64), states, (timestep,))

        def scores(words, image=image):
            row = pack(
                [[[TextSegment((v.bos, *words, v.image_start)), image]]], len(words) + 6, v, 4
            )
            return model.logits(model(row))[0, -4:, v.code_offset :]

        cond, uncond = scores(caption), scores(())
        codes = (uncond + 3 * (cond - uncond)).argmax(-1)
        mattered |= not torch.equal(codes, cond.argmax(-1))
        step = tokenizer.codebook.lookup(codes.view(2, 2), timestep)
        torch.testing.assert_close(states[timestep - 1], states[timestep] + step)
    assert mattered


def test_drawing_with_history_equals_a_forward_pass_over_all_steps():
    model, tokenizer = make_models(history=True)
    v, caption = VOCABULARY, (3, 4, 5)
    how = Guided(0.0, guidance_scale=1.0)
    states = sample_images(model, tokenizer, v, [Request(caption, 7)], how)[:, 0]
    image = ImageSegment(torch.zeros(3, 2, 2, dtype=torch.int64), states, (3, 2, 1))
    row = pack([[[TextSegment((v.bos, *caption, v.image_start)), image]]], 17, v, 4)
    codes = model.logits(model(row))[0, -12:, v.code_offset :].argmax(-1).view(3, 2, 2)
    for timestep, chosen in zip((3, 2, 1), codes, strict=True):
        step = tokenizer.codebook.lookup(chosen, timestep)
        torch.testing.assert_close(states[timestep - 1], states[timestep] + step)


def test_only_codes_that_a_step_has_are_drawn():
    model, tokenizer = make_models()
    tokenizer.codebook.sizes = (8, 8, 1)
    states = sample_images(model, tokenizer, VOCABULARY, [Request((3,), 1)], Guided())[:, 0]
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
    first = draw((3,), 1)
    torch.randn(5)  # the global random state plays no part
    assert torch.equal(first, draw((3,), 1))
    assert not torch.equal(first, draw((3,), 2))
    assert not torch.equal(first, draw((3,), 1, guidance_scale=9.0))


@pytest.mark.parametrize(
    ("threads", "guidance_scale"), [(1, 2.0), (2, 2.0), (3, 2.0), (4, 2.0), (1, 1.0)]
)
def test_an_image_is_the_same_to_the_bit_in_every_company_and_place(threads, guidance_scale):
    (model, tokenizer), before = make_models(), torch.get_num_threads()
    how = Guided(guidance_scale=guidance_scale)
    captions = [(3,), (4, 5), (1, 2, 3), (6,) * 20]  # the last is padded to another length
    requests = [Request(captions[0 if i < 16 else i % 4], i) for i in range(20)]

    def states(some):
        return sample_images(model, tokenizer, VOCABULARY, some, how).unbind(1)

    torch.set_num_threads(threads)
    try:
        alone = [states([request])[0] for request in requests]
        for some in (slice(0, 3), slice(0, 20), slice(19, None, -1)):
            for found, expected in zip(states(requests[some]), alone[some], strict=True):
                assert torch.equal(found, expected)
    finally:
        torch.set_num_threads(before)


def test_images_are_grouped_by_padded_length_and_only_where_bits_agree(monkeypatch):
    model, tokenizer = make_models()
    sampler = Sampler(model, tokenizer, VOCABULARY, Guided())
    lengths = [2] * 83 + [20] * 18
    requests = [Request((1,) * length, i) for i, length in enumerate(lengths)]
    monkeypatch.setattr(Sampler, "bits_are_the_same", lambda *_: True)
    groups = sampler.groups(requests)
    monkeypatch.setattr(Sampler, "bits_are_the_same", lambda *_: False)
    assert sampler.groups(requests) == groups  # what has been seen is not tried again
    assert [i for group in groups for i in group] == list(range(101))
    assert [len(group) for group in groups] == [64, 16, 1, 1, 1, 16, 1, 1]
    _SEEN.clear()
    monkeypatch.setattr(Sampler, "bits_are_the_same", lambda _, group, size: len(group) == 16)
    sizes = [len(group) for group in sampler.groups(requests)]
    assert sizes == [16] * 5 + [1, 1, 1, 16, 1, 1]
    # a large group counts for nothing where the small one that it was compared with does not
    _SEEN.clear()
    monkeypatch.setattr(Sampler, "bits_are_the_same", lambda _, group, size: len(group) == 64)
    assert sampler.groups(requests) == [[i] for i in range(101)]


@pytest.fixture
def seen(monkeypatch):
    """On three threads, notes for each group that is drawn: its size, whether in a thread of its
    own, and with how many cores."""
    noted, before, draw = [], torch.get_num_threads(), Sampler.draw

    def noting(self, group):
        apart = threading.current_thread() is not threading.main_thread()
        noted.append((len(group), apart, torch.get_num_threads()))
        return draw(self, group)

    monkeypatch.setattr(Sampler, "draw", noting)
    torch.set_num_threads(3)
    yield noted
    torch.set_num_threads(before)


def test_groups_are_the_work_of_one_core_and_large_images_of_all(seen, monkeypatch):
    model, tokenizer = make_models()
    requests = [Request((1, 2), seed) for seed in range(33)]
    small = sample_images(model, tokenizer, VOCABULARY, requests, Guided())
    assert sorted(seen) == [(1, True, 1), (16, True, 1), (16, True, 1)]
    seen.clear()
    monkeypatch.setattr(image, "_LIGHT", 1.0)
    large = sample_images(model, tokenizer, VOCABULARY, requests, Guided())
    assert seen == [(1, False, 3)] * 33
    torch.testing.assert_close(small, large)


def test_what_does_not_fill_vectors_is_drawn_alone(seen):
    for shape in ({"ffn": 52}, {"heads": 4}):
        seen.clear()
        model, tokenizer = make_models(**shape)
        requests = [Request((1, 2), seed) for seed in range(16)]
        sample_images(model, tokenizer, VOCABULARY, requests, Guided())
        assert seen == [(1, True, 1)] * 16


def test_bits_are_tried_again_when_the_weights_have_changed(monkeypatch):
    model, tokenizer = make_models()
    sampler = Sampler(model, tokenizer, VOCABULARY, Guided())
    requests, tried = [Request((1,), i) for i in range(16)], []
    monkeypatch.setattr(
        Sampler, "bits_are_the_same", lambda _, group, size: tried.append(size) or True
    )
    for _ in range(2):
        assert sampler.groups(requests) == [list(range(16))]
    assert tried == [1]
    torch.nn.init.ones_(model.table.weight)
    sampler.groups(requests)
    assert tried == [1, 1]


def test_no_images_of_no_requests():
    model, tokenizer = make_models()
    assert sample_images(model, tokenizer, VOCABULARY, [], Guided()).shape == (4, 0, 2, 2, 4)


def test_images_that_see_their_history_are_computed_alone_on_the_cpu():
    model, tokenizer = make_models(history=True)
    sampler = Sampler(model, tokenizer, VOCABULARY, Guided())
    assert sampler.groups([Request((1,), i) for i in range(16)]) == [[i] for i in range(16)]


def test_bits_that_depend_on_the_company_are_noticed(monkeypatch):
    model, tokenizer = make_models()
    sampler = Sampler(model, tokenizer, VOCABULARY, Guided())
    group = [Request((1, 2), seed) for seed in range(3)]
    assert sampler.bits_are_the_same(group)
    honest = model.logits

    def rounded_by_shape(hidden, ids):
        logits = honest(hidden, ids)
        logits[-1, 0, 0] += 1e-6 * (len(logits) > 2)
        return logits

    monkeypatch.setattr(model, "logits", rounded_by_shape)
    assert not sampler.bits_are_the_same(group)


def test_a_noise_pool_holds_so_many_starts_and_codes_vary_all_the_same():
    model, tokenizer = make_models(noise_pool=2)
    build(model.config, VOCABULARY, tokenizer)
    requests = [Request((1, 2), seed) for seed in range(4)]
    states = sample_images(model, tokenizer, VOCABULARY, requests, Guided())
    for seed in range(4):
        assert torch.equal(states[-1, seed], states[-1, seed % 2])
    assert not torch.equal(states[-1, 0], states[-1, 1])
    assert len({image.sum().item() for image in states[0].unbind()}) == 4
    build(TransformerConfig(**_SHAPE), VOCABULARY, tokenizer)
    assert not torch.equal(tokenizer.noise([0]), tokenizer.noise([2]))


def test_ids_that_top_k_drops_are_never_drawn():
    logits = torch.zeros(2, 500, 6)
    logits[..., 4:] = 3.0
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    drawn = choose(logits, Choice(top_k=2), generators)
    assert drawn.shape == (2, 500) and set(drawn.flatten().tolist()) == {4, 5}
    again = choose(logits[1:], Choice(top_k=2), [torch.Generator().manual_seed(1)])
    assert torch.equal(drawn[1:], again)


def test_cached_text_equals_reading_everything_anew():
    model, _ = make_models()
    prompt = (VOCABULARY.bos, 4, 9)
    context = pack([[[TextSegment(prompt)]]], 3, VOCABULARY, 4)
    found = sample_text(model, VOCABULARY, context, 6)
    ids = list(prompt)
    for _ in range(6):
        row = pack([[[TextSegment(tuple(ids))]]], len(ids), VOCABULARY, 4)
        logits = model.logits(model(row))[0, -1]
        may_come = [*range(20), VOCABULARY.eos, VOCABULARY.image_start]
        choice = may_come[int(logits[may_come].argmax())]
        if choice >= 20:
            break
        ids.append(choice)
    assert found == ids[3:]


@pytest.mark.parametrize("end", ["eos", "image_start"])
def test_text_ends_where_its_document_or_a_picture_would_come(end):
    """Captions are learned in front of pictures: what follows them is no word."""
    model, _ = make_models()
    context = pack([[[TextSegment((VOCABULARY.bos, 4, 9))]]], 3, VOCABULARY, 4)
    assert sample_text(model, VOCABULARY, context, 6)
    with torch.no_grad():
        hidden = model(context)[0, -1]
        model.table.weight[getattr(VOCABULARY, end)] = 100 * hidden
        assert int(model.logits(hidden).argmax()) == getattr(VOCABULARY, end)
    assert sample_text(model, VOCABULARY, context, 6) == []


_LIKE_A_LANGUAGE_MODEL = {
    "attention_width": 32,
    "norm_weights": True,
    "norm_eps": 1e-3,
    "norm_inputs": False,
    "rope": "shifted",
    "tied": False,
}


@pytest.mark.parametrize(
    ("variant", "scored"),
    [
        ({}, VOCABULARY.eos + 1),
        ({}, VOCABULARY.size),  # no whole number of parts
        ({"width": 52, "ffn": 37}, VOCABULARY.eos + 1),
        ({"code_geometry": True, "places": True}, VOCABULARY.eos + 1),
        (_LIKE_A_LANGUAGE_MODEL, VOCABULARY.eos + 1),
    ],
    ids=["plain", "all ids", "odd", "geometry", "language model"],
)
@torch.inference_mode()
def test_a_writer_scores_what_the_whole_model_does(variant, scored):
    model, tokenizer = make_models(**variant)
    model.know_codes(tokenizer.codebook.codes, tokenizer.estimates(True))
    v, tokens = VOCABULARY, (1, 8, 3, 3, 19)
    row = pack([[[TextSegment((v.bos, 3, 4, 5))]]], 4, v, 4)
    slow = by_run(model, Cache(model, row, len(tokens)), row, scored)
    cache = Cache(model, row, len(tokens))
    writer = Writer(model, cache, row.positions[:, -1:], len(tokens), scored)
    for token in tokens:
        expected, found = slow(token), writer.follow(token)
        assert found.shape == (1, scored) and expected.std() > 0.05
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_under_autocast_text_is_written_by_the_whole_model(monkeypatch):
    model, _ = make_models()
    row = pack([[[TextSegment((VOCABULARY.bos, 3))]]], 2, VOCABULARY, 4)
    monkeypatch.setattr(text_sampling, "Writer", None)  # calling it would fail
    with torch.autocast("cpu", torch.bfloat16):
        assert not suits(model)
        sample_text(model, VOCABULARY, row, 3)
    assert suits(model)


def test_top_k_and_top_p_keep_what_they_should():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert keep(logits, 2, 1.0).isfinite().tolist() == [True, True, False, False]
    assert keep(logits, 0, 0.6).isfinite().tolist() == [True, True, False, False]
    assert keep(logits, 0, 0.4).isfinite().tolist() == [True, False, False, False]


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.7, 0.2, 0.1]).log().expand(20_000, 3)
    (draws,) = choose(logits[None], Choice(), [torch.Generator().manual_seed(0)])
    share = torch.bincount(draws, minlength=3) / 20_000
    torch.testing.assert_close(share, torch.tensor([0.7, 0.2, 0.1]), atol=0.02, rtol=0)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(UsageError, match=r"0 or more|from 0 to"):
        Choice(**wrong)


def test_draws_do_not_repeat_the_start_noise():
    """The numbers that draw codes and those that made the noise are unrelated for one seed."""
    seeds = range(2000)
    drawn = torch.stack([torch.rand(4, generator=_draws(s), dtype=torch.float64) for s in seeds])
    noise = torch.stack([torch.randn(4, generator=torch.Generator().manual_seed(s)) for s in seeds])
    for made in (noise, noise.square()):
        found = torch.corrcoef(torch.cat([drawn.T, made.double().T]))[:4, 4:]
        assert found.abs().max() < 0.1
