"""Sources read what others wrote: every broken sample is a counted cause, never a crash."""

import functools
import http.server
import io
import json
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image

from mmrdpm.data import pictures
from mmrdpm.data.faults import check_shards
from mmrdpm.data.inspect import guess
from mmrdpm.data.pictures import PictureError
from mmrdpm.data.records import Broken, Interleaved, Pair, Text
from mmrdpm.data.sources import SourceConfig, open_source
from mmrdpm.data.sources.files import IMAGE_SUFFIXES, find
from mmrdpm.errors import DataError, RecipeError


def opened(kind, path, **keys):
    return open_source("it", SourceConfig(kind, path=str(path), **keys))


def everything(source):
    return [source.record(i) for i in range(len(source))]


def image(fmt="PNG", mode="RGB", **options):
    stream = io.BytesIO()
    Image.new(mode, (12, 8), 1).save(stream, fmt, **options)
    return stream.getvalue()


def causes(records):
    return {r.key: r.cause for r in records if isinstance(r, Broken)}


def test_a_folder_with_text_files(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("a.png", "deep/b.PNG", "c.png", "d.png"):
        (tmp_path / name).write_bytes(image())
    (tmp_path / "a.txt").write_text("first\n")
    (tmp_path / "deep" / "b.txt").write_text("second")
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe")
    records = everything(opened("folder", tmp_path))
    pairs = {r.key: r.captions for r in records if isinstance(r, Pair)}
    assert pairs == {"a.png": ("first",), "deep/b.PNG": ("second",)}
    assert causes(records) == {"c.png": "no caption", "d.png": "caption cannot be read"}


def test_a_folder_with_metadata_stays_inside_it(tmp_path):
    lines = [
        '{"file_name": "a.png", "text": "one"}',
        '{"file_name": "b.png", "captions": ["two", "three"]}',
        '{"file_name": "../secret.png", "text": "x"}',
        '{"file_name": "/etc/passwd", "text": "x"}',
        '{"file_name": "a.png", "text": 5}',
        '{"text": "x"}',
        "[1]",
        "{broken",
        "[" * 100_000,
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    records = everything(opened("folder", tmp_path))
    assert [r.captions for r in records[:2]] == [("one",), ("two", "three")]
    assert [r.cause for r in records[2:]] == [
        "path leaves the folder",
        "path leaves the folder",
        "no caption",
        "no file_name",
        "not a JSON object",
        "not valid JSON",
        "not valid JSON",
    ]


def test_class_folders_become_captions_by_a_template(tmp_path):
    for label in ("tabby_cat", "dog"):
        (tmp_path / label).mkdir()
        (tmp_path / label / "0.png").write_bytes(image())
    records = everything(opened("folder", tmp_path, template="a photo of a {label}"))
    assert [r.captions[0] for r in records] == ["a photo of a dog", "a photo of a tabby cat"]


def test_texts_are_files_or_lines(tmp_path):
    (tmp_path / "book.txt").write_text("one\ntwo")
    (tmp_path / "lines.jsonl").write_bytes(b'{"text": "a"}\r\n\n{"body": "b"}\n{"text": "\xff"}')
    records = everything(opened("text", tmp_path))
    assert [r.text for r in records if isinstance(r, Text)] == ["one\ntwo", "a"]
    assert sorted(causes(records).values()) == ["no text", "not UTF-8 text"]
    assert everything(opened("text", tmp_path / "lines.jsonl", text="body"))[1].text == "b"


def test_interleaved_documents_stay_inside_their_folder(tmp_path):
    documents = [
        [{"text": "see"}, {"image": "a.png"}, {"text": "end"}],
        [{"image": "../a.png"}],
        [{"sound": "a.wav"}],
        [],
        [{"image": "a.png"}] * 101,
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"segments": d}) for d in documents))
    first, *others = everything(opened("interleaved", path))
    assert isinstance(first, Interleaved)
    assert first.parts == ("see", (tmp_path / "a.png").resolve(), "end")
    assert [r.cause for r in others] == [
        "path leaves the folder",
        "a segment is neither text nor image",
        "no segments",
        "more than 100 images",
    ]


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def shards(path, **keys):
    source = opened("webdataset", path, **keys)
    return [r for i in range(source.num_shards()) for r in source.shard(i)]


