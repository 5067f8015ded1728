"""Paths as users write them, and names as others' files have them."""

import io
import os
import tarfile

import pytest
from PIL import Image

from mmrdpm import recipe, text_tokenizer
from mmrdpm.data.inspect import guess
from mmrdpm.data.loader import open_stream
from mmrdpm.data.pictures import PictureError, open_picture
from mmrdpm.data.plan import DataPlan
from mmrdpm.data.records import Broken
from mmrdpm.data.sources import SourceConfig, open_source
from mmrdpm.data.sources.files import IMAGE_SUFFIXES
from mmrdpm.errors import DataError
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.vocabulary import Vocabulary


def opened(kind, path, **keys):
    return open_source("it", SourceConfig(kind, path=str(path), **keys))


@pytest.mark.parametrize("kind", ["text", "webdataset"])
def test_a_name_that_is_not_utf8_has_a_fingerprint_as_any_other(kind, tmp_path):
    """Else a run could read it, and not be saved."""
    path = os.fsencode(tmp_path) + {"text": b"/caf\xe9.jsonl", "webdataset": b"/caf\xe9.tar"}[kind]
    with open(path, "wb") as file:
        file.write(b'{"text": "a"}\n')
    assert len(opened(kind, os.fsdecode(path)).fingerprint()) == 64


def test_a_link_to_itself_is_one_broken_record(tmp_path):
    (tmp_path / "a.png").symlink_to("a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one"}\n')
    record = opened("folder", tmp_path).record(0)
    if not isinstance(record, Broken):  # Python 3.13 resolves it, and opening it fails
        with pytest.raises(PictureError):
            open_picture(record.image)


def test_an_archive_of_names_without_end_is_a_damaged_shard(tmp_path):
    """Each names the next member, which names the next: the library goes as deep as they do."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 2
    one = header.tobuf(tarfile.GNU_FORMAT) + b"a\0" + bytes(510)
    (tmp_path / "s.tar").write_bytes(one * 2000)
    (record,) = opened("webdataset", tmp_path / "s.tar").shard(0)
    assert (record.key, record.cause) == (str(tmp_path / "s.tar"), "damaged shard")


@pytest.mark.parametrize("kind", ["folder", "text", "interleaved", "cache", "huggingface"])
def test_the_home_of_nobody_is_a_wrong_path_as_others(kind):
    if kind == "huggingface":
        pytest.importorskip("datasets")
    with pytest.raises(DataError, match="~no-such-user/x"):
        opened(kind, "~no-such-user/x")


def test_a_data_set_at_home_is_found(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    assert len(opened("huggingface", "~/set", text="text")) == 2


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_a_folder_of_any_kind_of_pictures_is_one_of_pictures(suffix, tmp_path):
    (tmp_path / f"a{suffix}").touch()
    (tmp_path / "a.txt").write_text("a caption")
    assert guess(str(tmp_path)).type == "folder"


def test_rows_have_to_hold_an_image_only_where_there_are_any(tiny_tokenizers, tmp_path):
    images = image_tokenizer.load(tiny_tokenizers / "image")
    texts = text_tokenizer.load(tiny_tokenizers / "text")
    (tmp_path / "t.jsonl").write_text('{"text": "one"}\n')
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, "PNG")
    (tmp_path / "a.png").write_bytes(stream.getvalue())
    (tmp_path / "a.txt").write_text("a caption")
    sources = {"books": {"type": "text", "path": str(tmp_path / "t.jsonl"), "weight": 0.5}}

    def stream_of(sources):
        rows = {"seq_len": 16, "steps_per_image": 3}
        plan = recipe.from_dict(DataPlan, {"sources": sources, **rows}, "test")
        return open_stream(plan, 0, images, texts, Vocabulary(texts.size, images.codebook_size))

    stream_of({"books": {**sources["books"], "weight": 1.0}})
    with pytest.raises(DataError, match="seq_len is 16, but an image takes"):
        stream_of(sources | {"mine": {"type": "folder", "path": str(tmp_path), "weight": 0.5}})
