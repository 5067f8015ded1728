"""What all benches share: interleaved timing, the machine's own limits, memory, fitted growth."""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmrdpm.tally import Tally

Work = Callable[[], object]

_PRODUCTS = {"cpu": (2048, 1), "cuda": (8192, 200)}
"""Side of the square matrices, and how many one after the other: as large and long as it takes to
fill a GPU, and to bring it to the clock that it keeps under load."""
_READ = 2**26  # float32 numbers that are read through: 256 MiB, more than any cache


def interleaved(works: Mapping[str, Work], rounds: int) -> dict[str, list[float]]:
    """Seconds of every work in every round, after a call that does not count.

    One round runs all works once, so that what slows the machine for a while slows all alike.
    """
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            seconds[name].append(timed(work))
    return seconds


def timed(work: Work) -> float:
    """Seconds of one call, until the device is done."""
    _finish()
    begun = time.perf_counter()
    work()
    _finish()
    return time.perf_counter() - begun


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def matrix_product(dtype: torch.dtype, device: torch.device) -> tuple[Work, int]:
    """Large matrix products, and their floating point operations."""
    side, times = _PRODUCTS[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def work() -> None:
        for _ in range(times):
            a @ b

    return work, 2 * side**3 * times


def memory_read(device: torch.device) -> tuple[Work, int]:
    """Reading memory once through, and its bytes."""
    numbers = torch.ones(_READ, device=device)
    return numbers.sum, 4 * _READ


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """b of the least-squares fit `value = a * size ** b`, on logarithms."""
    return statistics.linear_regression(*(list(map(math.log, x)) for x in (sizes, values))).slope


def growth(works: Mapping[float, Work], rounds: int) -> dict[str, Any]:
    """Seconds and peak bytes of works by size, with the exponents of fitted power laws."""
    named = {str(size): work for size, work in works.items()}
    seconds = interleaved(named, rounds)
    points = [
        {
            "size": size,
            "seconds": statistics.median(seconds[str(size)]),
            "bytes": _peak(work),
        }
        for size, work in works.items()
    ]
    sizes = [point["size"] for point in points]
    return {
        "points": points,
        "time_exponent": exponent(sizes, [point["seconds"] for point in points]),
        "memory_exponent": exponent(sizes, [point["bytes"] for point in points]),
    }


def growth_lines(grown: Mapping[str, dict[str, Any]]) -> list[str]:
    """What `growth` found, by what grows, to read."""
    shown = []
    for name, found in grown.items():
        sizes = ", ".join(f"{point['size']:g}" for point in found["points"])
        shown.append(
            f"{name} ({sizes}): time ~ size^{found['time_exponent']:.2f},"
            f" memory ~ size^{found['memory_exponent']:.2f}"
        )
    return shown


def _peak(work: Work) -> float:
    """The most bytes that the tensors made by one call take at once, weights left out.

    Of one thread: what others do beside it is not counted.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Tally() as tally:
            work()
    finally:
        torch.set_num_threads(threads)
    return tally.peak


def machine_facts(dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What figures are only valid for."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """Writes the figures, folders made where they are missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
