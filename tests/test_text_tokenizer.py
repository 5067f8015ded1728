import json

import pytest
import torch
from PIL import Image

import mmrdpm
from mmrdpm import recipe, text_tokenizer
from mmrdpm.data.emoji import load_emoji
from mmrdpm.data.sources import SourceConfig
from mmrdpm.data.texts import TextPlan, read_texts
from mmrdpm.errors import CheckpointError, DataError
from mmrdpm.export import export
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.train_model import train
from mmrdpm.train_tokenizer import TextTokenizerRecipe, train_text

CORPUS = ["the quick brown fox", "a red heart, a blue heart"] * 20
TEXTS = [
    "red heart",
    "  two  spaces ",
    "a\tb\nc\r\n",
    "\u2581x\u2581",
    "\0",
    "\ue000a\ue000",
    "<|bos|><0x41> <unk> </s>",
    "👩🏽‍🚀 é e\u0301 \u200b",
    "",
]
TRAINERS = {
    "bpe": lambda: text_tokenizer.train_bpe(CORPUS, 300),
    "sentencepiece": lambda: text_tokenizer.train_sentencepiece(CORPUS, 330),
}


@pytest.mark.parametrize("kind", TRAINERS)
def test_any_text_survives_saving_and_a_round_trip(kind, tmp_path):
    trained = TRAINERS[kind]()
    trained.save(tmp_path)
    loaded = text_tokenizer.load(tmp_path)
    assert loaded.fingerprint() == trained.fingerprint()
    for text in TEXTS:
        ids = loaded.encode(text)
        assert loaded.decode(ids) == text
        assert all(0 <= i < loaded.size for i in ids)


@pytest.mark.parametrize("kind", TRAINERS)
def test_training_is_deterministic_and_shortens_known_text(kind):
    first, second = TRAINERS[kind](), TRAINERS[kind]()
    assert first.fingerprint() == second.fingerprint()
    assert len(first.encode("the quick brown fox")) < 10


def test_a_lone_surrogate_is_refused():
    with pytest.raises(DataError, match="surrogate"):
        TRAINERS["bpe"]().encode("a\ud800b")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_damaged_and_missing_files_are_refused(name, tmp_path):
    with pytest.raises(CheckpointError, match="neither"):
        text_tokenizer.load(tmp_path)
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(CheckpointError, match=name):
        text_tokenizer.load(tmp_path)


def test_texts_keep_their_length_whatever_the_file_says():
    trained = TRAINERS["bpe"]()
    text = "the quick brown fox " * 9
    ids = trained.encode(text)
    trained.model.enable_truncation(3)
    trained.model.enable_padding(length=500)
    limited = text_tokenizer.BPE(trained.model)
    assert limited.encode(text) == ids and limited.decode(ids) == text


def test_a_tokeniser_learns_from_the_texts_and_captions_of_any_source(tmp_path):
    lines = [json.dumps({"text": f"zyzzyva number {i}"}) for i in range(40)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    for i in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(f"a qwertyuiop of kind {i}")
    sources = {
        "lines": SourceConfig("text", 0.5, str(tmp_path / "t.jsonl")),
        "pairs": SourceConfig("folder", 0.5, str(tmp_path)),
    }
    found = list(read_texts(TextPlan(sources)))
    assert sorted(found[-3:]) == [f"a qwertyuiop of kind {i}" for i in range(3)]
    assert len(found) == 43 and set(found[:40]) == {f"zyzzyva number {i}" for i in range(40)}
    few = list(read_texts(TextPlan(sources, records=20)))
    assert len(few) == 13 and few[:10] == found[:10]
    recipe = TextTokenizerRecipe(vocab_size=400, data=TextPlan(sources))
    trained = train_text(recipe, tmp_path / "made")
    assert len(trained.encode("zyzzyva number 7")) < 6
    for line in ("no JSON", '{"text": "\\ud83d"}'):
        (tmp_path / "t.jsonl").write_text(f"{line}\n" * 40)
        with pytest.raises(DataError, match=r"lines: 40 of 40 of its .* then start again"):
            list(read_texts(TextPlan(sources)))


@pytest.mark.parametrize("kind", TRAINERS)
def test_a_long_text_is_learned_from_too(kind):
    long = " ".join(f"zyzzyva {i}" for i in range(2000))  # over 4,192 bytes
    train = {"bpe": text_tokenizer.train_bpe, "sentencepiece": text_tokenizer.train_sentencepiece}
    assert len(train[kind]([long], 300).encode("zyzzyva")) == 1


def test_a_model_on_a_sentencepiece_tokeniser_goes_on_and_is_exported(tiny_recipe, tmp_path):
    text_tokenizer.train_sentencepiece(load_emoji(16).names, 600).save(tmp_path / "text")
    more = [f"tokenizers.text={tmp_path / 'text'}", "train.steps=4", "checkpoint.every=2"]
    loaded = recipe.load(ModelRecipe, tiny_recipe, [*more, "samples.prompts=[]"])
    run = tmp_path / "run"
    assert train(loaded, run)
    last = run / "step-0000004.safetensors"
    whole = last.read_bytes()
    last.unlink()
    assert train(loaded, run, resume=True)
    assert torch.cuda.is_available() or last.read_bytes() == whole  # promised for CPUs alone
    made = export(run, tmp_path / "small")
    assert [p.name for p in (made / "tokenizers/text").iterdir()] == ["tokenizer.model"]
    assert mmrdpm.load(made).complete("red", max_tokens=3).startswith("red")
