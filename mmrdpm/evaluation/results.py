"""The results of one suite over one model, and their file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmrdpm.errors import DataError
from mmrdpm.evaluation.figure import Figure
from mmrdpm.evaluation.store import RESULTS_FILE, read_json, write_json


@dataclass(frozen=True)
class NotComputed:
    """What is missing in the results, and why."""

    part: str
    why: str


@dataclass(frozen=True)
class Results:
    """Attributes:
    suite, settings: the suite's name, and all that it holds.
    model, weights_sha256: what was measured.
    """

    suite: str
    settings: dict[str, Any]
    model: str
    weights_sha256: str
    figures: list[Figure]
    not_computed: list[NotComputed]

    def save(self, folder: Path) -> None:
        """Writes `folder/results.json`."""
        write_json(folder / RESULTS_FILE, asdict(self))


def replaces(folder: Path, results: Results) -> bool:
    """Whether saving there would replace results of other settings of the suite."""
    if not (folder / RESULTS_FILE).exists():
        return False
    return load(folder).settings != results.settings


def load(path: Path) -> Results:
    """The results in a file, or in a folder that holds `results.json`.

    Raises:
        DataError: there are none, or the file is damaged.
    """
    if path.is_dir() and not (path / RESULTS_FILE).is_file():
        raise DataError(
            f"{path}: holds no {RESULTS_FILE}: name the folder of an evaluation, as RUN/eval/emoji"
        )
    path = path / RESULTS_FILE if path.is_dir() else path
    mapping = read_json(path)
    try:
        figures = [Figure.from_dict(figure) for figure in mapping.pop("figures")]
        missing = [NotComputed(**item) for item in mapping.pop("not_computed")]
        made = Results(**mapping, figures=figures, not_computed=missing)
        if not all(isinstance(text, str) for text in (made.model, made.weights_sha256)):
            raise ValueError("the model has no name or no hash")
        return made
    except DataError as error:
        raise DataError(f"{path}: {error}: run mmrdpm eval again") from None
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DataError(
            f"{path}: not the results of an evaluation: run mmrdpm eval again"
        ) from None
