"""Faults in other people's files: each is told in a line that says how to mend it."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from archives import png, write_tar
from PIL import Image
from safetensors.torch import save_file

from mmrdpm import text_tokenizer
from mmrdpm.cli import main
from mmrdpm.data import lines
from mmrdpm.data.cache import CacheWriter
from mmrdpm.data.documents import Draft
from mmrdpm.data.faults import SkippedLog
from mmrdpm.data.images import ImagePlan, open_images
from mmrdpm.data.inspect import inspect
from mmrdpm.data.mixture import Item
from mmrdpm.data.pictures import PictureError, open_picture
from mmrdpm.data.plan import DataPlan
from mmrdpm.data.records import Broken
from mmrdpm.data.rows import Lanes
from mmrdpm.data.sources import SourceConfig, open_source
from mmrdpm.data.sources.cached import shard_path
from mmrdpm.data.sources.webdataset import Shards
from mmrdpm.errors import DataError
from mmrdpm.rdpm import image_tokenizer

BOM = b"\xef\xbb\xbf"


def opened(kind, path, **keys):
    return open_source("it", SourceConfig(kind, path=str(path), **keys))


@pytest.fixture(scope="module")
def datasets():
    library = pytest.importorskip("datasets")
    library.disable_progress_bars()
    return library


def test_a_split_that_local_files_lack_is_refused(datasets, tmp_path):
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})
    data.to_parquet(str(tmp_path / "t.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    assert len(opened("huggingface", tmp_path / "saved", streaming=True)) == 3
    datasets.DatasetDict(train=data).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(DataError, match="splits: has no split 'test': choose one of train"):
        opened("huggingface", tmp_path / "splits", split="test")
    for place, unknown in (
        ("t.parquet", 'the data set could not be opened .*Unknown split "test"'),
        ("saved", r"has no splits: .* 'split' \(test\)"),
    ):
        assert len(opened("huggingface", tmp_path / place)) == 3
        with pytest.raises(DataError, match=rf"/{place}: {unknown}"):
            opened("huggingface", tmp_path / place, split="test")
        with pytest.raises(DataError, match=f"{place}: has no subsets: .* 'subset' \\(large\\)"):
            opened("huggingface", tmp_path / place, subset="large")
    assert len(opened("huggingface", tmp_path / "t.parquet", split="train[:2]")) == 2


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("name", "content"),
    [("h.jsonl", b'{"text": "a"}\n{broken\n'), ("h.csv", b"text\n\xff\xfe\n")],
)
def test_a_broken_local_file_is_no_matter_of_the_network(
    datasets, name, content, streaming, tmp_path
):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refusal:
        opened("huggingface", tmp_path / name, streaming=streaming)
    said = str(refusal.value)
    assert "check subset and split, and that the file holds rows, is whole, in UTF-8" in said
    assert "network" not in said and "An error occurred while generating" not in said


def test_inspect_reads_each_record_of_a_shard_once(tmp_path):
    captions = {"0": b"one", "1": b"two", "2": b"\xff"}
    members = {
        f"{n}.{kind}": c
        for n, text in captions.items()
        for kind, c in (("png", png()), ("txt", text))
    }
    findings = inspect(opened("webdataset", write_tar(tmp_path / "s.tar", members)), 40)
    assert len(findings.lines) == 3 and findings.problems == {"caption cannot be read": 1}
    (tmp_path / "empty.tar").touch()
    assert len(inspect(opened("webdataset", tmp_path / "empty.tar"), 40).lines) == 1


def test_inspect_shows_a_text_that_training_would_leave_out(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a\\ud800b"}\n')
    findings = inspect(opened("text", tmp_path / "t.jsonl"), 9)
    assert findings.problems == {"not Unicode text": 1}
    assert (
        r"PROBLEM: not Unicode text ('utf-8' codec can't encode character '\ud800'"
        in findings.lines[0]
    )


def test_inspect_marks_an_empty_caption_where_it_stands(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    line = {"file_name": "a.png", "captions": [" ", "one"]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    findings = inspect(opened("folder", tmp_path), 9)
    assert findings.lines == ["a.png  12x8  PROBLEM: empty caption | 3 characters: one"]
    assert findings.problems == {"empty caption": 1}


def test_inspect_shows_what_was_read_before_a_shard_was_out_of_reach(tmp_path, monkeypatch, capsys):
    path = write_tar(tmp_path / "s.tar", {"1.png": png(), "1.txt": b"one"})
    whole = Shards.shard

    def then_out_of_reach(self, index):
        yield from whole(self, index)
        raise DataError("out of reach")

    monkeypatch.setattr(Shards, "shard", then_out_of_reach)
    assert main(["data", "inspect", str(path)]) == 1
    said = capsys.readouterr()
    assert "12x8  3 characters: one" in said.out and "pictures: 1," in said.out
    assert "problems: none" not in said.out and "out of reach" in said.err


def test_where_a_name_of_members_is_wrong_all_that_are_there_are_listed(tmp_path):
    members = {"1.png": png(), "1.caption": b"one", "2.png": png()}
    path = write_tar(tmp_path / "s.tar", members)
    first, second = opened("webdataset", path).shard(0)
    assert first.detail.startswith("members: png, caption: set caption: to one of them")
    assert second.detail.startswith("members: png: ")  # not those of the record before
    first, _ = opened("webdataset", path, caption="caption").shard(0)
    assert first.captions == ("one",)
    (first,) = opened("webdataset", path, image="jpg", caption="caption").shard(0)
    assert first.detail == "members: png, caption: set image: to one of them"
    (last,) = opened("webdataset", path, image="jpg").shard(0)  # both names are wrong
    assert last.detail == "members: png: set image: to one of them"


@pytest.mark.parametrize("fault", ["foreign", "short"])
def test_a_file_that_is_no_shard_of_the_cache_is_named(fault, tiny_tokenizers, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.txt").write_text("a")
    images = image_tokenizer.load(tiny_tokenizers / "image")
    writer = CacheWriter(opened("folder", tmp_path), images, tmp_path / "c", "tiny")
    writer.write(0)
    assert writer.totals() == (1, {})
    shard = shard_path(tmp_path / "c", 0)
    if fault == "foreign":
        save_file({"w": torch.zeros(2)}, shard)
    else:
        shard.write_bytes(shard.read_bytes()[:99])
    with pytest.raises(DataError, match=rf"{shard.name}: .*delete it and run the same command"):
        writer.totals()


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "..", ""])
def test_a_source_whose_files_would_lie_elsewhere_is_refused(name, tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(f"kind: model\ndata: {{sources: {{{name!r}: {{type: emoji}}}}}}\n")
    for job in (["cache", str(path)], ["inspect", str(path)]):
        assert main(["data", *job, "--out", str(tmp_path / "out")]) == 1
        assert "use no slashes" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


def test_blank_lines_and_marks_of_windows_are_no_records(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_bytes(BOM + b'{"text": "a"}\r\n\r\n\r\n{"text": "b"}\r\n5\n\r\n')
    source = opened("text", path)
    found = [source.record(i) for i in range(len(source))]
    assert [r.text for r in found[:2]] == ["a", "b"]
    assert [r.cause for r in found[2:]] == ["not a JSON object"]
    path.write_bytes(BOM + b"\r\n")
    with pytest.raises(DataError, match="the source is empty"):
        opened("text", path)


def test_long_files_of_lines_show_how_far_they_are_read_and_short_ones_do_not(
    tmp_path, monkeypatch, capsys
):
    for name, count in (("a", 2), ("b", 40)):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "a"}\n' * count)
    assert len(opened("text", tmp_path)) == 42 and capsys.readouterr().err == ""
    monkeypatch.setattr(lines, "_LONG", 42 * 14)
    assert len(opened("text", tmp_path)) == 42
    assert re.search(r"looking for lines .*588/588 bytes", capsys.readouterr().err)
    monkeypatch.setattr(lines, "_LONG", 42 * 14 + 1)
    assert len(opened("text", tmp_path)) == 42 and capsys.readouterr().err == ""


def test_a_mark_at_the_start_is_no_part_of_a_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(BOM + b"one")
    (tmp_path / "a.png").write_bytes(png())
    assert opened("text", tmp_path / "a.txt").record(0).text == "one"
    assert opened("folder", tmp_path).record(0).captions == ("one",)
    members = {"1.png": png(), "1.txt": BOM + b"one", "1.cls": BOM + b"7"}
    path = write_tar(tmp_path / "s.tar", members)
    for keys, expected in ({}, "one"), ({"template": "{label}"}, "7"):
        (pair,) = opened("webdataset", path, **keys).shard(0)
        assert pair.captions == (expected,)


def test_floating_point_pixels_are_a_broken_picture_and_16_bit_ones_are_not(tmp_path):
    pixels = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    Image.fromarray(pixels).save(tmp_path / "f.tif")
    with pytest.raises(PictureError, match="floating point pixels: save it with 8 bits") as fault:
        open_picture(tmp_path / "f.tif")
    assert fault.value.cause == "floating point pixels"
    Image.fromarray((pixels * 65535).astype(np.uint16)).save(tmp_path / "i.tif")
    assert open_picture(tmp_path / "i.tif").getextrema() == ((0, 255),) * 3


@pytest.mark.parametrize("train", [text_tokenizer.train_bpe, text_tokenizer.train_sentencepiece])
@pytest.mark.parametrize("texts", [[], [""], [" \n", "\t"]])
def test_no_tokeniser_is_learned_from_nothing(train, texts):
    with pytest.raises(DataError, match="no texts to learn a tokeniser from"):
        train(iter(texts), 300)


def test_inspect_of_a_broken_stream_is_one_line(datasets, tmp_path, capsys):
    path = tmp_path / "h.jsonl"
    path.write_text(json.dumps({"text": "a"}) + "\n{broken\n")
    assert main(["data", "inspect", str(path), "type=huggingface", "streaming=true"]) == 1
    assert f"{path}: the data set could not be opened" in capsys.readouterr().err


def test_suffixes_of_members_may_be_written_in_capitals(tmp_path):
    members = {"1.JPG": png(), "1.TXT": b"one", "1.Alt": b"two"}
    path = write_tar(tmp_path / "s.tar", members)
    (pair,) = opened("webdataset", path, image="JPG", caption="ALT").shard(0)
    assert pair.captions == ("two",)


def test_a_fault_of_a_picture_is_told_with_its_file_and_in_one_pair_of_brackets(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    segments = [[{"text": "x"}, {"image": f"{name}.png"}] for name in ("gone", "a")]
    lines = [json.dumps({"segments": s}) for s in [*segments, [{"text": " "}]]]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    findings = inspect(opened("interleaved", tmp_path / "d.jsonl"), 9)
    assert len(findings.lines) == 3 and findings.problems["empty text"] == 1
    said = "\n".join(findings.lines)
    assert f"PROBLEM: no such file ({tmp_path / 'gone.png'})" in said
    assert "PROBLEM: not a picture that can be read (PNG, JPEG, WebP and the like can)" in said


def test_what_reads_a_shard_and_fails_is_told_in_words(tmp_path, monkeypatch):
    with pytest.raises(
        DataError, match=r"\(the command ended with status 3\): check what it reads"
    ):
        list(opened("webdataset", "pipe:exit 3").shard(0))
    source = opened("webdataset", write_tar(tmp_path / "s.tar", {"1.png": png()}))
    (tmp_path / "s.tar").unlink()
    with pytest.raises(DataError, match=r"\(No such file or directory\): put the file back"):
        list(source.shard(0))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(DataError, match="is read by curl, which is not here: install it"):
        list(opened("webdataset", "http://127.0.0.1:1/s.tar").shard(0))


def test_the_batch_with_which_broken_pictures_are_too_many_is_listed(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.png").write_bytes(png() if i >= 15 else b"no picture")
    plan, log = ImagePlan({"p": SourceConfig("folder", path=str(tmp_path))}), tmp_path / "skipped"
    images = open_images(plan, 0, 32, 64, log)
    with pytest.raises(DataError, match=r"records are broken.*; all are listed in .*skipped$"):
        images.images(64, torch.Generator())
    assert len(log.read_text().splitlines()) == images.figures()["data/skipped"] > 50


class OneLaneEnds:
    """One lane leaves out a record before its first row, of the other all are broken."""

    def __init__(self, ends):
        self.ends = ends

    def describe(self):
        return ""

    def fingerprints(self):
        return {}

    def documents(self, lane, lanes, place):
        for number in itertools.count():
            whole = lane != self.ends and number
            draft = Draft(((1, 2, 3),)) if whole else Broken(f"{lane}-{number}", "empty text")
            yield Item(number, "t", draft)


@pytest.mark.parametrize(("workers", "ends"), [(0, 1), (2, 1), (2, 0)])
def test_a_batch_that_stops_a_run_lists_what_its_lanes_left_out(workers, ends, tmp_path):
    log = SkippedLog(tmp_path / "skipped.jsonl")
    plan = DataPlan(rows=2, seq_len=16, workers=workers)
    rows = Lanes(OneLaneEnds(ends), plan, (2, 2), 0, 1, log)
    with pytest.raises(DataError, match=r"500 records in a row are broken.*; all are listed in"):
        rows.next()
    found = [json.loads(line)["key"] for line in log.path.read_text().splitlines()]
    assert sorted(found) == sorted([f"{1 - ends}-0", *(f"{ends}-{n}" for n in range(500))])
