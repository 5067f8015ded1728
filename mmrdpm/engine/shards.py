"""Sharded tensors on disk: every rank writes and reads its own part, by torch's DCP.

    FOLDER/shard-00001-model-00001-of-00001.safetensors   what the first rank held, and so on

DCP's usual index is pickled. This is its form in safetensors, whose headers say where each part
belongs, so that any number of ranks can read them, one process alone too.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from mmrdpm import distributed
from mmrdpm.errors import CheckpointError, DamagedError


class ShardWriter:
    """Writes shards, on CUDA beside the training: from copies, in a group of its own.

    All ranks must make one.
    """

    def __init__(self, background: bool) -> None:
        self._group = dist.new_group(backend="gloo") if background else None

    def begin(self, tensors: Mapping[str, Tensor], folder: Path) -> Callable[[], None]:
        """Begins to write; what it gives waits for the end. All ranks must call both.

        From then on, in the background, the tensors may change. Waiting raises CheckpointError
        where a rank could not write.

        Args:
            folder: is made; what an earlier attempt has left in it goes.
        """
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, async_save, save

        distributed.first(lambda: _fresh(folder))
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        told = partial(
            _told, folder=folder, what="could not be saved", remedy="make room, look at the disk"
        )
        if self._group is None:
            return partial(told, partial(save, dict(tensors), storage_writer=writer))
        begun = told(
            partial(async_save, dict(tensors), storage_writer=writer, process_group=self._group)
        )
        return partial(told, begun.result)


def _fresh(folder: Path) -> None:
    """Makes an empty folder, on a disk that all ranks share."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be made: {error.strerror}: make room") from None


def load(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fills tensors, whole or sharded in any way, with what was saved under their names.

    Raises:
        DamagedError: a name or a part is missing, a shape differs, or a file is damaged.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint import load as read
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = HuggingFaceStorageReader(str(folder))

    def work() -> None:
        for name, found in reader.read_metadata().state_dict_metadata.items():
            assert isinstance(found, TensorStorageMetadata)  # there is nothing else in safetensors
            if sum(chunk.sizes.numel() for chunk in found.chunks) != found.size.numel():
                raise CheckpointError(f"{name} is not whole: files are missing, or too many")
        with warnings.catch_warnings():  # that a process without others is alone
            warnings.simplefilter("ignore")
            read(dict(tensors), storage_reader=reader)

    _told(work, folder, "could not be read", "get a good copy", DamagedError)


def _told(
    work: Callable[[], Any],
    folder: Path,
    what: str,
    remedy: str,
    kind: type[CheckpointError] = CheckpointError,
) -> Any:
    """Does it and gives what comes of it; what went wrong on any rank becomes one line."""
    from torch.distributed.checkpoint import CheckpointException

    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it shows stack traces
    try:
        return work()
    except (CheckpointException, CheckpointError, SafetensorError, OSError) as error:
        failures = getattr(error, "failures", {distributed.rank(): (error, None)})
        rank, (first, _) = min(failures.items())
        reason = " ".join(str(first).split())[:200]
        raise kind(f"{folder}: {what} (rank {rank}: {reason}): {remedy}") from None
    finally:
        logger.setLevel(level)
