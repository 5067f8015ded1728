import pytest

from mmrdpm import text_tokenizer
from mmrdpm.errors import CheckpointError, DataError

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
