"""Sampling time and peak memory."""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmrdpm.bench.peers.protocol import Caption, How, Judging, Peer, Scene

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size


class Peak:
    """The memory that was needed, at its peak, beyond what was in use when this was made."""

    def __init__(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before: float | None = torch.cuda.memory_allocated() / 2**20
            return
        self.before = None
        if sys.platform == "linux":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim:  # musl has none
                trim(0)
            try:
                _CLEAR.write_text(_RESET_PEAK)
                self.before = _resident("VmRSS")
            except OSError:  # a container may forbid it: then there is no figure
                pass

    def megabytes(self) -> float | None:
        """The peak so far in MiB, None where the system does not tell."""
        if self.before is None:
            return None
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 2**20 - self.before
        return _resident("VmHWM") - self.before


def _resident(field: str) -> float:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise OSError(f"{_STATUS} has no {field}")


@torch.no_grad()
def sampling(
    peer: Peer, scene: Scene, captions: Sequence[Caption], plan: Judging
) -> list[dict[str, Any]]:
    """Seconds per picture, from caption to pixels with guidance, and the memory it took."""
    measured = []
    for steps in peer.steps:
        how = How(steps, plan.guidance_scales[0], plan.temperature)
        for batch in plan.speed_batches:
            chosen = [captions[i % len(captions)] for i in range(batch)]
            peak, times = Peak(), []
            for _ in range(plan.repeats + 1):
                begun = time.perf_counter()
                scene.decode(peer.draw(chosen, how))  # ends on the CPU, so nothing is pending
                times.append(time.perf_counter() - begun)
            seconds = statistics.median(times[1:]) / batch  # the first one warms up
            measured.append(
                {
                    "steps": steps,
                    "batch": batch,
                    "seconds_per_picture": seconds,
                    "megabytes": peak.megabytes(),
                }
            )
    return measured


def machine_class(dtype: torch.dtype) -> str:
    """What the times were measured on."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    threads, kind = torch.get_num_threads(), str(dtype).removeprefix("torch.")
    return f"{where}, {threads} threads, {kind}, torch {torch.__version__}"
