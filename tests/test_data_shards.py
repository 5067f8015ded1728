"""Shards that are cut: told, counted, and a reason to stop where they are many."""

import json
import re
from contextlib import nullcontext

import pytest
from archives import png, write_tar

from mmrdpm import recipe, text_tokenizer
from mmrdpm.cli import main
from mmrdpm.data.inspect import inspect
from mmrdpm.data.loader import Loader, merge_states
from mmrdpm.data.plan import DataPlan
from mmrdpm.data.sources import SourceConfig, open_source
from mmrdpm.data.texts import TextPlan, read_texts
from mmrdpm.errors import DataError
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.vocabulary import Vocabulary

STOPS = [(4, 3, True), (40, 1, False), (8, 1, True)]  # shards, how many of them are cut


def opened(kind, path, **keys):
    return open_source("it", SourceConfig(kind, path=str(path), **keys))


def cut_shards(folder, count, cut):
    """Shards of nine pairs each, of the first of them but a few."""
    folder.mkdir()
    for shard in range(count):
        members = {f"{i}.{k}": c for i in range(9) for k, c in (("png", png()), ("txt", b"t"))}
        path = write_tar(folder / f"{shard:02d}.tar", members)
        if shard < cut:
            path.write_bytes(path.read_bytes()[:9_000])
    return folder / "*.tar"


@pytest.mark.parametrize(("count", "cut", "stops"), STOPS)
@pytest.mark.parametrize("world_size", [1, 2])
def test_cut_shards_are_told_and_stop_the_run_where_they_are_many(
    count, cut, stops, world_size, tiny_tokenizers, tmp_path, capsys
):
    images = image_tokenizer.load(tiny_tokenizers / "image")
    texts = text_tokenizer.load(tiny_tokenizers / "text")
    vocabulary = Vocabulary(texts.size, images.codebook_size)
    path = cut_shards(tmp_path / "s", count, cut)
    source = {"type": "webdataset", "path": str(path)}
    shape = {"rows": 2, "seq_len": 64, "steps_per_image": 2, "max_caption_tokens": 8}
    plan = recipe.from_dict(DataPlan, {"sources": {"s": source}, **shape}, "test")
    loaders = [Loader(plan, 0, images, texts, vocabulary, r, world_size) for r in range(world_size)]
    stopped = 0
    for loader in loaders:
        try:
            for _ in range(120 // world_size):
                loader.batch()
        except DataError as error:
            stopped += 1
            assert re.search(
                r"data\.sources\.s: \d+ of \d+ shards read.*the last: .*tar: ", str(error)
            )
    assert (stopped > 0) == stops
    said = capsys.readouterr().err
    if not stops:
        assert 1 <= said.count("mmrdpm: warning: ") <= world_size  # once, though read twice
        assert "00.tar: damaged: " in said and "its later records are left out" in said
        assert all(loader.rows.broken().total() for loader in loaders)


@pytest.mark.parametrize(("count", "share"), [(20, 0.06), (2, 0.6)])
def test_shards_that_were_read_ahead_were_begun(count, share, tiny_tokenizers, tmp_path):
    """Many rows that each look ahead read small shards through long before they use them up."""
    images = image_tokenizer.load(tiny_tokenizers / "image")
    texts = text_tokenizer.load(tiny_tokenizers / "text")
    path = cut_shards(tmp_path / "s", count, 1)
    source = {"type": "webdataset", "path": str(path)}
    shape = {"rows": 16, "seq_len": 64, "steps_per_image": 2, "max_caption_tokens": 8}
    how = {"sources": {"s": source}, "max_broken_share": share, "look_ahead": 32, **shape}
    plan = recipe.from_dict(DataPlan, how, "test")
    vocabulary = Vocabulary(texts.size, images.codebook_size)
    loader = Loader(plan, 0, images, texts, vocabulary)
    for _ in range(12):
        loader.batch()
    again = Loader(plan, 0, images, texts, vocabulary)
    again.restore(merge_states([loader.state()]))
    for _ in range(12):
        again.batch()
    assert again.rows.broken()["s: damaged shard"] > 3


@pytest.mark.parametrize(("count", "cut", "stops"), STOPS)
def test_a_text_tokeniser_takes_cut_shards_as_training_does(count, cut, stops, tmp_path, capsys):
    path = cut_shards(tmp_path / "s", count, cut)
    plan = TextPlan({"s": SourceConfig("webdataset", path=str(path))})
    refusal = pytest.raises(DataError, match=r"sources\.s: \d of \d shards.*tar: .*start again")
    with refusal if stops else nullcontext():
        assert len(list(read_texts(plan))) > 9 * (count - cut)
    assert ".tar: damaged: " in capsys.readouterr().err


@pytest.mark.parametrize(("count", "cut", "stops"), STOPS)
def test_a_cache_takes_cut_shards_as_training_does(
    count, cut, stops, tiny_tokenizers, tmp_path, capsys
):
    path = cut_shards(tmp_path / "s", count, cut)
    made = tmp_path / "r.yaml"
    names = json.dumps({t: str(tiny_tokenizers / t) for t in ("image", "text")})
    source = json.dumps({"type": "webdataset", "path": str(path)})
    made.write_text(f"kind: model\ntokenizers: {names}\ndata: {{sources: {{s: {source}}}}}\n")
    command = ["data", "cache", str(made), "--out", str(tmp_path / "c")]
    for _ in range(2):  # the second time with fewer shards to make, or none
        assert main(command) == stops
        said = capsys.readouterr().err
        assert bool(re.search(r"data\.sources\.s: \d of \d+ shards read are", said)) == stops
        assert ("is deleted" in said) == stops
    assert main([*command, "data.max_broken_share=0.8"]) == 0
    assert f"s: {cut} of " in capsys.readouterr().err


def test_inspect_names_damaged_shards(tmp_path):
    said = list(inspect(opened("webdataset", cut_shards(tmp_path / "s", 3, 1)), 40).summary())
    assert any(re.match(r"PROBLEM: damaged shard: .*/00.tar \(.*left out\)", line) for line in said)
