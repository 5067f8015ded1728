"""Folders by name: shipped with the package, on this machine, or on the Hugging Face hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from mmrdpm import shipped
from mmrdpm.errors import CheckpointError, MmrdpmError

_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def resolve(kind: shipped.Kind, name: str, files: Sequence[str]) -> Path:
    """The folder of a path, of a shipped thing, or of a hub id `OWNER/NAME`, in this order.

    Args:
        files: names or globs of the files that are fetched from the hub, into its own cache.

    Raises:
        MmrdpmError: it is none of the three, or the hub cannot be reached.
    """
    try:
        return shipped.resolve(kind, name)
    except MmrdpmError:
        if not _ID.fullmatch(name) or name.startswith(f"{kind}/"):
            raise
    return _fetch(name, files)


def quieten() -> None:
    """Keeps libraries from telling at length what an error here says in one line.

    They are the hub's, which logs every try (call this once it is imported, as that sets its
    level), and xformers, which diffusers imports whether its build fits or not.
    """
    for library in ("huggingface_hub", "xformers"):
        logging.getLogger(library).setLevel(logging.ERROR)


def _fetch(name: str, files: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    quieten()
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # of the network, of the hub, of the cache: no common class
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise CheckpointError(
            f"{name}: no such folder here, and the hub gave none ({reason}): correct the name, or"
            " download it and give its folder"
        ) from None
