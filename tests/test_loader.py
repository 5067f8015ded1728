import hashlib

import numpy as np
import pytest
import torch

from mmrdpm import recipe, shipped, text_tokenizer
from mmrdpm.attention.layout import BlockKind
from mmrdpm.data import emoji_stream
from mmrdpm.data.emoji import load_emoji
from mmrdpm.data.emoji_stream import latents_of
from mmrdpm.data.glosses import load_glosses
from mmrdpm.data.loader import Loader
from mmrdpm.data.plan import DataPlan
from mmrdpm.errors import DataError
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def make(tiny_tokenizers):
    images = image_tokenizer.load(tiny_tokenizers / "image")
    texts = text_tokenizer.load(tiny_tokenizers / "text")
    vocabulary = Vocabulary(texts.size, images.codebook_size)
    data = load_emoji(images.image_size)
    latents = latents_of(images, data)  # once for all loaders: it takes seconds

    def make_loader(seed=0, rank=0, world_size=1, **plan):
        shape = {"rows": 3, "seq_len": 96, "steps_per_image": 2} | plan
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(emoji_stream, "load_emoji", lambda _: data)
            patch.setattr(emoji_stream, "latents_of", lambda *_: latents)
            return Loader(DataPlan(**shape), seed, images, texts, vocabulary, rank, world_size)

    return make_loader


def equal(a, b):
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("token_ids", "latents", "timesteps", "targets", "positions")
    )


def test_the_stream_goes_on_from_one_number(make):
    whole, later = make(), make()
    batches = [whole.batch() for _ in range(3)]
    assert equal(later.batch(), batches[0])
    fresh = make()
    fresh.restore(later.state())
    assert equal(fresh.batch(), batches[1]) and not equal(batches[0], batches[1])
    assert not equal(make(seed=1).batch(), batches[0])


def test_only_training_pictures_are_shown(make):
    loader, data = make(), load_emoji(16)
    shown = {i for concept in loader.stream.concepts for i in concept}
    assert shown == set(data.indices("train"))
    assert all(
        not data.tones[concept[0]] for concept in loader.stream.concepts if len(concept) == 6
    )


def test_noisy_targets_are_the_codes_of_a_training_picture(make):
    """Following a block's own targets must lead from its state to the next one's."""
    loader = make(image_share=1.0, caption_share=0.0, steps_per_image=3)
    batch, tokenizer = loader.batch(), loader.image_tokenizer
    where = batch.layout.document_ids[0] == 0
    latents, targets, t = (
        batch.latents[0][where],
        batch.targets[0][where],
        batch.timesteps[0][where],
    )
    state, start = latents[t == 3].split(4, dim=-1)
    assert torch.equal(state, start)
    for timestep in (3, 2, 1):
        state = latents[t == timestep, :4]
        codes = targets[t == timestep] - loader.vocabulary.code_offset
        after = state + tokenizer.codebook.lookup(codes, timestep)
        if timestep > 1:
            torch.testing.assert_close(after, latents[t == timestep - 1, :4])


def test_captions_follow_clean_images_and_are_their_names(make):
    loader, data = make(image_share=0.0, caption_share=1.0), load_emoji(16)
    batch, v = loader.batch(), loader.vocabulary
    where = batch.layout.document_ids[0] == 0
    ids, kinds = batch.token_ids[0][where].tolist(), batch.layout.kinds[0][where]
    assert (kinds == BlockKind.CLEAN).sum() == 4
    start = ids.index(v.image_end)
    assert ids[-1] == v.eos
    tokens = ids[start + 1 : -1]
    assert any(tuple(tokens) == loader.stream.captions[i] for i in data.indices("train"))
    assert latents_of(loader.image_tokenizer, data).shape == (len(data.names), 2, 2, 4)


def test_every_picture_goes_with_one_of_its_own_names(make):
    loader = make(caption_dropout=0.0)
    latents, captions, v = loader.stream.latents, loader.stream.captions, loader.vocabulary
    seen = set()
    for draft in (loader.stream.draft(i) for i in range(60)):
        if draft.images:
            (image,) = draft.images
            places = [k for k in range(len(latents)) if np.array_equal(latents[k], image.image)]
            words = draft.parts[-1][1:-1] if image.clean else draft.parts[0][1:-1]
            assert words in [captions[k] for k in places]
            marks = (v.image_end, v.eos) if image.clean else (v.bos, v.image_start)
            text = draft.parts[-1] if image.clean else draft.parts[0]
            assert (text[0], text[-1]) == marks
            seen.add(image.clean)
    assert seen == {True, False}


