"""Mean losses per modality and timestep over all ranks, speed, memory and the wait for data."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from mmrdpm import distributed, machine
from mmrdpm.objective import Losses


class Meter:
    """What happened since it was last read.

    Args:
        peak: floating point operations per second of one rank's device.
        weights: as many as every token, every text target and every code target is multiplied with.
    """

    def __init__(
        self, num_timesteps: int, device: torch.device, peak: float, weights: tuple[int, int, int]
    ) -> None:
        self.num_timesteps, self.device, self.peak = num_timesteps, device, peak
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self._clear()

    def _clear(self) -> None:
        self.sums = torch.zeros(self.num_timesteps + 2, dtype=torch.float64)
        self.counts = torch.zeros_like(self.sums)
        # useful ones, text targets, code targets, all with padding: since `begun`, unlike sums
        self.tokens = torch.zeros(4, dtype=torch.float64)
        self.waited, self.begun = 0.0, 0.0

    def start(self) -> float:
        """Says that an update begins; gives the time, in seconds."""
        now = time.perf_counter()
        self.begun = self.begun or now
        return now

    def add(self, losses: Sequence[Losses], document_ids: Tensor, waited: float) -> None:
        """Takes in one update of this rank: its losses, its rows, seconds waited for data."""
        for part in losses:
            row = (part.timesteps + 1).cpu()  # 0 is text, 1 the clean block, which has no loss
            self.sums.index_add_(0, row, part.per_token.double().cpu())
            self.counts.index_add_(0, row, torch.ones(len(row), dtype=torch.float64))
            codes = (row > 0).sum().item()
            self.tokens += torch.tensor([0, len(row) - codes, codes, 0])
        useful = (document_ids >= 0).sum().item()
        self.tokens += torch.tensor([useful, 0, 0, document_ids.numel()])
        self.waited += waited

    def done(self) -> tuple[float, float]:
        """Tokens of this rank, padding left out, and the floating point operations of their
        products, forward and backward: six for each weight that one is multiplied with."""
        return self.tokens[0].item(), self._operations(self.tokens)

    def _operations(self, tokens: Tensor) -> float:
        return 6 * (self.weights * tokens[:3]).sum().item()

    def state(self) -> dict[str, Tensor]:
        """What `restore` takes: the sums of all ranks; all must call it."""
        return {"sums": self._reduced(self.sums), "counts": self._reduced(self.counts)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Goes back to saved sums; the time begins anew."""
        self._clear()
        if distributed.is_main():
            self.sums, self.counts = state["sums"].clone(), state["counts"].clone()

    def figures(self) -> tuple[dict[str, float], dict[str, str]]:
        """All figures for the log, and the few to show; begins anew. All ranks must call it."""
        sums, counts, tokens = map(self._reduced, (self.sums, self.counts, self.tokens))
        elapsed = time.perf_counter() - self.begun
        means, useful = sums / counts, tokens[0].item()
        image = (sums[2:].sum() / counts[2:].sum()).item()
        logged = {
            "loss/text": means[0].item(),
            "loss/image": image,
            **{f"loss/timestep_{t:02d}": means[t + 1].item() for t in self._seen(counts)},
            "tokens_per_second": useful / elapsed,
            "useful_tokens": useful / tokens[3].clamp(min=1).item(),
            "share_of_peak": self._operations(tokens)
            / elapsed
            / (self.peak * distributed.world_size()),
            "data_wait": self.waited / elapsed,
            "peak_memory_gb": _memory(self.device) / 1e9,
        }
        shown = {
            "text": _written(means[0].item(), 3),
            "image": _written(image, 3),
            f"(t={self.num_timesteps}": _written(means[self.num_timesteps + 1].item(), 2),
            "t=1": _written(means[2].item(), 2) + ")",
            "tokens/s": f"{useful / elapsed:,.0f}",
        }
        self._clear()
        return {name: value for name, value in logged.items() if value == value}, shown

    def _seen(self, counts: Tensor) -> list[int]:
        return [t for t in range(1, self.num_timesteps + 1) if counts[t + 1]]

    def _reduced(self, tensor: Tensor) -> Tensor:
        return distributed.sum_over_ranks(tensor.clone().to(self.device)).cpu()


def _written(mean: float, digits: int) -> str:
    return "-" if math.isnan(mean) else f"{mean:.{digits}f}"  # the mean of nothing is no number


def _memory(device: torch.device) -> int:
    """The most that was held so far, on the GPU where there is one, bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return machine.peak_memory()
