"""The guard against updates that would spoil a run: skip, count, go back, give up.

It looks at the norm of the gradient, which is the same on every rank, and which no bad loss leaves
unharmed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

_SMOOTHING = 0.98  # of the running mean of the norms
_UNJUDGED = 50  # updates before the running mean means something


@dataclass(frozen=True)
class GuardConfig:
    """When an update is bad, and what happens then.

    Attributes:
        spike: a gradient norm of so many times its running mean is bad; one that is no number
            always is. 0 lets spikes pass.
        patience: so many bad updates in a row bring the run back to its last checkpoint; the
            data goes on, so that it meets other documents.
        rollbacks: how often that may happen before the run gives up.
    """

    spike: float = field(default=20.0, metadata={"min": 0.0})
    patience: int = field(default=10, metadata={"min": 1})
    rollbacks: int = field(default=3, metadata={"min": 0})


@dataclass
class Guard:
    """The running mean and the counts; bad updates are skipped by the caller."""

    config: GuardConfig
    mean: float = 0.0
    accepted: int = 0
    bad_in_a_row: int = 0
    skipped: int = 0
    rollbacks: int = 0

    def accepts(self, norm: float) -> bool:
        """Whether an update with that gradient norm is good; counts it."""
        if self._is_bad(norm):
            self.bad_in_a_row, self.skipped = self.bad_in_a_row + 1, self.skipped + 1
            return False
        self.bad_in_a_row = 0
        self.accepted += 1
        kept = min(_SMOOTHING, 1 - 1 / self.accepted)
        self.mean = kept * self.mean + (1 - kept) * norm
        return True

    def _is_bad(self, norm: float) -> bool:
        judged = self.config.spike > 0 and self.accepted >= _UNJUDGED
        return not math.isfinite(norm) or (judged and norm > self.config.spike * self.mean)

    @property
    def lost_patience(self) -> bool:
        """Whether it is time to go back to the last checkpoint."""
        return self.bad_in_a_row >= self.config.patience

    def report(self) -> str:
        """What to say of a bad update."""
        return f"bad gradient: update skipped ({self.bad_in_a_row} in a row, {self.skipped} in all)"

    def state(self) -> dict[str, float]:
        """What `restore` takes."""
        return {name: value for name, value in asdict(self).items() if name != "config"}

    def restore(self, state: dict[str, float]) -> None:
        """Goes back to a saved state."""
        for name, value in state.items():
            setattr(self, name, value)