def test_shares_and_dropout_are_kept(make):
    loader = make()
    drafts = [loader.stream.draft(i) for i in range(2000)]
    images = [d for d in drafts if len(d.parts) == 2]
    assert len(images) / 2000 == pytest.approx(0.55, abs=0.04)
    assert sum(len(d.parts) == 3 for d in drafts) / 2000 == pytest.approx(0.25, abs=0.04)
    empty = sum(len(d.parts[0]) == 2 for d in images) / len(images)
    assert empty == pytest.approx(0.1, abs=0.03)
    timesteps = [d.images[0].timesteps for d in images]
    assert all(len(set(t)) == 2 and t[0] > t[1] for t in timesteps)


def test_what_cannot_fit_is_refused(make):
    with pytest.raises(DataError, match="steps_per_image is 9"):
        make(steps_per_image=9)
    with pytest.raises(DataError, match=r"more than data\.seq_len 16"):
        make(seq_len=16).batch()
    with pytest.raises(DataError, match=r"more than data\.seq_len 16"):
        make(seq_len=16, look_ahead=4).batch()


def test_definitions_are_plain_sentences():
    glosses = load_glosses()
    assert "a lantern is light in a transparent protective case." in glosses
    assert len(glosses) > 10_000 and all(text.endswith(".") for text in glosses)


@pytest.fixture
def first_batches(monkeypatch):
    """Digests of the first two batches of a plan, seed 0, by the shipped tokenisers."""
    monkeypatch.setattr(  # what is digested is the same whatever the latents
        emoji_stream,
        "latents_of",
        lambda images, data: torch.zeros(len(data.names), *images.grid, images.latent_channels),
    )
    images = image_tokenizer.load(shipped.resolve("tokenizers", "emoji-rdpm-32"))
    texts = text_tokenizer.load(shipped.resolve("tokenizers", "emoji-bpe-4k"))
    vocabulary = Vocabulary(texts.size, images.codebook_size)

    def of(plan):
        loader = Loader(plan, 0, images, texts, vocabulary)
        return [digest(loader.batch()) for _ in range(2)]

    return of


def test_the_embedded_stream_is_the_one_that_the_shipped_model_was_trained_on(first_batches):
    """Recorded from the loader of the commit that trained it."""
    plan = recipe.load(ModelRecipe, shipped.resolve("models", "emoji-tiny") / "recipe.yaml").data
    assert plan == recipe.load(ModelRecipe, shipped.resolve("recipes", "emoji_cpu")).data
    assert first_batches(plan) == ["45206d481f7643bd", "e5241b5100c74b1b"]


def test_the_embedded_stream_in_order_is_what_it_was_before_there_were_sources(first_batches):
    assert first_batches(DataPlan(rows=12)) == ["1c567dd119056262", "81f8d163b856fe1d"]


def digest(batch):
    """Of all that is exact on any machine: ids, timesteps, positions and layout."""
    tensors = (batch.token_ids, batch.timesteps, batch.positions, batch.layout.document_ids)
    kinds = batch.layout.without_history().kinds
    content = b"".join(t.numpy().tobytes() for t in (*tensors, kinds))
    return hashlib.sha256(content).hexdigest()[:16]


def test_ranks_share_the_rows_of_one_batch(make):
    whole, parts = make(rows=4), [make(rows=4, rank=r, world_size=2) for r in range(2)]
    for _ in range(2):
        batch, shared = whole.batch(), [part.batch() for part in parts]
        for row in range(4):
            mine = shared[row % 2]
            assert torch.equal(batch.token_ids[row], mine.token_ids[row // 2])
            assert torch.equal(batch.targets[row], mine.targets[row // 2])
    with pytest.raises(DataError, match="3 ranks cannot share evenly"):
        make(rows=4, rank=0, world_size=3)