def test_webdataset_groups_members_and_reports_what_lacks(tmp_path):
    members = [
        ("x/1.png", image()),
        ("x/1.txt", b"one"),
        ("x/1.json", b'{"alt": ["uno", "eins"]}'),
        ("x/1.cls", b"7"),
        ("y/1.jpg", image("JPEG")),
        ("y/1.txt", b"another 1"),
        ("2.txt", b"no image"),
        ("3.png", image()),
        ("4.png", image()),
        ("4.txt", b"\xff"),
    ]
    for shard in range(2):
        write_tar(tmp_path / f"s-{shard}.tar", members)
    records = shards(f"{tmp_path}/s-{{0..1}}.tar")
    assert len(records) == 10
    assert [r.captions for r in records[:2]] == [("one",), ("another 1",)]
    assert [r.cause for r in records[2:5]] == ["no image", "no caption", "caption cannot be read"]
    assert shards(f"{tmp_path}/s-?.tar", caption="json.alt")[0].captions == ("uno", "eins")
    assert shards(tmp_path / "s-0.tar", template="class {label}")[0].captions == ("class 7",)


def test_a_cut_shard_gives_what_it_holds_and_says_so(tmp_path):
    members = [(f"{i}.{e}", c) for i in range(9) for e, c in (("png", image()), ("txt", b"t"))]
    path = write_tar(tmp_path / "s.tar", members)
    path.write_bytes(path.read_bytes()[:9_000])
    *whole, last = shards(path)
    assert 3 <= len(whole) < 9 and all(isinstance(r, Pair) for r in whole)
    assert (last.key, last.cause) == (str(path), "damaged shard")


@pytest.mark.parametrize("damage", ["hole", "garbage", "no end", "more behind"])
def test_a_shard_that_is_damaged_at_a_header_does_not_just_end(damage, tmp_path):
    members = [(f"{i}.{e}", c) for i in range(4) for e, c in (("png", image()), ("txt", b"t"))]
    path = write_tar(tmp_path / "s.tar", members)
    content = path.read_bytes()
    third = content.index(b"2.png")
    path.write_bytes(
        {
            "hole": content[:third] + bytes(512) + content[third + 512 :],
            "garbage": content[:third] + b"\xff" * 512 + content[third + 512 :],
            "no end": content[:third],
            "more behind": content + content,
        }[damage]
    )
    *whole, last = shards(path)
    assert len(whole) >= 1 and all(isinstance(r, Pair) for r in whole)
    assert (last.key, last.cause) == (str(path), "damaged shard")


def test_a_damaged_shard_before_all_others_is_one_of_those_begun():
    """A place of a mixture tells the oldest record that waits, which may be of before it."""
    check_shards("s", 1, 0.0, 100, 0.05, None)
    with pytest.raises(DataError, match="6 of 6 shards read are damaged"):
        check_shards("s", 6, 0.0, 100, 0.05, None)


def test_a_member_that_nobody_wants_may_be_of_any_size(tmp_path, monkeypatch):
    monkeypatch.setattr("mmrdpm.data.sources.webdataset.MAX_BYTES", 400)
    film, text = ("1.mp4", bytes(5000)), ("1.txt", b"one")
    assert shards(write_tar(tmp_path / "a.tar", [("1.png", image()), text, film]))[0].captions
    (broken,) = shards(write_tar(tmp_path / "b.tar", [("1.png", bytes(500)), text]))
    assert broken.cause == "archive member too large"


@pytest.mark.parametrize("path", ["s3://bucket/{0..9}.tar", "/data/{000..12.tar"])
def test_addresses_that_cannot_be_used_are_one_clear_error(path):
    with pytest.raises(DataError, match=r"pipe:COMMAND|write ranges as"):
        shards(path)


def test_one_empty_shard_stops_nothing_all_of_them_do(tmp_path):
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", [("1.png", image()), ("1.txt", b"one")][: 2 * (i > 0)])
    full = opened("webdataset", tmp_path / "*.tar")
    found = [next(full.records(lane, 3, "seed", None))[1] for lane in range(3)]
    assert all(isinstance(r, Pair) for r in found)
    empty = opened("webdataset", tmp_path / "0.tar")
    with pytest.raises(DataError, match=r"/0\.tar: no records found"):
        next(empty.records(0, 3, "seed", None))
    assert str(full) == f"{tmp_path / '0.tar'} and 2 more"


