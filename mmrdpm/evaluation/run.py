"""One suite over one model: computes what is missing, keeps it, reports all of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from mmrdpm import api, checkpoint, recipe, shipped
from mmrdpm.api import IMAGE_TOKENIZER, TOKENIZER_FILES
from mmrdpm.errors import CheckpointError, MmrdpmError
from mmrdpm.evaluation.captions import CaptionsEvaluation
from mmrdpm.evaluation.emoji import EmojiEvaluation
from mmrdpm.evaluation.figure import digest
from mmrdpm.evaluation.part import Part, Shown
from mmrdpm.evaluation.prompts import PromptsEvaluation
from mmrdpm.evaluation.published import ImagenetEvaluation
from mmrdpm.evaluation.report import write_report
from mmrdpm.evaluation.results import NotComputed, Results, replaces
from mmrdpm.evaluation.store import REPORT_FILE, RESULTS_FILE, Store
from mmrdpm.evaluation.suite import (
    EmojiSuite,
    ImagenetSuite,
    PromptsSuite,
    Suite,
    TokenizerSuite,
)
from mmrdpm.evaluation.tokenizer import TokenizerEvaluation
from mmrdpm.metrics.features import MissingEvaluator, sha256_of
from mmrdpm.rdpm import image_tokenizer


class Evaluation(Protocol):
    """A suite's own work."""

    def parts(self) -> Iterator[Part]: ...

    def shown(self) -> Iterator[Shown]: ...


def evaluate(
    model: str, suite: Suite, suite_name: str, out: Path | None = None
) -> tuple[Results, Path]:
    """Computes what is missing in `out`, writes results and report there; gives both.

    Interrupted, it keeps every finished part and picture; the same call goes on.

    Args:
        model: name of a shipped model or a run folder; for a tokenizer suite also a tokeniser.
        out: default `RUN/eval/SUITE`, or `runs/eval/MODEL-SUITE` for a shipped model.

    Raises:
        MmrdpmError: the model lacks what the suite needs, the data are too few or missing, or
            nothing at all could be computed.
    """
    home, folder, weights = _subject(model, suite)
    out = out or default_folder(home, suite_name)
    hashes = [sha256_of(path) for path in _files(folder, weights)]
    store = Store(out, digest(hashes))
    evaluation = _evaluation(folder, suite, store)
    results = Results(suite_name, recipe.to_dict(suite), home.resolve().name, hashes[0], [], [])
    if replaces(out, results):
        store.say(f"{RESULTS_FILE} there is of other settings and is replaced: --out keeps both")
    missing: MissingEvaluator | None = None
    parts = list(evaluation.parts())
    for number, part in enumerate(parts, start=1):
        store.say(part.name)
        try:
            results.figures.extend(store.figures(part.name, part.of, part.make))
        except MissingEvaluator as error:
            results.not_computed.append(NotComputed(part.name, str(error)))
            missing = missing or MissingEvaluator(f"{part.name}: {error}")
        left = [NotComputed(later.name, "stopped before it") for later in parts[number:]]
        (out / REPORT_FILE).unlink(missing_ok=True)  # it shows the results before these
        replace(results, not_computed=[*results.not_computed, *left]).save(out)
    if missing and not results.figures:
        raise missing
    write_report(results, list(evaluation.shown()), out / REPORT_FILE)
    return results, out


def default_folder(folder: Path, suite_name: str) -> Path:
    """Where results go: inside a run; beside other runs for what is shipped."""
    place = folder.resolve()
    if any(place.parent == shipped.folder(kind).resolve() for kind in ("models", "tokenizers")):
        return Path("runs/eval") / f"{place.name}-{suite_name}"
    return folder / "eval" / suite_name


def _subject(model: str, suite: Suite) -> tuple[Path, Path, Path]:
    """The folder that the user named, that of what is measured, and the file of its weights."""
    if isinstance(suite, TokenizerSuite):
        home, folder = _tokenizer_folder(model)
        return home, folder, folder / image_tokenizer.WEIGHTS_FILE
    folder = _model_folder(model)
    weights = checkpoint.newest(folder) if folder.is_dir() else None
    if weights is None:
        holds = (folder / image_tokenizer.SPEC_FILE).is_file()
        hint = ": it is an image tokeniser: use --suite tokenizer" if holds else ""
        raise CheckpointError(
            f"{folder}: no trained model, which this suite needs{hint or ': give a run folder'}"
        )
    return folder, folder, weights


def _files(folder: Path, weights: Path) -> list[Path]:
    """All that makes what is measured: first the weights, then recipe and tokenizers."""
    places = {folder: image_tokenizer.FILES, **{folder / k: v for k, v in TOKENIZER_FILES.items()}}
    named = [place / name for place, names in places.items() for name in names]
    return [p for p in (weights, folder / checkpoint.RECIPE_FILE, *named) if p.is_file()]


def _model_folder(name: str) -> Path:
    """The named folder, of a shipped tokeniser too: what it holds is told apart after this."""
    try:
        return shipped.resolve("models", name)
    except MmrdpmError:
        with suppress(MmrdpmError):
            return shipped.resolve("tokenizers", name)
        raise


def _tokenizer_folder(name: str) -> tuple[Path, Path]:
    """The named folder, and an image tokeniser's: itself, or that inside a model."""
    try:
        folder = shipped.resolve("tokenizers", name)
    except MmrdpmError:
        folder = shipped.resolve("models", name)
    for place in (folder, folder / IMAGE_TOKENIZER):
        if (place / image_tokenizer.SPEC_FILE).is_file():
            return folder, place
    raise CheckpointError(
        f"{folder}: no image tokeniser, which this suite needs: give a folder that holds"
        f" {image_tokenizer.SPEC_FILE}, or a run"
    )


def _evaluation(folder: Path, suite: Suite, store: Store) -> Evaluation:
    if isinstance(suite, TokenizerSuite):
        return TokenizerEvaluation(image_tokenizer.load(folder), suite, store)
    model = api.load(folder)
    if isinstance(suite, EmojiSuite):
        return EmojiEvaluation(model, suite, store)
    if isinstance(suite, ImagenetSuite):
        return ImagenetEvaluation(model, suite, store)
    if isinstance(suite, PromptsSuite):
        return PromptsEvaluation(model, suite, store)
    return CaptionsEvaluation(model, suite, store)
