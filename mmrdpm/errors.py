"""What a user did wrong: every class here carries one line that the CLI prints as it is.

The line says what is wrong, where (file, key or record), and how to mend it.
"""

from __future__ import annotations

import unicodedata

_STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")  # categories of Unicode
_JOINER = "\u200d"  # inside of many an emoji


def printable(text: str) -> str:
    """The text as one line for a terminal: what would steer it, or break the line, as escapes."""
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _STEERING and character != _JOINER
        else character
        for character in text
    )


class MmrdpmError(Exception):
    """A mistake that the user can mend; never raised for a bug of ours."""


class RecipeError(MmrdpmError):
    """A recipe or an override that cannot be read as its schema says."""


class DataError(MmrdpmError):
    """An image, a text or a data source that cannot be used."""


class CheckpointError(MmrdpmError):
    """Weights or a run folder that are missing, damaged or of another shape."""


class DamagedError(CheckpointError):
    """A file of weights, or of a run's state, that cannot be read: a copy of it may be good."""


class UsageError(MmrdpmError):
    """A call that makes no sense: an empty prompt, a number out of range."""


class DistributedError(MmrdpmError):
    """Another process of the job is gone or does not answer."""


class TrainingError(MmrdpmError):
    """A run that cannot go on: its loss is no number, or its codebook has collapsed."""
