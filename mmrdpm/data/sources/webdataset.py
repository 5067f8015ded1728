"""WebDataset shards: tar archives whose members of one record share a name up to the first dot."""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmrdpm.data.lines import MAX_BYTES
from mmrdpm.data.records import DAMAGED_SHARD, Broken, Pair, Record, Sharded
from mmrdpm.data.sources.download import Download
from mmrdpm.data.sources.files import IMAGE_SUFFIXES, find
from mmrdpm.data.sources.folder import captions_of
from mmrdpm.errors import DataError

_Members = dict[str, bytes]

_HTTP = re.compile("https?://", re.IGNORECASE)
_STATUS = re.compile(r": exit (-?\d+) \(read\)")  # in what webdataset raises
_LONGEST_NAME = 2**20  # bytes of a header that holds a name or attributes
_NAMES = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)


_DAMAGE = (  # what reading one raises
    *(tarfile.TarError, EOFError, ValueError, TypeError),
    *(LookupError, ArithmeticError, RecursionError),
)
_GZIP, _OTHERS = b"\x1f\x8b", (b"BZh", b"\xfd7zXZ")  # how compressed archives begin
_MOST_LISTED = 20  # members of a record


class Shards(Sharded):
    """Local paths and globs, http(s) URLs and `pipe:` commands, with brace ranges as in {000..123}.

    Args:
        image: suffix of the image members; any image suffix by default. Suffixes are the same in
            small and in capital letters.
        caption: suffix of the caption members, `txt` by default; `json.NAME` for a key of the
            JSON members.
        label, template: suffix of members with a class label, and what makes a caption of it.
        captions: whether they are wanted; else a record is its image alone.

    Raises:
        DataError: the package `webdataset` is missing, or a local path matches nothing.
    """

    def __init__(
        self,
        urls: str,
        image: str = "",
        caption: str = "",
        label: str = "",
        template: str = "",
        captions: bool = True,
    ) -> None:
        try:
            from webdataset.gopen import gopen
            from webdataset.shardlists import expand_urls
        except ModuleNotFoundError:
            raise DataError(
                "webdataset shards need the extra: pip install 'mmrdpm[data]'"
            ) from None
        self._gopen, self.captions = gopen, captions
        self.image, self.label, self.template = image.lower(), label.lower() or "cls", template
        self.caption = caption if caption.startswith("json.") else caption.lower() or "txt"
        try:
            ranges = expand_urls(urls)
        except ValueError as error:
            raise DataError(f"{urls!r}: {error}: write ranges as in {{000..123}}") from None
        self.urls = [url for part in ranges for url in _expand(part.strip()) if url]
        if not self.urls:
            raise DataError(f"{urls!r}: names no shards: correct the path")

    def num_shards(self) -> int:
        return len(self.urls)

    def shard(self, index: int) -> Iterator[Record]:
        """The records of one archive; a damaged one ends with a broken record."""
        url = self.urls[index]
        try:
            stream = Download(url) if _HTTP.match(url) else self._gopen(url)
        except OSError as error:
            raise _unreachable(url, error) from None
        except ValueError as error:  # a kind of address that the library does not know
            raise DataError(f"{url}: {error}: use pipe:COMMAND to read it") from None
        try:
            try:
                yield from self._records(url, stream)
            except _DAMAGE as damage:
                _drain(stream)
                yield Broken(url, DAMAGED_SHARD, f"{damage}; its later records are left out")
        except OSError as error:
            raise _unreachable(url, error) from None
        finally:
            with suppress(OSError):  # of a command that was not read to its end
                stream.close()

    def _records(self, url: str, stream: Any) -> Iterator[Record]:
        name, members = "", _Members()
        suffixes: list[str] = []  # of members, for who has named the wrong ones
        fault: Broken | None = None
        misnamed = False
        none_yet = True
        ending: Any = _Ending(stream)
        mode: Any = "r|gz" if ending.head.startswith(_GZIP) else "r|"
        if ending.head.startswith(_OTHERS):  # of which a few bytes may become gigabytes at once
            raise tarfile.ReadError("compressed by bzip2 or xz: leave it as it is, or use gzip")
        with tarfile.open(fileobj=ending, mode=mode, tarinfo=_Header) as archive:
            for member in archive:
                archive.members.clear()  # type: ignore[attr-defined]  # else it keeps them all
                if not member.isfile() or Path(member.name).name.startswith("."):
                    continue
                base, _, suffix = member.name.rpartition("/")[2].partition(".")
                base = f"{member.name.rpartition('/')[0]}/{base}".lstrip("/")
                if base != name:
                    if members or fault or misnamed:
                        yield fault or self._record(url, name, members, suffixes)
                        none_yet = False
                    name, members, suffixes, fault, misnamed = base, _Members(), [], None, False
                if len(suffixes) < _MOST_LISTED:
                    suffixes.append(suffix)
                if not self._wanted(suffix):
                    # as "Mr. Smith.jpg" is, whose name is taken to end at its first dot
                    misnamed |= Path(suffix).suffix.lower() in IMAGE_SUFFIXES
                    continue
                if suffix.lower() in members:
                    fault = fault or Broken(f"{url}#{base}", "a member comes twice", f".{suffix}")
                elif member.size > MAX_BYTES:
                    detail = f".{suffix} has {member.size} bytes"
                    fault = fault or Broken(f"{url}#{base}", "archive member too large", detail)
                elif content := archive.extractfile(member):
                    members[suffix.lower()] = content.read()
            if members or fault or misnamed or (suffixes and none_yet):  # all keys may be wrong
                yield fault or self._record(url, name, members, suffixes)
            _check_end(archive)

    def _wanted(self, suffix: str) -> bool:
        suffix = suffix.lower()
        json_member = self.caption.startswith("json.") and suffix == "json"
        return self._is_image(suffix) or json_member or suffix in (self.caption, self.label)

    def _is_image(self, suffix: str) -> bool:
        return suffix == self.image if self.image else f".{suffix}" in IMAGE_SUFFIXES

    def _record(self, url: str, name: str, members: _Members, suffixes: list[str]) -> Pair | Broken:
        key, listed = f"{url}#{name}", f"members: {', '.join(suffixes)[:200]}"
        image = next((data for suffix, data in members.items() if self._is_image(suffix)), None)
        if image is None:
            return Broken(key, "no image", f"{listed}: set image: to one of them")
        if not self.captions:
            return Pair(key, image, ())
        try:
            captions = self._captions(members)
        except (UnicodeDecodeError, ValueError, RecursionError) as error:
            return Broken(key, "caption cannot be read", str(error)[:200])
        if captions is None:
            wanted = "label: to one of them"
            if not self.template:
                wanted = "caption: to one of them, or to json.NAME for a key of json"
            return Broken(key, "no caption", f"{listed}: set {wanted}")
        return Pair(key, image, captions)

    def _captions(self, members: _Members) -> tuple[str, ...] | None:
        if self.template:
            label = members.get(self.label)
            return (self.template.format(label=_text(label)),) if label else None
        if self.caption.startswith("json."):
            mapping = json.loads(members.get("json", b"{}"))
            key = self.caption.removeprefix("json.")
            return captions_of(mapping.get(key)) if isinstance(mapping, dict) else None
        text = members.get(self.caption)
        return None if text is None else (_text(text),)

    def fingerprint(self) -> str:
        names = "\n".join(self.urls).encode(errors="surrogateescape")
        return hashlib.sha256(names).hexdigest()

    def __str__(self) -> str:
        more = len(self.urls) - 1
        return self.urls[0] + (f" and {more} more" if more else "")


