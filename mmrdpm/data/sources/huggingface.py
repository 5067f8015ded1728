"""Data sets of the library `datasets`: from the hub, from local files, whole or streaming."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub

from mmrdpm import hub
from mmrdpm.data.lines import MAX_BYTES
from mmrdpm.data.records import Broken, Indexed, Pair, Record, Sharded, Source, Text
from mmrdpm.data.sources.files import at_home, inside
from mmrdpm.data.sources.folder import captions_of
from mmrdpm.errors import DataError

_USUAL = {
    "image": ("image", "img", "jpg", "png", "webp"),
    "caption": ("caption", "captions", "text", "txt"),
    "text": ("text", "content"),
    "label": ("label", "cls", "class"),
}
_COMMIT = re.compile("[0-9a-f]{40}")
_MEMBER = re.compile("zip://[^:]*::([^:]+(?:://[^:]+)?)")  # of an archive, and where that lies
_AT_ONCE = 16  # rows of a stream
_BUILDERS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".arrow": "arrow",
}


def open_dataset(
    path: str,
    subset: str = "",
    split: str = "train",
    streaming: bool = False,
    columns: Mapping[str, str] | None = None,
    template: str = "",
    revision: str = "",
    captions: bool = True,
) -> Source:
    """A data set as a source: of image-text pairs if it has an image column, else of texts.

    Args:
        path: hub id, or a local file (parquet, jsonl, csv, arrow), glob, folder of files, or
            folder written by `save_to_disk`.
        columns: names of the columns for image, caption, text and label; "" for the usual ones.
        template: makes captions of class labels.
        revision: commit, tag or branch of a data set on the hub, "" for its newest.
        captions: whether those of pairs are wanted; else a record is its image alone.

    Raises:
        DataError: `datasets` is not installed, the data cannot be reached or read, or a column is
            missing.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise DataError(
            "Hugging Face data sets need the extra: pip install 'mmrdpm[data]'"
        ) from None
    hub.quieten()
    if revision and _local_folders(path):
        raise DataError(
            f"{path}: lies on this machine and has no revisions: leave out the source's key"
            f" 'revision' ({revision})"
        )
    commit = ""
    try:
        if revision:
            data, commit = _load_revision(datasets, path, subset, split, streaming, revision)
        else:
            data = _load(datasets, path, subset, split, streaming)
        names = list(data.column_names or (data.features or {}))
        if not names:  # a stream without a schema shows its columns in its first record
            names = list(next(iter(data), {}))
    except DataError:
        raise
    except Exception as error:  # the library passes on whatever its readers and clients raise
        mend = (
            "check name, subset, split, revision, network, rights (hf auth login), or give a local"
            " copy"
        )
        raise _fault(path, "the data set could not be opened", error, mend) from None
    wanted = ("label" if template else "caption") if captions else "image"
    return _arrange(datasets, data, names, path, dict(columns or {}), wanted, template, commit)


def _fault(path: str, what: str, error: Exception, mend: str) -> DataError:
    """One line of an error of the library; `mend` is for what does not lie on this machine."""
    if _local_folders(path):
        mend = (
            "check subset and split, and that the file holds rows, is whole, in UTF-8, and what its"
            " name says"
        )
    return DataError(f"{path}: {what} ({hub.reason(error)}): {mend}")


def _load(datasets: Any, path: str, subset: str, split: str, streaming: bool) -> Any:
    place = at_home(path)
    saved = any((place / name).is_file() for name in ("state.json", "dataset_dict.json"))
    if subset and (saved or place.suffix.lower() in _BUILDERS):
        raise DataError(f"{path}: has no subsets: leave out the source's key 'subset' ({subset})")
    if (place / "state.json").is_file():
        if split != "train":
            raise DataError(f"{path}: has no splits: leave out the source's key 'split' ({split})")
        return datasets.load_from_disk(str(place))
    if (place / "dataset_dict.json").is_file():
        saved_splits = datasets.load_from_disk(str(place))
        if split not in saved_splits:
            known = ", ".join(saved_splits)
            raise DataError(f"{path}: has no split {split!r}: choose one of {known}")
        return saved_splits[split]
    if builder := _BUILDERS.get(place.suffix.lower()):
        files = {"train": str(place)}
        return datasets.load_dataset(builder, data_files=files, split=split, streaming=streaming)
    name = str(place) if place.is_dir() else path
    return datasets.load_dataset(name, subset or None, split=split, streaming=streaming)


