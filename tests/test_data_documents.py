"""Records become documents, documents become rows: hand-worked cases and what must always hold."""

import io
from collections import Counter
from itertools import count, islice

import numpy as np
import pytest
import torch
from PIL import Image

from mmrdpm import recipe, text_tokenizer
from mmrdpm.data.documents import Draft, Drafter, ImageDraft
from mmrdpm.data.faults import check_broken
from mmrdpm.data.loader import Loader
from mmrdpm.data.mixture import Item, Mixture
from mmrdpm.data.packing import Lane
from mmrdpm.data.pictures import MAX_PIXELS
from mmrdpm.data.plan import DataPlan
from mmrdpm.data.records import Broken, Indexed, Interleaved, Pair, Text
from mmrdpm.errors import DataError, RecipeError
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.vocabulary import Vocabulary

PIXELS = np.zeros((16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def parts(tiny_tokenizers):
    images = image_tokenizer.load(tiny_tokenizers / "image")
    texts = text_tokenizer.load(tiny_tokenizers / "text")
    return images, texts, Vocabulary(texts.size, images.codebook_size)


@pytest.fixture
def drafter(parts):
    images, texts, vocabulary = parts

    def make(**plan):
        shape = {"seq_len": 48, "steps_per_image": 2, "max_caption_tokens": 8} | plan
        return Drafter(DataPlan(**shape), texts, vocabulary, images)

    return make


def drafts(drafter, record, seed=0):
    made = drafter.drafts(record, np.random.default_rng(seed))
    return made if isinstance(made, Broken) else list(made)


def test_a_pair_is_drawn_or_captioned(drafter):
    d = drafter(image_share=1.0, caption_share=0.0, caption_dropout=0.0)
    v, ids = d.vocabulary, tuple(d.texts.encode("cat"))
    (draft,) = drafts(d, Pair("k", PIXELS, ("cat",)))
    assert draft.parts[0] == (v.bos, *ids, v.image_start)
    assert len(draft.parts) == 2 and not draft.parts[1].clean
    assert draft.length((2, 2)) == len(ids) + 2 + 2 * 4
    (draft,) = drafts(drafter(image_share=0.0, caption_share=1.0), Pair("k", PIXELS, ("cat",)))
    assert draft.parts[0] == (v.bos, v.image_start)
    assert draft.parts[1].clean and draft.parts[1].timesteps == ()
    assert draft.parts[2] == (v.image_end, *ids, v.eos)


def test_a_long_caption_is_cut_and_has_no_end(drafter):
    d = drafter(image_share=0.0, caption_share=1.0)
    (draft,) = drafts(d, Pair("k", PIXELS, ("word " * 20_000,)))
    ids = tuple(d.texts.encode("word " * 8))[:8]
    assert draft.parts[2] == (d.vocabulary.image_end, *ids)


def test_one_of_several_captions_is_drawn(drafter):
    d = drafter(image_share=0.0, caption_share=1.0)
    seen = {drafts(d, Pair("k", PIXELS, ("a", "b")), seed)[0].parts[2] for seed in range(20)}
    assert len(seen) == 2


def test_a_long_text_is_cut_without_losing_a_token(drafter):
    d = drafter()
    text = "".join(chr(97 + i % 26) + " " for i in range(300))
    v, made = d.vocabulary, drafts(d, Text("k", text))
    assert all(len(m.parts) == 1 and m.length((2, 2)) <= 48 for m in made)
    assert all(m.length((2, 2)) == 48 for m in made[:-1])
    assert all(m.parts[0][0] == v.bos for m in made)
    joined = [i for m in made for i in m.parts[0][1:]]
    assert joined == [*d.texts.encode(text), v.eos]


def test_an_interleaved_document_is_cut_between_images(drafter):
    d, v = drafter(seq_len=40), drafter().vocabulary
    made = drafts(d, Interleaved("k", ("ab", PIXELS, PIXELS, PIXELS)))
    assert len(made) == 2 and all(m.length((2, 2)) <= 40 for m in made)
    images = [image for m in made for image in m.images]
    assert len(images) == 3 and all(len(i.timesteps) == 2 for i in images)
    assert [i.clean for i in images] == [True, False, True]
    first, second = made
    assert first.parts[2] == (v.image_end, v.image_start)
    assert second.parts[0] == (v.bos, v.image_start)
    assert second.parts[-1] == (v.image_end, v.eos)


def test_an_interleaved_document_trains_as_one(parts, tmp_path):
    images, texts, vocabulary = parts
    Image.new("RGB", (20, 10), "red").save(tmp_path / "a.png")
    line = '{"segments": [{"text": "see"}, {"image": "a.png"}, {"text": "end"}]}'
    (tmp_path / "d.jsonl").write_text(line)
    source = {"type": "interleaved", "path": str(tmp_path)}
    shape = {"rows": 1, "seq_len": 48, "steps_per_image": 2, "max_caption_tokens": 8}
    plan = recipe.from_dict(DataPlan, {"sources": {"d": source}, **shape}, "test")
    batch = Loader(plan, 0, images, texts, vocabulary).batch()
    timesteps = batch.timesteps[0][batch.layout.document_ids[0] == 0].tolist()
    blocks = [t for i, t in enumerate(timesteps) if t >= 0 and timesteps[i - 1] != t]
    assert len(blocks) == 3 and blocks[2] == 0 and blocks[0] > blocks[1] > 0


def encoded(picture, fmt, cut=0, **options):
    stream = io.BytesIO()
    picture.save(stream, fmt, **options)
    return stream.getvalue()[: -cut or None]


noise = Image.effect_noise((64, 64), 80).convert("RGB")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "not a picture that can be read"),
        (b"GIF89a", "not a picture that can be read"),
        (encoded(noise, "JPEG", cut=500), "the picture could not be read"),
        (encoded(noise, "PNG", cut=2000), "the picture could not be read"),
        (
            encoded(Image.new("1", (MAX_PIXELS // 5_000 + 1, 5_000)), "PNG"),
            "more pixels than the limit of 64 megapixels",
        ),
        (
            encoded(Image.new("1", (20_000, 20_000)), "PNG"),
            "more pixels than the limit of 64 megapixels",
        ),
    ],
)
def test_hostile_pictures_are_broken_records(drafter, content, cause):
    broken = drafts(drafter(), Pair("k", content, ("cat",)))
    assert (broken.key, broken.cause) == ("k", cause)


@pytest.mark.parametrize(
    ("picture", "fmt", "colour"),
    [
        (Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "JPEG", (255, 0, 0)),
        (Image.new("RGB", (9, 9), "blue").convert("P"), "GIF", (0, 0, 255)),
        (Image.fromarray(np.full((9, 9), 257 * 90, np.uint16)), "PNG", (90, 90, 90)),
        (Image.new("RGBA", (9, 9), (0, 0, 0, 0)), "PNG", (255, 255, 255)),
    ],
)
def test_every_mode_of_picture_becomes_rgb(drafter, picture, fmt, colour):
    more = {"save_all": True, "append_images": [Image.new("P", (9, 9))]} if fmt == "GIF" else {}
    (draft,) = drafts(drafter(), Pair("k", encoded(picture, fmt, **more), ("cat",)))
    assert draft.images[0].image.shape == (16, 16, 3)
    assert np.abs(draft.images[0].image[8, 8].astype(int) - colour).max() <= 2


def test_texts_that_cannot_be_used_are_broken_records(drafter):
    d = drafter()
    assert drafts(d, Pair("k", PIXELS, (" \n",))).cause == "empty caption"
    assert drafts(d, Text("k", "")).cause == "empty text"
    assert drafts(d, Interleaved("k", (" ", "\n"))).cause == "empty text"
    assert len(drafts(d, Interleaved("k", (" ", "a")))) == 1
    assert drafts(d, Text("k", "\ud800")).cause == "not Unicode text"
    large = np.zeros((6, 8, 4), np.float16)
    assert drafts(d, Interleaved("k", (large,))).cause == "longer than a row"


def test_plans_that_cannot_work_are_refused(drafter):
    with pytest.raises(DataError, match=r"seq_len is 16, but an image takes up to 12 .* to 23"):
        drafter(seq_len=16).check_fits()
    sources = {"a": {"type": "glosses", "weight": 0.5}, "b": {"type": "emoji", "weight": 0.3}}
    with pytest.raises(RecipeError, match=r"add up to 0\.8, not to 1: .* a: 0\.625, b: 0\.375"):
        recipe.from_dict(DataPlan, {"sources": sources}, "test")


def lane(lengths, seq_len, look_ahead, state=None):
    """A lane over drafts of given lengths, endless, numbered by their first token."""

    def read(place):
        for n in count(place or 0):
            length = lengths[n % len(lengths)]
            if length is None:
                yield Item(n, "s", Broken(str(n), "bad"))
            else:
                yield Item(n, "s", Draft(((n,) * length,)))

    return Lane(read, lambda draft: draft.length(()), seq_len, look_ahead, state)


def numbers(row):
    return [draft.parts[0][0] for draft in row[0]]


def test_a_row_takes_the_oldest_then_the_longest_that_fits():
    #        0  1  2  3  4  5  6  7
    packed = lane([5, 6, 3, 2, 4, 7, 1, 9], 10, 3)
    assert numbers(packed.row()) == [0, 2, 3]  # 5 of 10; of 6, 3, 2 then 3; of 6, 2, 4 then 2
    counts = {"seen": 6, "broken": {}, "sources": {"s": [6, 0]}}
    assert packed.state() == {"place": 1, "taken": [1, 2], "read": 5, "reached": 5, **counts}
    assert numbers(packed.row()) == [1, 4]  # 6 of 10; of 4, 7, 1 then 4


def test_no_document_waits_for_long_and_none_is_lost():
    random = np.random.default_rng(0)
    lengths = random.integers(1, 64, 400).tolist()
    packed, taken = lane(lengths, 64, 8), []
    for row in range(150):
        taken.append(numbers(packed.row()))
        assert min(packed.state()["place"], row) >= row - 8  # one of the oldest goes each row
    flat = [n for row in taken for n in row]
    waiting = set(range(max(flat))) - set(flat)
    assert len(flat) == len(set(flat)) and len(waiting) <= 8
    assert all(sum(lengths[n % 400] for n in row) <= 64 for row in taken)


@pytest.mark.parametrize("stop", range(0, 12, 3))
def test_a_lane_goes_on_from_its_state_with_its_counts(stop):
    lengths = [5, None, 3, 9, 2, None, 4, 4, 1]
    whole, packed = lane(lengths, 10, 4), lane(lengths, 10, 4)
    rows = [numbers(whole.row()) for _ in range(12)]
    for row in range(stop):
        assert numbers(packed.row()) == rows[row]
    resumed = lane(lengths, 10, 4, packed.state())
    assert [numbers(resumed.row()) for _ in range(12 - stop)] == rows[stop:]
    assert resumed.state() == whole.state() and whole.broken["s: bad"] > 3
    assert whole.state()["sources"] == {"s": [whole.seen, whole.broken["s: bad"]]}


def test_packing_fills_rows_of_a_mix_of_images_and_texts():
    """Lengths as of 256-pixel pairs, 4 of 10 steps of 16x16 positions, and web texts."""

    def length(n):
        random = np.random.default_rng(n)
        kind, caption = random.random(), int(np.clip(random.lognormal(2.7, 0.6), 2, 128))
        if kind < 0.55:
            return 4 * 256 + caption + 2
        return 256 + caption + 4 if kind < 0.8 else int(np.clip(random.lognormal(5.5, 1), 8, 8192))

    packed = lane([length(n) for n in range(5000)], 8192, 16)
    used = sum(draft.length(()) for _ in range(100) for draft in packed.row()[0])
    assert used / (100 * 8192) > 0.95


def useful_share(loader, batches):
    """The share of tokens that are no padding."""
    rows = [loader.batch().layout.document_ids for _ in range(batches)]
    return (torch.cat(rows) >= 0).float().mean()


def test_rows_of_a_mixture_hold_little_padding(parts):
    images, texts, vocabulary = parts
    sources = {"e": {"type": "emoji", "weight": 0.6}, "g": {"type": "glosses", "weight": 0.4}}
    shape = {"rows": 4, "seq_len": 256, "steps_per_image": 3}
    plan = recipe.from_dict(DataPlan, {"sources": sources, **shape}, "test")
    assert useful_share(Loader(plan, 0, images, texts, vocabulary), 3) > 0.95


def test_the_embedded_stream_is_packed_better_where_a_recipe_asks_for_it(parts):
    images, texts, vocabulary = parts
    plan = DataPlan(rows=4, steps_per_image=3, look_ahead=16)
    assert useful_share(Loader(plan, 0, images, texts, vocabulary), 1) > 0.95


def test_broken_records_are_logged_and_too_many_stop_the_run(parts, tmp_path):
    images, texts, vocabulary = parts
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(20):
        Image.new("RGB", (8, 8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("word" if i % 5 else "")
    source = {"p": {"type": "folder", "path": str(folder)}}
    shape = {"rows": 2, "seq_len": 64, "steps_per_image": 2, "max_caption_tokens": 8}

    def make(share, **more):
        mapping = {"sources": source, "max_broken_share": share, **shape, **more}
        plan = recipe.from_dict(DataPlan, mapping, "test")
        log = tmp_path / "skipped.jsonl"
        return Loader(plan, 0, images, texts, vocabulary, skipped_log=log)

    patient = make(0.3)
    for _ in range(10):
        patient.batch()
    lines = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert patient.rows.broken()["p: empty caption"] == len(lines) > 10
    assert '"key": "0.png"' in "".join(lines) and '"cause": "empty caption"' in lines[0]
    for workers in (0, 1):
        (tmp_path / "skipped.jsonl").unlink()
        strict, says = make(0.1, workers=workers), "records are broken.*max_broken_share.*p: empty"
        with pytest.raises(DataError, match=rf"{says}.*; all are listed in .*skipped\.jsonl$"):
            for _ in range(60):
                strict.batch()
        lines = (tmp_path / "skipped.jsonl").read_text().splitlines()  # with the last batch's
        assert len(lines) == strict.rows.broken().total()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_without_a_whole_record_lists_them_and_stops_the_run(parts, workers, tmp_path):
    images, texts, vocabulary = parts
    (tmp_path / "t.jsonl").write_text("{\n" * 20)
    source = {"t": {"type": "text", "path": str(tmp_path / "t.jsonl")}}
    shape = {"rows": 1, "seq_len": 64, "steps_per_image": 2, "max_caption_tokens": 8}
    plan = recipe.from_dict(DataPlan, {"sources": source, "workers": workers, **shape}, "test")
    log = tmp_path / "skipped.jsonl"
    loader = Loader(plan, 0, images, texts, vocabulary, skipped_log=log)
    with pytest.raises(DataError, match=r"500 records in a row are .*listed in .*skipped\.jsonl$"):
        loader.batch()
    assert len(log.read_text().splitlines()) == 500


def test_a_small_source_that_is_broken_stops_the_run(parts, tmp_path):
    images, texts, vocabulary = parts
    for name, lines in {"good": ['{"text": "a"}'], "bad": ['{"no": 1}', "{"]}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines * 9))
    sources = {
        name: {"type": "text", "path": str(tmp_path / f"{name}.jsonl"), "weight": weight}
        for name, weight in (("good", 0.98), ("bad", 0.02))
    }
    shape = {"rows": 2, "seq_len": 64, "steps_per_image": 2, "max_caption_tokens": 8}
    plan = recipe.from_dict(DataPlan, {"sources": sources, **shape}, "test")
    loader = Loader(plan, 0, images, texts, vocabulary)
    with pytest.raises(DataError, match=r"data\.sources\.bad: (\d+) of \1 of its records.* bad: "):
        for _ in range(400):
            loader.rows.next()
    assert loader.rows.broken().total() < 0.03 * loader.rows.seen()
    old = {lane: dict(s) for lane, s in loader.rows.state()["lanes"].items()}
    for state in old.values():
        del state["sources"]  # as an older checkpoint has none
    loader.rows.restore({"lanes": old})
    loader.rows.next()


def test_a_few_broken_records_at_the_start_stop_nothing():
    last = Broken("x", "a")
    check_broken(Counter({"a": 4}), 4, 0.05, last)
    check_broken(Counter({"a": 30, "b": 20}), 60, 0.05, last)
    with pytest.raises(DataError, match="51 of 60"):
        check_broken(Counter({"a": 30, "b": 21}), 60, 0.05, last)


def test_image_drafts_know_their_length():
    latents = ImageDraft(np.zeros((2, 6, 4), np.float16), 0, (3, 1), clean=True)
    assert latents.length((2, 2)) == 3 * 12


class Numbers(Indexed):
    """Nine texts."""

    def __len__(self):
        return 9

    def record(self, index):
        return Text(str(index), "text")

    def fingerprint(self):
        return "nine"


class Alike:
    def drafts(self, record, random):
        return [Draft(((1,),))]


def test_a_mixture_keeps_its_weights():
    mixture = Mixture({"a": Numbers(), "b": Numbers()}, {"a": 0.8, "b": 0.2}, 0, Alike())
    found = Counter(item.source for item in islice(mixture.documents(0, 1, None), 2000))
    assert found["a"] / 2000 == pytest.approx(0.8, abs=0.03)