def _text(content: bytes) -> str:
    return content.decode("utf-8-sig").strip()


def _expand(url: str) -> list[str]:
    """A local glob becomes its files; anything else is one shard."""
    if url.startswith("pipe:") or "://" in url:
        return [url]
    return [str(path) for path in find(url, frozenset({".tar", ".tgz", ".gz"}))]


class _Ending:
    """A stream that ends: one that says it holds more would be skipped through for ever.

    Attributes:
        head: its first bytes, which are read all the same.
    """

    _MOST = 16  # empty reads in a row; tarfile makes a few at the end of a whole archive

    def __init__(self, stream: Any) -> None:
        self._stream, self._empty = stream, 0
        self.head = self._ahead = stream.read(max(map(len, _OTHERS)))

    def read(self, size: int) -> bytes:
        content, self._ahead = self._ahead[:size], self._ahead[size:]
        content += self._stream.read(size - len(content))
        self._empty = 0 if content else self._empty + 1
        if self._empty > self._MOST:
            raise EOFError("it ends within a member")
        return content


class _Header(tarfile.TarInfo):
    """A member's header, at which a damaged archive does not pass for one that ends."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> _Header:
        """Raises ReadError where the archive ends without a mark, is damaged, or asks for much."""
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error) or "it ends without its end mark") from None
        if header.type == tarfile.GNUTYPE_SPARSE:
            cls._refuse_sparse()
        if header.size > _LONGEST_NAME and header.type in _NAMES:
            raise tarfile.ReadError(f"a name of {header.size} bytes")
        return header

    @staticmethod
    def _refuse_sparse(*_: Any) -> None:
        """Their maps have no limit."""
        raise tarfile.ReadError("a sparse member: pack it without tar's --sparse")

    # the same in three versions of the pax format
    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


def _check_end(archive: tarfile.TarFile) -> None:
    """Raises ReadError where an archive has no mark at its end, or something behind it."""
    stream: Any = archive.fileobj
    if stream.tell() <= archive.offset:  # not every Python reads an empty header as one
        raise tarfile.ReadError("it ends without its end mark")
    while block := stream.read(1 << 16):
        if block.strip(b"\0"):
            raise tarfile.ReadError("more follows behind its end mark")


def _drain(stream: Any) -> None:
    """Reads to the end; raises OSError if the archive is cut because its transfer failed."""
    while stream.read(1 << 20):
        pass
    stream.close()


def _unreachable(url: str, error: OSError) -> DataError:
    if error.filename == "curl":
        return DataError(
            f"{url}: is read by curl, which is not here: install it, or use pipe:COMMAND"
        )
    mend = "check the address and the network"
    if url.startswith("pipe:"):
        mend = "check what it reads"
    elif "://" not in url:
        mend = "put the file back, look at its rights and the disk"
    status = _STATUS.search(str(error))
    why = f"the command ended with status {status[1]}" if status else error.strerror or error
    return DataError(
        f"{url}: the shard could not be read ({why}): {mend}; a run then goes on with --resume"
    )