def _load_revision(
    datasets: Any, path: str, subset: str, split: str, streaming: bool, revision: str
) -> tuple[Any, str]:
    """A data set on the hub as it was at a revision, and which commit that is."""
    from datasets.packaged_modules.cache.cache import Cache

    builder = datasets.load_dataset_builder(path, subset or None, revision=revision)
    commit = str(builder.hash)
    # where the hub gives nothing, the library takes whatever its cache was given last
    doubtful = isinstance(builder, Cache) or _COMMIT.fullmatch(revision)
    if doubtful and commit != revision:
        raise DataError(
            f"{path}: the hub did not give revision {revision}, and the cache holds {commit}: see"
            " to the network, or name that one"
        )
    if streaming:
        return builder.as_streaming_dataset(split), commit
    builder.download_and_prepare()
    return builder.as_dataset(split), commit


def _arrange(
    datasets: Any,
    data: Any,
    names: list[str],
    path: str,
    columns: dict[str, str],
    wanted: str,
    template: str,
    commit: str,
) -> Source:
    """The source; of what has images, `wanted` is the role that each row must have too."""
    chosen: dict[str, str] = {}
    features = data.features or {}
    for role, usual in _USUAL.items():
        asked = columns.get(role) or ""
        if asked and asked not in names:
            raise DataError(f"{path}: no column {asked!r}: it has {', '.join(names) or 'none'}")
        found = asked or next((name for name in usual if name in names), "")
        if found:
            chosen[role] = found
    pictures = [name for name in names if isinstance(features.get(name), datasets.Image)]
    if pictures and not {"image", "text"} & {role for role in columns if columns[role]}:
        chosen.setdefault("image", pictures[0])
        if chosen["image"] not in _USUAL["image"] and len(pictures) > 1:
            raise DataError(
                f"{path}: the columns {', '.join(pictures)} hold pictures: name one with the"
                " source's key 'image'"
            )
    needed = wanted if "image" in {*chosen, wanted} else "text"
    if needed not in chosen:
        raise DataError(
            f"{path}: no column for the {needed} among {', '.join(names) or 'none'}: name it with"
            f" the source's key {needed!r}"
        )
    image = chosen.get("image")
    if image and isinstance(features.get(image), datasets.Image):
        if isinstance(data, datasets.IterableDataset):
            data = data.decode(False)  # some streams ignore a cast
        else:
            data = data.cast_column(image, datasets.Image(decode=False))
    kept = list(dict.fromkeys(chosen[role] for role in (needed, "image") if role in chosen))
    caches = [Path(datasets.config.HF_DATASETS_CACHE), Path(huggingface_hub.constants.HF_HUB_CACHE)]
    reader = _Reader(path, chosen, needed, features.get(chosen[needed]), template, caches, commit)
    data = data.select_columns(kept)
    if isinstance(data, datasets.IterableDataset):
        return Stream(data, reader)
    return Table(data, reader)


def _local_folders(path: str) -> list[Path]:
    """The folder of a local data set; none of what lies on the hub."""
    place = at_home(path)
    if place.exists():
        return [place if place.is_dir() else place.parent]
    return sorted({Path(found).parent for found in glob.glob(str(place), recursive=True)})


