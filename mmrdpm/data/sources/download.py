"""Files at http(s) addresses, read by curl; one that does not answer is told of within minutes."""

from __future__ import annotations

import io
import re
import subprocess
import time
from typing import cast
from urllib.parse import quote

_CONNECT = 10  # seconds until a machine answers
_STALL = 30  # seconds without a byte
_TRIES = 3  # until the first byte comes: later, another try would begin at the front again
_PAUSE = 2.0  # seconds between them
# of curl's statuses, those that another try may not meet again: a name that was not found for now,
# too late, cut off while hands were shaken, no answer, cut off in the answer
_PASSING = (6, 28, 35, 52, 56)
_BUSY = re.compile(r"error: (408|429|5\d\d)\b")  # in what it tells of status 22
_KEPT = "%/:?#[]@!$&'()*+,;=~"  # what may stand in an address; of blanks and the like, nothing


class Download:
    """The content of an address, as a stream that is read from its front to its end.

    Raises:
        OSError: no first byte came, for the cause that it tells; or curl is not installed, which
            is then the error's `filename`.
    """

    def __init__(self, url: str) -> None:
        for left in reversed(range(_TRIES)):
            self._start(url)
            if self._content.peek(1):
                return
            try:
                return self._check()
            except OSError as error:
                passing = self._curl.returncode in _PASSING or _BUSY.search(str(error))
                if not (left and passing):
                    raise
            time.sleep(_PAUSE)

    def _start(self, url: str) -> None:
        command = [  # `-q`, which is to come first: whatever the user's ~/.curlrc says
            *("curl", "-q", "--fail", "--silent", "--show-error", "--globoff"),
            *("--location", "--proto-redir", "=https,http"),
            *("--connect-timeout", str(_CONNECT), "--speed-limit", "1"),
            *("--speed-time", str(_STALL), quote(url, safe=_KEPT)),
        ]
        nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
        self._curl = subprocess.Popen(command, stdin=nothing, stdout=pipe, stderr=pipe)
        self._content = cast(io.BufferedReader, self._curl.stdout)

    def read(self, size: int) -> bytes:
        """At most so many bytes, none at the end.

        Raises:
            OSError: the transfer ended before it.
        """
        content = b"" if self._content.closed else self._content.read(size)
        if not content:
            self._check()
        return content

    def close(self) -> None:
        """Ends the transfer, wherever it is."""
        self._curl.kill()
        self._curl.communicate()

    def _check(self) -> None:
        """Ends the curl that has nothing more to give; raises OSError where it failed."""
        told = self._curl.communicate()[1].decode(errors="replace").strip()
        if status := self._curl.returncode:
            cause = re.sub(r"^curl: \(\d+\) ", "", told) or f"ended with status {status}"
            raise OSError(f"curl: {' '.join(cause.split())}")
