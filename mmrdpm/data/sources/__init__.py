"""Data sources by the `type` that a recipe names, one file each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from mmrdpm.data.records import Source
from mmrdpm.data.sources.cached import CachedLatents
from mmrdpm.data.sources.embedded import EmojiPairs, Glosses
from mmrdpm.data.sources.folder import ImageFolder
from mmrdpm.data.sources.huggingface import open_dataset
from mmrdpm.data.sources.interleaved import InterleavedFiles
from mmrdpm.data.sources.texts import TextFiles
from mmrdpm.data.sources.webdataset import Shards
from mmrdpm.errors import RecipeError

Type = Literal[
    "emoji", "glosses", "folder", "text", "interleaved", "webdataset", "huggingface", "cache"
]


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture.

    Attributes:
        weight: share of the mixture's records; all weights add up to 1.
        path: file, folder, glob, URL or hub id, see the type.
        image, caption, text, label: names of columns, JSON keys or archive members; empty for
            the type's usual names.
        template: makes captions of class labels, as in "a photo of a {label}".
        subset, split, streaming, revision: of a Hugging Face data set.
    """

    type: Type
    weight: float = field(default=1.0, metadata={"min": 0.0001, "max": 1.0})
    path: str = ""
    image: str = ""
    caption: str = ""
    text: str = ""
    label: str = ""
    template: str = ""
    subset: str = ""
    split: str = "train"
    streaming: bool = False
    revision: str = ""

    def taken(self) -> str:
        """What is taken of the data at the path: the other keys that are set, as text."""
        keys = (key for key in dataclasses.fields(self) if key.name not in ("weight", "path"))
        return ", ".join(
            f"{key.name}: {value}"
            for key in keys
            if (value := getattr(self, key.name)) != key.default
        )


_KEYS: dict[str, str] = {
    "emoji": "",
    "glosses": "",
    "folder": "path caption template",
    "text": "path text",
    "interleaved": "path",
    "webdataset": "path image caption label template",
    "huggingface": "path image caption text label template subset split streaming revision",
    "cache": "path",
}


def open_source(name: str, config: SourceConfig, captions: bool = True) -> Source:
    """Opens a source; nothing but its list of records is read yet.

    Args:
        captions: whether those of pictures are wanted; else they need not be there, and pairs have
            none.

    Raises:
        RecipeError: a key has no meaning for the type, or the path is missing.
        DataError: the source is not there, empty or not of that type.
    """
    known = _KEYS[config.type].split()
    for key in dataclasses.fields(config):
        given = getattr(config, key.name)
        if key.name not in ["type", "weight", *known] and given != key.default:
            raise RecipeError(
                f"data.sources.{name}.{key.name}: a source of type {config.type} has no such key:"
                f" leave it out (known: {', '.join(known) or 'none'})"
            )
    if "path" in known and not config.path:
        raise RecipeError(f"data.sources.{name}.path is missing: say where the data lie")
    if config.template and "{label}" not in config.template:
        raise RecipeError(
            f"data.sources.{name}.template is {config.template!r}: it must hold {{label}}, as in"
            " 'a photo of a {label}'"
        )
    try:
        config.template.format(label="")
    except (KeyError, IndexError, ValueError, AttributeError):
        raise RecipeError(
            f"data.sources.{name}.template is {config.template!r}: it may hold {{label}} and no"
            " other braces; write {{ and }} for real ones"
        ) from None
    return _open(config, captions)


def _open(config: SourceConfig, captions: bool) -> Source:
    c = config
    match c.type:
        case "emoji":
            return EmojiPairs()
        case "glosses":
            return Glosses()
        case "folder":
            return ImageFolder(c.path, c.caption, c.template, captions)
        case "text":
            return TextFiles(c.path, c.text)
        case "interleaved":
            return InterleavedFiles(c.path)
        case "webdataset":
            return Shards(c.path, c.image, c.caption, c.label, c.template, captions)
        case "cache":
            return CachedLatents(c.path)
    columns = {"image": c.image, "caption": c.caption, "text": c.text, "label": c.label}
    which = (c.path, c.subset, c.split, c.streaming, columns, c.template, c.revision)
    return open_dataset(*which, captions)