class _Reader:
    """Rows to records."""

    def __init__(
        self,
        path: str,
        columns: dict[str, str],
        needed: str,
        feature: Any,
        template: str,
        caches: list[Path],
        commit: str,
    ) -> None:
        self.path, self.columns, self.needed = path, columns, needed
        self.place = f"{path} at {commit}" if commit else path
        self.template = template
        self.label_names = getattr(feature, "names", None)
        self.folders = [*_local_folders(path), *caches]

    def record(self, index: object, row: Mapping[str, Any]) -> Record:
        key, value = f"{self.path}#{index}", row[self.columns[self.needed]]
        if self.needed == "text":
            return Text(key, value) if isinstance(value, str) else Broken(key, "no text")
        image = row[self.columns["image"]]
        if isinstance(image, Mapping):
            image = image.get("bytes") or self._file(image.get("path"))
        if not isinstance(image, (bytes, Path)):
            return Broken(key, "no image", f"column {self.columns['image']} holds no image")
        if self.needed == "image":
            return Pair(key, image, ())
        if self.needed == "label":
            label = self._label(value)
            if label is None:
                return Broken(key, "no label", f"{value!r:.40}")
            return Pair(key, image, (self.template.format(label=label),))
        captions = captions_of(value)
        return Pair(key, image, captions) if captions else Broken(key, "no caption")

    def _file(self, path: Any) -> Path | bytes | None:
        """A file that a row names: of the data set itself, or of the library's cache.

        It may be a member of a zip archive there, and on the hub too.
        """
        if not isinstance(path, str):
            return None
        named = _MEMBER.fullmatch(path)
        container = named[1] if named else path
        on_hub = container.startswith(
            (f"hf://datasets/{self.path}@", f"hf://datasets/{self.path}/")
        )
        found = (inside(folder, container) for folder in self.folders)
        file = next((file for file in found if file and file.is_file()), None)
        if file and not named:
            return file
        if file and named:
            path = f"{path.partition('::')[0]}::{file}"
        return _fetched(path) if on_hub or file else None

    def _label(self, value: Any) -> str | None:
        names = self.label_names
        if names is not None:
            known = isinstance(value, int) and 0 <= value < len(names)
            value = names[value] if known else None
        return None if value is None else str(value).replace("_", " ")


def _fetched(path: str) -> bytes | None:
    """What the library opens by a path of its own; None if there is no such file.

    One over the limit is cut there, and so is no picture that can be read.
    """
    from datasets.utils.file_utils import xopen

    try:
        with xopen(path, "rb") as file:
            return file.read(MAX_BYTES)
    except FileNotFoundError:
        return None


class Table(Indexed):
    """A data set that lies in Arrow files, read by row number."""

    def __init__(self, data: Any, reader: _Reader) -> None:
        self.data, self.reader, self.texts_only = data, reader, reader.needed == "text"
        if not len(data):
            raise DataError(f"{reader.path}: the data set is empty")

    def __len__(self) -> int:
        return len(self.data)

    def record(self, index: int) -> Record:
        try:
            return self.reader.record(index, self.data[index])
        except Exception as error:  # see open_dataset
            what, mend = f"row {index} could not be read", "get a good copy"
            raise _fault(self.reader.path, what, error, mend) from None

    def fingerprint(self) -> str:
        return f"{self.reader.place}, {len(self)} rows"


def _rows(part: Any) -> Iterator[dict[str, Any]]:
    """The rows of a stream, all of them: its own iterator would share them out over workers."""
    for batch in part.iter(batch_size=_AT_ONCE):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


class Stream(Sharded):
    """A streaming data set, read shard by shard."""

    def __init__(self, data: Any, reader: _Reader) -> None:
        self.data, self.reader, self.texts_only = data, reader, reader.needed == "text"

    def num_shards(self) -> int:
        return self.data.num_shards

    def shard(self, index: int) -> Iterator[Record]:
        part = self.data.shard(num_shards=self.num_shards(), index=index)
        try:
            for i, row in enumerate(_rows(part)):
                yield self.reader.record(f"{index}/{i}", row)
        except DataError:
            raise
        except Exception as error:  # see open_dataset
            mend = "check the network and the file; a run then goes on with --resume"
            raise _fault(str(self), f"shard {index} could not be read", error, mend) from None

    def fingerprint(self) -> str:
        return f"{self.reader.place}, {self.num_shards()} shards"

    def __str__(self) -> str:
        return self.reader.path
