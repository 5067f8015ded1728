import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from PIL import ExifTags, Image

import mmrdpm
from mmrdpm.document import TextSegment, pack
from mmrdpm.errors import CheckpointError, DataError, MmrdpmError, UsageError


@pytest.fixture(scope="module")
def model(tiny_run):
    return mmrdpm.load(tiny_run)


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


def picture(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_a_picture_depends_on_prompt_and_seed_alone(model):
    many = model.generate(["red heart", "a cat"], seed=3, n=3)
    assert [p.size for p in many] == [(16, 16)] * 6
    assert same(many[4], model.generate(["a cat"], seed=4)[0])
    assert not same(many[0], many[1])
    apart = model.generate(["red heart", "a cat"], guidance_scale=100.0)
    assert not same(*apart)
    assert same(model.trace("red heart", seed=3)[-1], many[0])
    assert model.generate([]) == []


def test_every_input_may_have_its_own_seed(model):
    both = model.generate(["red heart", "a cat"], seed=[3, 4], n=2)
    assert same(both[0], model.generate(["red heart"], seed=3)[0])
    assert same(both[3], model.generate(["a cat"], seed=np.int64(5))[0])
    own = model.reconstruct([picture(), picture()], [0, 1])
    assert same(own[0], model.reconstruct([picture()])[0]) and not same(*own)


def test_pictures_are_the_same_files_whatever_the_batch_size(model):
    prompts = [f"a cat {'and a dog ' * (i % 3)}" for i in range(20)]
    prompts[:17] = ["red heart"] * 17  # enough of one length to fill a group
    how = {"seed": 5, "guidance_scale": 100.0}  # at which the words of this model count
    expected = [model.generate([prompt], **how)[0] for prompt in prompts]
    assert len({picture.tobytes() for picture in expected}) == 4
    for size in (2, 7, 20):
        found = model.generate(prompts[-size:], **how)
        assert all(same(a, b) for a, b in zip(found, expected[-size:], strict=True))


def test_a_caption_depends_on_its_picture_alone(model):
    pictures = [picture(0), Image.new("L", (5, 5)), picture(1)]
    together = model.caption(pictures)
    assert together == [model.caption([p])[0] for p in pictures]


def test_a_picture_is_seen_upright(model, tmp_path):
    """As a file's tag says it is to be turned, by whomever it was opened."""
    upright = picture()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned by a quarter clockwise
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        seen, expected = model.reconstruct([turned, upright])
        assert same(seen, expected)
        assert model.score(turned, "a") == model.score(upright, "a")


def test_the_score_is_the_likelihood_of_every_continuation(model):
    """Of no token and of one: the model's own probabilities of the token and of the end."""
    model = model.to("cpu")
    image = picture()
    end = np.exp(model.score(image, ""))
    before, segment = model._looked_at(image)
    after = TextSegment((model.vocabulary.image_end,))
    row = pack([[[before, segment, after]]], 7, model.vocabulary, 4)
    texts = slice(model.vocabulary.code_offset)  # no code is ever written
    logits = model.transformer.logits(model.transformer(row), texts)[0, -1].double()
    probabilities = logits.softmax(-1)
    assert end == pytest.approx(probabilities[model.vocabulary.eos].item(), rel=1e-4)
    token = model.texts.encode("a")[0]
    longer = [before, segment, TextSegment((*after.token_ids, token))]
    row = pack([[longer]], 8, model.vocabulary, 4)
    then = model.transformer.logits(model.transformer(row), texts)[0, -1].double().softmax(-1)
    expected = probabilities[token].log() + then[model.vocabulary.eos].log()
    assert model.score(image, "a") == pytest.approx(expected.item(), rel=1e-4)


def test_a_text_is_continued_and_seeds_matter(model):
    assert model.complete("A lantern", max_tokens=5).startswith("A lantern")
    warm = {model.complete("A", max_tokens=8, temperature=1.0, seed=s) for s in range(4)}
    assert len(warm) > 1
    assert model.complete("A", 8, 1.0, seed=2) == model.complete("A", 8, 1.0, seed=2)


def test_the_space_between_a_text_and_what_follows_is_kept(model, monkeypatch):
    class Stripping:
        """Decodes as Llama's tokeniser does: without a space at the beginning."""

        size, encode = model.texts.size, staticmethod(model.texts.encode)

        def decode(self, ids):
            return model.texts.decode(ids).removeprefix(" ")

    monkeypatch.setattr(mmrdpm.api, "sample_text", lambda *_: model.texts.encode(" world"))
    assert replace(model, texts=Stripping()).complete("Hello") == "Hello world"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m.generate([" "]), "the prompt is empty"),
        (lambda m: m.generate(["word " * 200]), "make it shorter"),
        (lambda m: m.generate("red heart"), "list of prompts"),
        (lambda m: m.generate(p for p in ["a"]), "list of prompts"),
        (lambda m: m.generate(["a"], seed=-1), "seed -1"),
        (lambda m: m.generate(["a"], seed=1.5), "whole number"),
        (lambda m: m.generate(["a"], n=0), "at least 1"),
        (lambda m: m.generate(["a"], seed=2**32), "between 0 and 4294967295"),
        (lambda m: m.generate(["a", "b"], seed=[1]), "1 seeds for 2 inputs"),
        (lambda m: m.complete("a", max_tokens=0), "at least 1"),
        (lambda m: m.generate(["a"], guidance_schedule="odd"), "choose one of"),
        (lambda m: m.generate(["a"], expected_steps=-1), "expected steps -1"),
        (lambda m: m.generate(["a"], expected_steps=1.5), "whole number"),
        (lambda m: m.caption(Image.new("RGB", (4, 4))), "list of pictures"),
        (lambda m: m.caption(p for p in [Image.new("RGB", (4, 4))]), "list of pictures"),
        (
            lambda m: m.score(Image.new("RGB", (4, 4)), None),
            "score takes a picture and a text, not .* and None",
        ),
        (lambda m: m.generate(["a"], temperature=-1.0), "temperature -1.0"),
        (lambda m: m.generate(["a"], top_k=2.0), "top-k 2.0 must be a whole number"),
        (lambda m: m.caption([Image.new("F", (4, 4), 0.5)]), "floating point pixels"),
        (lambda m: m.score(Image.new("F", (4, 4), 0.5), "a"), "floating point pixels"),
        (lambda m: m.generate(["a"], guidance=2.0), "no 'guidance': choose among .*guidance_scale"),
        (lambda m: m.generate(["a"], guidance_scale="3"), "guidance scale 3: it must be a number"),
        (lambda m: m.trace("a", guidance_scale=None), "guidance scale None: it must be a number"),
        (lambda m: m.generate(["red", 5]), "5 is no text"),
        (lambda m: m.generate(["a"], n=1.5), "n is 1.5"),
        (lambda m: m.complete("a", max_tokens=1.5), "whole number"),
        (lambda m: m.complete("a", temperature="x"), "temperature x must be a number"),
        (lambda m: m.complete("a", temperature=10**400), "must be a number from 0 to 1e"),
        (lambda m: m.complete(5), "5 is no text"),
        (lambda m: m.complete(""), "is empty"),
        (lambda m: m.complete("word " * 200), "make it shorter"),
        (lambda m: m.score(Image.new("RGB", (4, 4)), "word " * 200), "make it shorter"),
    ],
)
def test_calls_that_make_no_sense_are_refused(model, call, says):
    with pytest.raises(UsageError, match=says):
        call(model)


