"""Folders by name: shipped with the package, on this machine, or on the Hugging Face hub."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from mmrdpm import distributed, shipped
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
        if not is_id(name) or name.startswith(f"{kind}/"):
            raise
    return fetch(name, files)


def is_id(name: str) -> bool:
    """Whether it reads as a repository on the hub, `OWNER/NAME`; a path may too."""
    return bool(_ID.fullmatch(name))


def _first_try(record: logging.LogRecord) -> bool:
    """Whether a library does not say again, `[2/20]`, what it has said at its first try."""
    return not re.search(r" \[(?!1/)\d+/\d+\]", record.getMessage())


def quieten() -> None:
    """Keeps libraries from telling at length what an error here says in one line.

    They are the hub's, which logs every try and sets its level when it is imported; `datasets`,
    which waits for a stream for minutes; and xformers, which diffusers imports whether its build
    fits or not. Bars of what is fetched are shown by one process.
    """
    from huggingface_hub.utils import disable_progress_bars

    for library in ("huggingface_hub", "xformers"):
        logging.getLogger(library).setLevel(logging.ERROR)
    logging.getLogger("datasets.utils.file_utils").addFilter(_first_try)
    if not distributed.is_main():
        disable_progress_bars()


def fetch(name: str, files: Sequence[str]) -> Path:
    """The folder, in the hub's own cache, of files of a repository on the hub.

    Raises:
        CheckpointError: the hub cannot be reached, does not give them, or has none of them.
    """
    from huggingface_hub import constants, snapshot_download

    quieten()
    try:
        folder = Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:  # of the network, of the hub, of the cache: no common class
        raise CheckpointError(
            f"{name}: no such folder here, and the hub {constants.ENDPOINT} gave none"
            f" ({reason(error)}): correct the name, see to the network or the rights (hf auth"
            " login), or download it and give its folder"
        ) from None
    if not any(next(folder.glob(pattern), None) for pattern in files):
        raise CheckpointError(
            f"{name}: neither the hub {constants.ENDPOINT} nor its cache ({folder}) gave any of"
            f" {', '.join(files)}: see to the network, or name another repository"
        )
    return folder


def reason(error: BaseException) -> str:
    """The cause of a library's error in one line: what the hub or the network said, if it is that.

    The libraries wrap it in guesses, as that a file is not in the cache.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    said = error.__cause__ or error
    before = error if isinstance(error, OSError) or isinstance(said, OSError) else None
    while before:
        answer = isinstance(before, (HfHubHTTPError, OfflineModeIsEnabled)) or (
            type(before).__module__.startswith(("httpx", "requests"))
        )
        if answer and not isinstance(before, LocalEntryNotFoundError):
            said = before
            break
        before = before.__cause__ or before.__context__
    text = " ".join(str(said).split()).partition(" For more information check:")[0]
    return f"{type(said).__name__}: {text}"[:240]
