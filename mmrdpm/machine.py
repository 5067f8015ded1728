"""How the program uses the machine: threads, memory, device."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Barrier, Lock
from typing import Literal, TypeVar

import torch

Precision = Literal["auto", "bf16", "fp32"]
_MOST_CORES = 8  # side by side, since what each computes takes memory of its own
_EMULATED = 256  # side of the matrices whose product in emulated bfloat16 takes 0.05 s; 2048: 30 s
_LOOK = 0.2  # seconds between two looks whether Ctrl-C was pressed
_MAKING = Lock()
Thing = TypeVar("Thing")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Datasheet:
    """Of a GPU: FLOP/s of dense products, bytes of memory, and bytes per second to it."""

    bf16: float
    fp32: float  # without TF32, which torch leaves off
    memory: float
    bandwidth: float


DATASHEET = {  # of NVIDIA's SXM boards
    "h200": Datasheet(989e12, 67e12, 141e9, 4.8e12),
    "h100": Datasheet(989e12, 67e12, 80e9, 3.35e12),
    "a100": Datasheet(312e12, 19.5e12, 80e9, 2.0e12),
}

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # glibc's malloc.h


def device() -> torch.device:
    """CUDA where there is a GPU, the CPU otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_bfloat16(device: torch.device) -> bool:
    """Whether it has instructions for bfloat16; a CPU without emulates it, up to a hundred times
    slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def matrix_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The type that matrix products are computed in; auto takes bfloat16 where it pays."""
    if precision == "auto":
        precision = "bf16" if has_bfloat16(device) else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """A context whose matrix products are of that type."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def side_by_side(function: Callable[[Thing], Result], things: Sequence[Thing]) -> list[Result]:
    """`function` of each thing, in their order, each on one core, as many at once as torch may use.

    Cores that work apart do more than cores that divide every small matrix among them, and what
    one core computes does not depend on how many there are. Gradients are off; autocast holds as
    for the caller, modes that watch operations do not, unless torch may use one core only: then
    nothing leaves the caller's thread. After an error or Ctrl-C what is at work is waited for and
    nothing more is begun. `function` must not call this.
    """
    cores, left = min(torch.get_num_threads(), _MOST_CORES), iter(range(len(things)))
    results: dict[int, Result] = {}
    cast, cast_type = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def work() -> None:
        with torch.inference_mode(), torch.autocast("cpu", cast_type, enabled=cast):
            try:
                for index in left:
                    results[index] = function(things[index])
            finally:
                deque(left, maxlen=0)  # takes all: after an error the others begin nothing more

    if cores == 1:
        work()
    else:
        workers, working = _workers(), []
        try:
            for _ in range(min(cores, len(things))):
                working.append(workers.submit(work))
            while wait(working, timeout=_LOOK).not_done:
                pass  # Ctrl-C just before a wait without end would be seen after it
        finally:
            deque(left, maxlen=0)
            wait([worker for worker in working if not worker.cancel()])
        for worker in working:
            worker.result()
    return [results[index] for index in range(len(things))]


def _workers() -> ThreadPoolExecutor:
    """Threads that compute with one core each, the same ones for all callers."""
    with _MAKING:
        return _made()


@cache
def _made() -> ThreadPoolExecutor:
    """Makes them, once: torch hands the number that a thread sets to every thread that is new to
    it, so that one which begins in the meantime keeps the workers' number."""
    threads, begun = torch.get_num_threads(), Barrier(_MOST_CORES + 1)

    def begin() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread's first use of torch is when it takes its number
        begun.wait()

    pool = ThreadPoolExecutor(_MOST_CORES, "core", begin)
    try:
        for _ in range(_MOST_CORES):
            pool.submit(int)  # a thread begins with each, as long as none is idle
        begun.wait()
    except BaseException:
        begun.abort()  # nobody waits for who will not come
        raise
    finally:
        torch.set_num_threads(threads)  # the common number again, for threads to come
    return pool


os.register_at_fork(after_in_child=_made.cache_clear)  # threads stay with the parent


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations per second that matrix products can reach.

    The data sheet's figure (dense, bfloat16) for the GPUs in `DATASHEET`, else measured.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device).lower()
        for kind, sheet in DATASHEET.items():
            if kind in name:
                return sheet.bf16
    return measured_rate(device, dtype)


def measured_rate(device: torch.device, dtype: torch.dtype, side: int = 0) -> float:
    """Floating point operations per second of one square matrix product, the best of four.

    Args:
        side: of the matrices; 0 is 1024 on a CPU and 8192 on a GPU, where less does not fill it.
            A CPU that emulates the type gets smaller ones.
    """
    side = side or (1024 if device.type == "cpu" else 8192)
    if device.type == "cpu" and dtype == torch.bfloat16 and not has_bfloat16(device):
        side = min(side, _EMULATED)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / min(seconds(lambda: a @ b, device) for _ in range(4))


def measured_bandwidth(device: torch.device) -> float:
    """Bytes per second of adding a number to a float32 tensor, read and written, the best of 32.

    Of 4 MiB, as those of an update are: a large one shows main memory, which caches spare it.
    """
    a = torch.zeros(2**20, device=device)
    return 8 * len(a) / min(seconds(lambda: a + 1, device) for _ in range(32))


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """What some work takes, until the device is done with it."""
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def peak_memory() -> int:
    """The most main memory that this process held so far, bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def main_memory() -> float | None:
    """Bytes of main memory of this machine or its container, None where that is not known."""
    limits = []
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/proc/meminfo")):
        if path.exists():
            words = path.read_text().split()
            number = words[1] if words[0] == "MemTotal:" else words[0]
            if number.isdigit():  # a container without a limit says "max"
                limits.append(float(number) * (1024 if words[0] == "MemTotal:" else 1))
    return min(limits, default=None)


def prepare(threads: int) -> None:
    """Sets the number of CPU threads and lets freed memory stay with the process.

    glibc gives every large tensor back to the kernel when it dies, which then clears the pages of
    the next one anew; on the CPU that cost training a third of its time.
    """
    torch.set_num_threads(threads)
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt:  # musl has none
            mallopt(_MMAP_MAX, 0)
            mallopt(_TRIM_THRESHOLD, 2**31 - 1)
            mallopt(_TOP_PAD, 2**28)
