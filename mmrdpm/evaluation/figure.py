"""A figure: a value that carries how it was got, and so what it may be set beside."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmrdpm.errors import DataError
from mmrdpm.metrics.features import sha256_of
from mmrdpm.metrics.interval import ANY, Interval, mean_interval
from mmrdpm.metrics.proportion import Proportion

Protocol = Mapping[str, Any]
"""Flat: evaluator, its weights' hash, preprocessing, counts, guidance, seed, hash of the data."""


@dataclass(frozen=True)
class Figure:
    """One measured number.

    Attributes:
        name: `part/group/metric`, such as `drawn/training concepts/named in top 10`.
        interval: 95%: of Wilson for shares, by the bootstrap for everything else; never beyond
            what the figure can be.
        unit: `share`, `dB`, `nats`, `bits/byte`, ... or empty.
        count: samples that the value is over.
        protocol: two figures may be set side by side only where this is equal.
        note: what a reader has to know besides; empty where there is nothing.
    """

    name: str
    value: float
    interval: Interval
    unit: str
    count: int
    protocol: Protocol = field(default_factory=dict)
    note: str = ""

    @classmethod
    def share(cls, name: str, hits: Sequence[bool], protocol: Protocol) -> Figure:
        """Of successes."""
        found = Proportion(sum(hits), len(hits))
        return cls(name, found.share, found.interval, "share", len(hits), protocol)

    @classmethod
    def mean(
        cls,
        name: str,
        values: Sequence[float],
        unit: str,
        protocol: Protocol,
        limits: Interval = ANY,
    ) -> Figure:
        """Of one value per record, each within `limits`, and so the interval too."""
        mean, interval = mean_interval(values, limits=limits)
        return cls(name, mean, interval, unit, len(values), protocol)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Figure:
        """Raises DataError where `to_dict` did not make it; it names the figure and the key."""
        name = f"figure {mapping.get('name')!r}" if isinstance(mapping, Mapping) else "a figure"
        try:
            low, high = mapping["interval"]
            made = cls(**{**mapping, "interval": (low, high)})
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{name} has not the keys of one, or no interval of two") from None
        for key, values, kind, called in (
            ("name", [made.name], str, "a text"),
            ("value", [made.value], (int, float), "a number"),
            ("interval", [low, high], (int, float), "two numbers"),
            ("unit", [made.unit], str, "a text"),
            ("count", [made.count], int, "a whole number"),
            ("protocol", [made.protocol], Mapping, "a mapping"),
        ):
            if not all(isinstance(value, kind) for value in values):
                raise DataError(f"{name}: its {key} is {mapping.get(key)!r}, not {called}")
        return made

    def __str__(self) -> str:
        low, high = self.interval
        if self.unit == "share":
            hits = round(self.value * self.count)
            return f"{self.value:.1%} ({hits} of {self.count}, 95% {low:.1%} to {high:.1%})"
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.value:.4g}{unit} (n={self.count}, 95% {low:.4g} to {high:.4g})"


def digest(value: Any) -> str:
    """SHA-256 of anything that JSON can hold, as hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of_files(folder: Path, names: Sequence[str]) -> str:
    """SHA-256 of those of the files that are there, by name and content."""
    found = {name: sha256_of(folder / name) for name in names if (folder / name).is_file()}
    return digest(found)


def digest_of_pictures(pictures: Sequence[Image.Image], names: Sequence[str]) -> str:
    """SHA-256 of pixels and names: which data a figure is over."""
    hashed = hashlib.sha256("\0".join(names).encode())
    for picture in pictures:
        pixels = np.asarray(picture.convert("RGB"))
        hashed.update(str(pixels.shape).encode() + pixels.tobytes())
    return hashed.hexdigest()
