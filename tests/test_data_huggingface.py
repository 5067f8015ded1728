"""Data sets of the library `datasets`: tables and streams, and what is wrong with them."""

import io

import pytest
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from mmrdpm.cli import main
from mmrdpm.data.sources import SourceConfig, open_source
from mmrdpm.errors import DataError


def opened(path, **keys):
    return open_source("it", SourceConfig("huggingface", path=str(path), **keys))


def everything(source):
    return [source.record(i) for i in range(len(source))]


def image(fmt="PNG"):
    stream = io.BytesIO()
    Image.new("RGB", (12, 8), 1).save(stream, fmt)
    return stream.getvalue()


class _Everything(IterableDataset):
    """In every worker the keys of the first shard."""

    def __init__(self, source):
        self.source = source

    def __iter__(self):
        yield [r.key.rpartition("#")[2] for r in self.source.shard(0)]


@pytest.fixture(scope="module")
def datasets():
    library = pytest.importorskip("datasets")
    library.disable_progress_bars()
    return library


@pytest.fixture
def table(datasets, tmp_path):
    """A parquet file of three rows, the last without an image."""
    names = datasets.ClassLabel(names=["cat", "big_dog"])
    features = {"image": datasets.Image(), "caption": datasets.Value("string"), "label": names}
    rows = {
        "image": [{"bytes": image("JPEG"), "path": None}] * 2 + [None],
        "caption": ["one", "two", "three"],
        "label": [0, 1, 1],
    }
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    data.to_parquet(str(tmp_path / "t.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    return tmp_path


@pytest.mark.parametrize("place", ["t.parquet", "saved"])
def test_hugging_face_tables(table, place):
    first, _, last = everything(opened(table / place))
    assert first.captions == ("one",) and first.image[:3] == b"\xff\xd8\xff"
    assert last.cause == "no image"
    labelled = opened(table / place, template="a {label}")
    assert labelled.record(1).captions == ("a big dog",)


def test_hugging_face_streams_and_their_faults(table):
    source = opened(table / "t.parquet", streaming=True)
    records = [r for i in range(source.num_shards()) for r in source.shard(i)]
    assert [getattr(r, "captions", None) for r in records] == [("one",), ("two",), None]
    workers = DataLoader(_Everything(source), batch_size=None, num_workers=2)
    assert [keys for keys in workers] == [["0/0", "0/1", "0/2"]] * 2
    with pytest.raises(DataError, match="no column 'alt': it has image, caption, label"):
        opened(table / "t.parquet", caption="alt")
    (table / "t.parquet").write_bytes(b"PAR1 no parquet")
    with pytest.raises(DataError, match="could not be opened"):
        opened(table / "t.parquet")


def test_pictures_are_found_by_what_a_column_holds(datasets, tmp_path):
    """Under whatever name: texts alone would be learned of such a table, without a word."""
    picture, text = datasets.Image(), datasets.Value("string")
    shapes = {
        "one": {"photo": picture, "text": text},
        "two": {"front": picture, "back": picture, "text": text},
        "none": {"title": text},
    }
    for name, shape in shapes.items():
        row = {key: "a" if kind is text else {"bytes": image()} for key, kind in shape.items()}
        rows = {key: [value] for key, value in row.items()}
        data = datasets.Dataset.from_dict(rows, features=datasets.Features(shape))
        data.to_parquet(str(tmp_path / f"{name}.parquet"))
    for streaming in (False, True):
        source = opened(tmp_path / "one.parquet", streaming=streaming)
        (found,) = source.shard(0) if streaming else everything(source)
        assert found.captions == ("a",) and found.image == image()
    assert everything(opened(tmp_path / "one.parquet", text="text"))[0].text == "a"
    with pytest.raises(DataError, match=r"front, back hold pictures: name one with .*'image'"):
        opened(tmp_path / "two.parquet")
    assert opened(tmp_path / "two.parquet", image="back").record(0).image == image()
    with pytest.raises(DataError, match=r"no column for the image among title.*key 'image'"):
        open_source("it", SourceConfig("huggingface", path=str(tmp_path / "none.parquet")), False)


def test_rows_name_files_of_the_data_set_alone_and_labels_that_it_knows(datasets, tmp_path):
    from pyarrow import parquet

    for place in ("data/in.png", "out.png"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(image())
    paths = ["in.png", str(tmp_path / "out.png"), "../out.png", "in.png"]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat"])}
    rows = {"image": [{"bytes": None, "path": p} for p in paths], "label": [0, 0, 0, None]}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    data = data.cast_column("image", datasets.Image(decode=False))
    parquet.write_table(data.data.table, tmp_path / "data" / "t.parquet")
    for place in ("data/t.parquet", "data/*.parquet"):
        found = everything(opened(tmp_path / place, template="a {label}"))
        assert found[0].captions == ("a cat",) and found[0].image == tmp_path / "data" / "in.png"
        assert [r.cause for r in found[1:]] == ["no image", "no image", "no label"]


def test_what_lies_here_has_no_revisions(table):
    for place in ("t.parquet", "saved"):
        with pytest.raises(DataError, match=rf"{place}: lies on this machine .* 'revision' \(v1\)"):
            opened(table / place, revision="v1")


def test_an_unreachable_hub_is_one_clear_error(datasets, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="nobody/nothing: the data set could not be opened"):
        opened("nobody/nothing")


@pytest.mark.parametrize("streaming", ["false", "true"])
@pytest.mark.parametrize("name", ["e.parquet", "e.jsonl"])
def test_an_empty_table_is_one_clear_line(name, streaming, datasets, tmp_path, capsys):
    features = {"image": datasets.Image(), "caption": datasets.Value("string")}
    nothing = {"image": [], "caption": []}
    data = datasets.Dataset.from_dict(nothing, features=datasets.Features(features))
    data.to_parquet(str(tmp_path / "e.parquet"))
    (tmp_path / "e.jsonl").touch()
    capsys.readouterr()
    path = str(tmp_path / name)
    assert main(["data", "inspect", path, "type=huggingface", f"streaming={streaming}"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mmrdpm: error: {path}: ")
    assert "that the file holds rows" in line or "no records found" in line
