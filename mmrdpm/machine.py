"""How the program uses the machine: threads, memory, device."""

from __future__ import annotations

import ctypes
import sys
from typing import Literal

import torch

Precision = Literal["auto", "bf16", "fp32"]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # glibc's malloc.h


def device() -> torch.device:
    """CUDA where there is a GPU, the CPU otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def matrix_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The type that matrix products are computed in; auto takes bfloat16 where it pays.

    A CPU without instructions for bfloat16 emulates it, about a hundred times slower.
    """
    if precision == "auto":
        has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        precision = "bf16" if has or device.type == "cuda" else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """A context whose matrix products are of that type."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


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
