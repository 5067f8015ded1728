"""Corners of the data: archives that are bombs or misnamed, cut texts, odd weights and shapes."""

import bz2
import io
import itertools
import json
import lzma
import os
import tarfile
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmrdpm import recipe, text_tokenizer
from mmrdpm.cli import main
from mmrdpm.data import documents
from mmrdpm.data.documents import Drafter
from mmrdpm.data.mixture import Mixture
from mmrdpm.data.packing import Lane
from mmrdpm.data.pictures import PictureError, open_picture, to_square
from mmrdpm.data.plan import DataPlan
from mmrdpm.data.records import Broken, Pair, Text, first_epoch
from mmrdpm.data.sources import SourceConfig, open_source
from mmrdpm.errors import DataError, RecipeError
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.vocabulary import Vocabulary


def opened(kind, path, **keys):
    return open_source("it", SourceConfig(kind, path=str(path), **keys))


def png(colour=0):
    stream = io.BytesIO()
    Image.new("RGB", (12, 8), (colour, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def tar(*members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return stream.getvalue()


def records_of(path, content):
    pytest.importorskip("webdataset", reason="the extra `data` is not installed")
    path.write_bytes(content)
    return list(opened("webdataset", path).shard(0))


@pytest.mark.parametrize("compress", [bz2.compress, lzma.compress])
def test_an_archive_whose_few_bytes_could_be_gigabytes_is_a_damaged_shard(compress, tmp_path):
    (broken,) = records_of(tmp_path / "a.tar", compress(tar(("0.png", png()), ("0.txt", b"one"))))
    assert broken.cause == "damaged shard" and "bzip2 or xz" in broken.detail


def test_a_sparse_member_is_a_damaged_shard(tmp_path):
    header = bytearray(tarfile.TarInfo("1.png").tobuf(tarfile.GNU_FORMAT))
    header[156:157], header[482:483] = tarfile.GNUTYPE_SPARSE, b"\1"  # its map goes on
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    whole = tar(("0.png", png()), ("0.txt", b"one"))
    (broken,) = records_of(tmp_path / "a.tar", whole[: 4 * 512] + header)
    assert broken.cause == "damaged shard" and "sparse" in broken.detail


def test_a_sparse_member_of_the_pax_format_is_one_too(tmp_path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        header = tarfile.TarInfo("0.png")
        header.size = len(png())
        sparse = {"major": "1", "minor": "0", "name": "0.png", "realsize": "9"}
        header.pax_headers = {f"GNU.sparse.{key}": value for key, value in sparse.items()}
        archive.addfile(header, io.BytesIO(png()))
    (broken,) = records_of(tmp_path / "a.tar", stream.getvalue())
    assert broken.cause == "damaged shard" and "sparse" in broken.detail


def test_a_picture_whose_name_has_a_dot_is_told(tmp_path):
    """What is before the first one is the record's name."""
    names = ("0001", "Mr. Smith", "0002", "St. Ives")
    members = [(f"{n}.{s}", png() if s == "png" else b"one") for n in names for s in ("png", "txt")]
    found = records_of(tmp_path / "a.tar", tar(*members, ("0003.json", b"{}")))
    assert [type(r) for r in found] == [Pair, Broken, Pair, Broken]
    assert {r.cause for r in found if isinstance(r, Broken)} == {"no image"}
    assert " Smith.png" in found[1].detail


def test_a_member_that_comes_a_thousand_times_is_told_once(tmp_path):
    (broken,) = records_of(tmp_path / "a.tar", tar(*[("0.png", png())] * 1000, ("0.txt", b"one")))
    assert broken.cause == "a member comes twice"


def drafter_of(folder, **plan):
    images, texts = image_tokenizer.load(folder / "image"), text_tokenizer.load(folder / "text")
    made = recipe.from_dict(DataPlan, {"steps_per_image": 2, **plan}, "test")
    return Drafter(made, texts, Vocabulary(texts.size, images.codebook_size), images)


def test_a_record_counts_once_however_many_documents_it_is_cut_into(tiny_tokenizers, tmp_path):
    """Else long texts would hide how many of the records are broken."""
    lines = [{"text": "red heart " * 200} if i % 2 else {"txt": ""} for i in range(40)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sources = {"t": opened("text", tmp_path / "t.jsonl")}
    mixture = Mixture(sources, {"t": 1.0}, 0, drafter_of(tiny_tokenizers, seq_len=64))
    lane = Lane(lambda place: mixture.documents(0, 1, place), lambda d: d.length(()), 64, 4)
    for _ in range(200):
        lane.row()
    assert lane.seen < 80
    assert lane.broken.total() / lane.seen == pytest.approx(0.5, abs=0.1)
    assert lane.state()["sources"]["t"] == [lane.seen, lane.broken.total()]


@pytest.mark.parametrize("over", [0, 1])
def test_no_document_without_text_follows_a_text_that_fills_its_row(over, tiny_tokenizers):
    drafter = drafter_of(tiny_tokenizers, seq_len=64)
    ids = list(range(63 + over))
    drafts = list(drafter._cut([tuple(ids)]))
    assert [i for draft in drafts for i in draft.parts[0][1:]][: len(ids)] == ids
    assert [len(draft.parts[0]) for draft in drafts] == ([64] if not over else [64, 3])


def test_a_very_long_text_is_encoded_in_pieces_that_are_the_same(tiny_tokenizers, monkeypatch):
    drafter, text = drafter_of(tiny_tokenizers, seq_len=64), "red heart\npizza \n\n" * 40 + "x" * 99
    whole = [draft.parts for draft in drafter.drafts(Text("k", text), None)]
    monkeypatch.setattr(documents, "_AT_ONCE", 30)
    assert [draft.parts for draft in drafter.drafts(Text("k", text), None)] == whole
    assert all(len(piece) <= 30 for piece in documents._pieces(text, 30))
    assert "".join(documents._pieces(text, 30)) == text
    broken = drafter.drafts(Text("k", text + "\ud800"), None)
    assert broken.cause == "not Unicode text"


@pytest.mark.parametrize("count", range(2, 21))
def test_the_weights_that_an_error_names_can_be_copied(count):
    def plan(weights):
        sources = {f"s{i}": {"type": "glosses", "weight": w} for i, w in enumerate(weights)}
        return recipe.from_dict(DataPlan, {"sources": sources}, "test")

    with pytest.raises(RecipeError) as refused:
        plan([1.0] * count)
    assert f"add up to {count}, not to 1" in str(refused.value)
    advised = str(refused.value).partition(" write ")[2].split(", ")
    assert len(plan([float(text.partition(": ")[2]) for text in advised]).sources) == count


def test_a_picture_of_which_nothing_would_be_left_is_broken():
    assert to_square(Image.new("RGB", (63, 1)), 32).min() == 0
    for size in ((1000, 1), (1, 1000)):
        with pytest.raises(PictureError, match=f"too oblong: {size[0]}x{size[1]}, crop it"):
            to_square(Image.new("RGB", size), 32)


def test_a_pipe_in_place_of_a_picture_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "0.png")
    with pytest.raises(PictureError, match=r"0\.png: .* it is no file"):
        open_picture(tmp_path / "0.png")


def cache_recipe(folder, tiny_tokenizers, **source):
    mapping = {
        "kind": "model",
        "tokenizers": {k: str(tiny_tokenizers / k) for k in ("image", "text")},
        "data": {"sources": {"p": source}},
    }
    path = folder / "r.yaml"
    path.write_text(json.dumps(mapping))
    return path


def test_a_cache_of_other_captions_of_the_same_pictures_is_refused(
    tiny_tokenizers, tmp_path, capsys
):
    (tmp_path / "d").mkdir()
    lines = [{"file_name": f"{i}.png", "text": "a", "title": "b"} for i in range(3)]
    (tmp_path / "d/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for i in range(3):
        (tmp_path / f"d/{i}.png").write_bytes(png(i))
    source = {"type": "folder", "path": str(tmp_path / "d")}
    path = cache_recipe(tmp_path, tiny_tokenizers, **source)
    command = ["data", "cache", str(path), "--out", str(tmp_path / "c")]
    assert main(command) == 0 == main([*command, "data.sources.p.weight=1.0"])
    capsys.readouterr()
    assert main([*command, "data.sources.p.caption=title"]) == 1
    said = capsys.readouterr().err
    assert "with taken type: folder, not type: folder, caption: title (its image" in said
    manifest = tmp_path / "c/p/manifest.json"
    mapping = json.loads(manifest.read_text())
    del mapping["taken"]
    manifest.write_text(json.dumps(mapping))  # as an earlier version wrote it
    assert main([*command, "data.sources.p.caption=title"]) == 0


@pytest.mark.parametrize("fault", ["end", "row", "shape"])
def test_a_shard_of_a_cache_that_says_what_cannot_be_is_a_broken_record(
    fault, tiny_tokenizers, tmp_path
):
    (tmp_path / "d").mkdir()
    for i in range(3):
        (tmp_path / f"d/{i}.png").write_bytes(png(i))
        (tmp_path / f"d/{i}.txt").write_text("text")
    path = cache_recipe(tmp_path, tiny_tokenizers, type="folder", path=str(tmp_path / "d"))
    assert main(["data", "cache", str(path), "--out", str(tmp_path / "c")]) == 0
    shard = tmp_path / "c/p/shard-00000.safetensors"
    tensors = load_file(shard)
    if fault == "end":
        tensors["ends"][0] = -5
    elif fault == "row":
        tensors["records"][0, 2] = -1
    else:
        tensors["latents/2x2"] = torch.zeros(3, 2, 3, 4, dtype=torch.float16)
    save_file(tensors, shard, {"mmrdpm": json.dumps({"skipped": {}})})
    assert opened("cache", tmp_path / "c/p").record(0).cause == "cache shard cannot be read"


def test_an_archive_of_pictures_is_read_as_the_library_names_its_members(tmp_path):
    """Whole and streaming; a name that leaves the data set's folder is not followed."""
    pytest.importorskip("datasets").disable_progress_bars()
    (tmp_path / "d").mkdir()
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"number {i}"}) for i in range(4)]
    for folder in (tmp_path / "d", tmp_path):
        with zipfile.ZipFile(folder / "train.zip", "w") as archive:
            archive.writestr("metadata.jsonl", "\n".join(lines))
            for i in range(4):
                archive.writestr(f"{i}.png", png(i))
    whole = opened("huggingface", tmp_path / "d")
    streams = opened("huggingface", tmp_path / "d", streaming=True)
    for found in ([whole.record(i) for i in range(4)], list(streams.shard(0))):
        pictures = {record.captions[0]: record.image for record in found}
        assert pictures == {f"number {i}": png(i) for i in range(4)}
    reader = whole.reader
    assert reader._file(f"zip://0.png::{tmp_path / 'd/train.zip'}") == png(0)
    assert reader._file(f"zip://9.png::{tmp_path / 'd/train.zip'}") is None
    assert reader._file(f"zip://0.png::{tmp_path / 'train.zip'}") is None
    assert reader._file("zip://0.png::https://127.0.0.1:1/train.zip") is None
    assert reader._file("hf://datasets/who/else@main/0.png") is None


@pytest.mark.parametrize("kind", ["folder", "webdataset", "huggingface"])
def test_where_pictures_alone_are_wanted_no_captions_need_be_there(kind, tmp_path, capsys):
    path = {"folder": "d", "webdataset": "d/0.tar", "huggingface": "d/0.parquet"}[kind]
    (tmp_path / "d").mkdir()
    if kind == "folder":
        (tmp_path / "d/metadata.jsonl").write_text("no JSON")
        for i in range(2):
            (tmp_path / f"d/{i}.png").write_bytes(png(i))
    elif kind == "webdataset":
        pytest.importorskip("webdataset", reason="the extra `data` is not installed")
        members = (("0.png", png()), ("0.json", b"{"), ("1.png", png(1)))
        (tmp_path / path).write_bytes(tar(*members))
    else:
        library = pytest.importorskip("datasets")
        library.disable_progress_bars()
        rows = {"image": [{"bytes": png(i), "path": None} for i in range(2)]}
        features = library.Features({"image": library.Image()})
        library.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / path))
    config = SourceConfig(kind, path=str(tmp_path / path))
    found = [r for _, r in first_epoch(open_source("it", config, captions=False), "0", 9)]
    assert [r.captions for r in found] == [(), ()]
    mapping = {"kind": "image", "data": {"sources": {"p": {"type": kind, "path": config.path}}}}
    (tmp_path / "r.yaml").write_text(json.dumps(mapping))
    capsys.readouterr()
    assert main(["data", "inspect", str(tmp_path / "r.yaml")]) == 0
    assert "pictures: 2, " in (said := capsys.readouterr().out) and "problems: none" in said


