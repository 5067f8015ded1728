"""The embedded data as sources: emoji with their names, and definitions of nouns."""

from __future__ import annotations

from mmrdpm.data.emoji import load_emoji
from mmrdpm.data.glosses import load_glosses
from mmrdpm.data.records import Indexed, Pair, Text

_SIZE = 72  # pixels of the pictures as they come


class EmojiPairs(Indexed):
    """The training split of the emoji."""

    def __init__(self) -> None:
        self.data = load_emoji(_SIZE)
        self.chosen = self.data.indices("train")

    def __len__(self) -> int:
        return len(self.chosen)

    def record(self, index: int) -> Pair:
        i = self.chosen[index]
        return Pair(f"emoji:{self.data.names[i]}", self.data.images[i], (self.data.names[i],))

    def fingerprint(self) -> str:
        return f"emoji, {len(self)} pictures"


class Glosses(Indexed):
    """The definitions, one a record."""

    texts_only = True

    def __init__(self) -> None:
        self.texts = load_glosses()

    def __len__(self) -> int:
        return len(self.texts)

    def record(self, index: int) -> Text:
        return Text(f"gloss:{index}", self.texts[index])

    def fingerprint(self) -> str:
        return f"glosses, {len(self)} texts"
