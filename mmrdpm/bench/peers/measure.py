"""Time of training and of sampling, and peak memory."""

from __future__ import annotations

import ctypes
import gc
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mmrdpm.bench.measure import Work, interleaved, matrix_product, ratio
from mmrdpm.bench.peers.protocol import Caption, How, Judging, Peer, Scene
from mmrdpm.bench.peers.trainer import Trainer

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_UPDATES = 3  # of each peer per repeat of drawing: captions differ in length
_PRODUCT = "matrix product"  # beside the peers, which have other names
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


def sampling(
    peers: Mapping[str, Peer],
    ways: Sequence[tuple[str, How]],
    scene: Scene,
    captions: Sequence[Caption],
    plan: Judging,
) -> list[dict[str, Any]]:
    """Seconds per picture, from caption to pixels, of each way of a named peer.

    All take turns, so that a busy machine slows them alike.
    """

    def work(peer: Peer, how: How, batch: int) -> Work:
        chosen = [captions[i % len(captions)] for i in range(batch)]

        @torch.no_grad()
        def draw() -> None:
            scene.decode(peer.draw(chosen, how))  # ends on the CPU, so nothing is pending

        return draw

    timed = [(*way, batch) for way in ways for batch in plan.speed_batches]
    works = {repr(way): work(peers[way[0]], *way[1:]) for way in timed}
    seconds = interleaved(works, plan.repeats)
    return [
        {
            "peer": name,
            **asdict(how),
            "batch": batch,
            "seconds_per_picture": statistics.median(seconds[repr((name, how, batch))]) / batch,
        }
        for name, how, batch in timed
    ]


def training(
    trainers: Mapping[str, Trainer], flops: Mapping[str, float], repeats: int
) -> list[dict[str, Any]]:
    """Seconds per update, and its share of the rate of a large matrix product; all take turns.

    With a rate of 0 weights stay.

    Args:
        flops: of an update of each.
    """
    first = next(iter(trainers.values()))
    product, operations = matrix_product(first.dtype, first.device)
    works = {name: trainer.update for name, trainer in trainers.items()}
    seconds = interleaved({_PRODUCT: product, **works}, repeats * _UPDATES)
    rates = [operations / time for time in seconds.pop(_PRODUCT)]
    return [
        {
            "peer": name,
            "seconds_per_update": statistics.median(times),
            "matrix_share": ratio([flops[name] / time for time in times], rates),
        }
        for name, times in seconds.items()
    ]


def machine_class(dtype: torch.dtype) -> str:
    """What the times were measured on."""
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    threads, kind = torch.get_num_threads(), str(dtype).removeprefix("torch.")
    return f"{where}, {threads} threads, {kind}, torch {torch.__version__}"