def test_lanes_that_cannot_share_an_epoch_evenly_stay_together():
    from test_data_resume import Shelves

    source, lanes = Shelves([2] * 6), 4  # a shard and a half for each
    readers = [source.records(lane, lanes, "0", None) for lane in range(lanes)]
    for _ in range(5):
        two_epochs = Counter(next(reader)[1].key for _ in range(6) for reader in readers)
        assert len(two_epochs) == 12 and set(two_epochs.values()) == {2}


def test_a_place_of_an_earlier_version_is_gone_on_from_where_it_means_the_same():
    from test_data_resume import Shelves

    even = Shelves([3] * 8)
    whole = list(itertools.islice(even.records(1, 4, "0", None), 30))
    place, _ = whole[10]  # the first record of the lane's fourth shard: of its second epoch
    assert place == [3, 2]
    assert next(even.records(1, 4, "0", [1, 1, 2])) == whole[11]
    with pytest.raises(DataError, match="dealt 6 shards to 4 rows otherwise: begin a new run"):
        next(Shelves([3] * 6).records(1, 4, "0", [1, 1, 2]))
    assert np.array_equal(even.begun(1, 4, [1, 1, 2]), even.begun(1, 4, [3, 2]))


def test_a_run_among_its_own_pictures_is_refused(tmp_path):
    """Its samples would be pictures to learn, uncaptioned, and the list of records another."""
    plan = DataPlan(sources={"mine": SourceConfig("folder", path=str(tmp_path / "pictures"))})
    plan.check_outside(tmp_path / "run")
    plan.check_outside(tmp_path / "pictures-run")
    for run in ("pictures", "pictures/runs/one"):
        with pytest.raises(RecipeError, match=r"data\.sources\.mine: .* give --run another"):
            plan.check_outside(tmp_path / run)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "metadata.jsonl").write_text("")  # lists what is to be learned
    plan.check_outside(tmp_path / "pictures/runs/one")