def test_numbers_of_numpy_are_numbers(model):
    plain = {"temperature": 0.5, "top_k": 3, "top_p": 0.5, "guidance_scale": 2.0}
    theirs = {key: np.asarray(value)[()] for key, value in plain.items()}
    ours = model.generate(["cat"], n=2, expected_steps=1, **plain)
    found = model.generate(["cat"], n=np.int64(2), expected_steps=np.int64(1), **theirs)
    assert [p.tobytes() for p in found] == [p.tobytes() for p in ours]


def test_a_picture_without_pixels_is_refused(model):
    with pytest.raises(DataError, match="0x0"):
        model.caption([Image.new("RGB", (0, 0))])


def test_what_captions_a_picture_is_not_gone_on_with():
    assert mmrdpm.load().complete("syringe") == "syringe"


def test_a_model_of_before_a_key_was_added_is_as_it_was(tmp_path, tiny_run):
    folder = shutil.copytree(tiny_run, tmp_path / "old")
    spec = yaml.safe_load((folder / "recipe.yaml").read_text())
    del spec["sampling"]["expected_steps"], spec["train"]["soft_labels"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(spec))
    model = mmrdpm.load(folder)
    assert (model.transformer.lengthening, model.sampling.expected_steps) == (1.0, 0)
    del spec["train"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(spec))
    with pytest.raises(CheckpointError, match=r"train\.soft_labels must be a number"):
        mmrdpm.load(folder)


def test_models_that_cannot_be_loaded_are_refused(tmp_path, tiny_run):
    with pytest.raises(MmrdpmError, match="no such path"):
        mmrdpm.load("emoji-tinny")
    with pytest.raises(CheckpointError, match="no model"):
        mmrdpm.load(tmp_path)


def test_weights_of_another_vocabulary_are_refused(tmp_path, tiny_run):
    import shutil

    from mmrdpm import text_tokenizer

    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    text_tokenizer.train_bpe(["some text"], 270).save(run / "tokenizers" / "text")
    with pytest.raises(CheckpointError, match="320 text ids"):
        mmrdpm.load(run)
    shutil.copytree(
        tiny_run / "tokenizers" / "text", run / "tokenizers" / "text", dirs_exist_ok=True
    )
    path = run / "tokenizers" / "text" / "tokenizer.json"
    turned = path.read_text().replace('"a": ', '"A_": ').replace('"A": ', '"a": ')
    path.write_text(turned.replace('"A_": ', '"A": '))
    with pytest.raises(CheckpointError, match="trained with another text tokeniser"):
        mmrdpm.load(run)
    shutil.copytree(tiny_run / "tokenizers", run / "tokenizers", dirs_exist_ok=True)
    path = run / "tokenizers" / "image" / "tokenizer.yaml"
    path.write_text(path.read_text().replace("schedule: linear", "schedule: cubic"))
    with pytest.raises(CheckpointError, match=r"coded by {.*'linear'.* here has {.*'cubic'"):
        mmrdpm.load(run)
    torch.save({"w": torch.zeros(2)}, run / "step-9999999.safetensors")
    with pytest.raises(CheckpointError, match="pickled weights are never loaded"):
        mmrdpm.load(run)