def test_shards_come_through_http_and_pipes_and_failures_are_clear(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("1.png", image()), ("1.txt", b"one")])
    assert shards(f"pipe:cat {path}")[0].captions == ("one",)
    with pytest.raises(DataError, match=r"could not be read.*a run then goes on with --resume"):
        shards("pipe:false")
    with pytest.raises(DataError, match="could not be read"):
        shards(f"pipe:head -c 700 {path}; exit 3")
    with pytest.raises(DataError, match="no file is there"):
        shards(tmp_path / "missing.tar")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert shards(f"{address}/s.tar")[0].captions == ("one",)
        with pytest.raises(DataError, match=rf"{address}/none.tar: .*\(curl: .*: 404\): check"):
            shards(f"{address}/none.tar")
        server.shutdown()


def test_keys_that_mean_nothing_and_empty_places_are_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"data\.sources\.it\.streaming: a source of type text"):
        opened("text", "x", streaming=True)
    with pytest.raises(RecipeError, match=r"it\.path is missing"):
        opened("folder", "")
    with pytest.raises(RecipeError, match=r"must hold \{label\}"):
        opened("folder", "x", template="a photo")
    for kind in ("folder", "text", "interleaved"):
        with pytest.raises(DataError, match="correct the path"):
            opened(kind, tmp_path / "missing")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="the source is empty"):
        opened("interleaved", tmp_path / "empty.jsonl")


def test_the_type_of_a_path_is_guessed(tmp_path):
    (tmp_path / "a.png").write_bytes(image())
    (tmp_path / "d.jsonl").write_text('{"segments": []}')
    (tmp_path / "t.jsonl").write_text('{"text": ""}')
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "a.png").write_bytes(image())
    kinds = {
        str(tmp_path): "interleaved",  # pictures of documents
        str(tmp_path / "pairs"): "folder",
        str(tmp_path / "d.jsonl"): "interleaved",
        str(tmp_path / "t.jsonl"): "text",
        "http://a/b-{0..9}.tar": "webdataset",
        "owner/name": "huggingface",
    }
    assert {path: guess(path).type for path in kinds} == kinds
    with pytest.raises(DataError, match="no such file or folder"):
        guess("/nowhere/at/all")


def test_embedded_sources_hold_the_training_split():
    emoji = open_source("e", SourceConfig("emoji"))
    record = emoji.record(0)
    assert len(emoji) > 3000 and record.image.shape == (72, 72, 3)
    assert record.image.dtype == np.uint8 and record.captions[0] in record.key
    assert open_source("g", SourceConfig("glosses")).record(0).text.endswith(".")


@pytest.mark.parametrize("template", ["{label} at {size}", "{label} {", "{label} {0}"])
def test_a_template_holds_the_label_alone(template, tmp_path):
    with pytest.raises(RecipeError, match=r"no other braces; write \{\{ and \}\}"):
        opened("webdataset", tmp_path / "x.tar", label="cls", template=template)


def test_whatever_a_decoder_raises_is_a_broken_picture(tmp_path, monkeypatch):
    """Pillow's AVIF decoder says RuntimeError of a damaged file."""
    (tmp_path / "a.png").write_bytes(image())

    def fail(*_):
        raise RuntimeError("Failed to decode image")

    monkeypatch.setattr(pictures, "to_rgb", fail)
    with pytest.raises(PictureError, match="could not be read: Failed to decode"):
        pictures.open_picture(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_damaged_exif_is_a_broken_picture_or_none_at_all(kind, tmp_path):
    """A header that ends where its first number should be."""
    Image.new("RGB", (4, 4), "red").save(tmp_path / f"a.{kind}", exif=b"Exif\0\0II*\0")
    try:
        assert pictures.open_picture(tmp_path / f"a.{kind}").size == (4, 4)
    except PictureError as error:
        assert "could not be read" in str(error)


def test_postscript_is_no_picture(tmp_path):
    """Its reader runs programs."""
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(PictureError, match="not a picture that can be read"):
        pictures.open_picture(tmp_path / "a.jpg")


def test_linked_folders_are_searched_once(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "real" / "a.png").write_bytes(image())
    (tmp_path / "data" / "cats").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "up").symlink_to(tmp_path / "data")  # a circle
    assert find(str(tmp_path / "data"), IMAGE_SUFFIXES) == [tmp_path / "data" / "cats" / "a.png"]
