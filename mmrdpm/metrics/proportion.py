"""A share of successes with its uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Proportion:
    """`hits` of `count`, with the 95% interval of Wilson 1927 (doi 10.2307/2276774)."""

    hits: int
    count: int

    @property
    def share(self) -> float:
        return self.hits / self.count

    @property
    def interval(self) -> tuple[float, float]:
        z, n, p = 1.959964, self.count, self.share
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))  # rounding

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.share:.1%} ({self.hits} of {self.count}, 95% {low:.1%} to {high:.1%})"
