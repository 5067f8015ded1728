"""The place in the data: stopped anywhere, resumed by any number of ranks and workers."""

import io
import json
import multiprocessing
import os
import random
import signal
import tarfile
import time
from collections import Counter

import pytest
import torch
from PIL import Image

from mmrdpm import recipe, text_tokenizer, tree
from mmrdpm.data import rows as data_rows
from mmrdpm.data.cache import CacheWriter
from mmrdpm.data.loader import Loader, merge_states
from mmrdpm.data.plan import DataPlan
from mmrdpm.data.records import Indexed, Sharded, Text, shuffled
from mmrdpm.data.sources import SourceConfig, open_source
from mmrdpm.errors import DataError
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.vocabulary import Vocabulary


def png(colour):
    stream = io.BytesIO()
    Image.new("RGB", (9, 7), colour).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path, records):
    with tarfile.open(path, "w") as archive:
        for name, content in records:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def write_parquet(path, numbers):
    """Pairs, one of them without a caption."""
    from pyarrow import parquet, table

    rows = {
        "image": [png((0, 0, i)) for i in numbers],
        "caption": [f"row {i}" if i != 5 else None for i in numbers],
    }
    parquet.write_table(table(rows), path)


def write_cache(pictures, image_tokenizer_folder, folder):
    source = open_source("it", SourceConfig("folder", path=str(pictures)))
    images = image_tokenizer.load(image_tokenizer_folder)
    writer = CacheWriter(source, images, folder, "tiny", per_shard=10)
    for shard in writer.missing():
        writer.write(shard)


@pytest.fixture(scope="module")
def data(tiny_tokenizers, tmp_path_factory):
    """The sources of a mixture of every kind of reading, some records broken."""
    for package in ("datasets", "webdataset"):
        pytest.importorskip(package, reason="the extra `data` is not installed")
    root = tmp_path_factory.mktemp("data")
    (root / "pictures").mkdir()
    for i in range(23):
        (root / "pictures" / f"{i:02d}.png").write_bytes(png((i, 0, 0)))
        (root / "pictures" / f"{i:02d}.txt").write_text(f"picture {i}" if i != 7 else " ")
    lines = [{"text": f"line {i} " + "word " * (i % 9)} for i in range(31)]
    (root / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for shard in range(3):
        records = []
        for i in range(5 + shard):
            records += [(f"{i}.png", png((0, i, shard))), (f"{i}.txt", b"shard %d" % i)]
        write_tar(root / f"shard-{shard}.tar", records)
    segments = [{"text": "before"}, {"image": "pictures/03.png"}, {"text": "after " * 70}]
    (root / "mixed.jsonl").write_text(json.dumps({"segments": segments}))
    write_parquet(root / "table.parquet", range(17))
    (root / "stream").mkdir()
    for shard in range(3):
        write_parquet(root / "stream" / f"{shard}.parquet", range(shard, 12, 3))
    write_cache(root / "pictures", tiny_tokenizers / "image", root / "cache")
    tabular, stream = str(root / "table.parquet"), str(root / "stream" / "*.parquet")
    return {
        "pictures": {"type": "folder", "path": str(root / "pictures"), "weight": 0.2},
        "lines": {"type": "text", "path": str(root / "lines.jsonl"), "weight": 0.2},
        "shards": {"type": "webdataset", "path": f"{root}/shard-{{0..2}}.tar", "weight": 0.2},
        "mixed": {"type": "interleaved", "path": str(root / "mixed.jsonl"), "weight": 0.1},
        "table": {"type": "huggingface", "path": tabular, "weight": 0.1},
        "stream": {"type": "huggingface", "path": stream, "streaming": True, "weight": 0.1},
        "cache": {"type": "cache", "path": str(root / "cache"), "weight": 0.1},
    }


@pytest.fixture(scope="module")
def make(tiny_tokenizers, data):
    images = image_tokenizer.load(tiny_tokenizers / "image")
    texts = text_tokenizer.load(tiny_tokenizers / "text")
    vocabulary = Vocabulary(texts.size, images.codebook_size)

    def make_loader(rank=0, world_size=1, **changes):
        shape = {"rows": 6, "seq_len": 64, "steps_per_image": 2, "max_caption_tokens": 16}
        mapping = {"sources": data, "look_ahead": 4, "max_broken_share": 0.5, **shape, **changes}
        plan = recipe.from_dict(DataPlan, mapping, "test")
        return Loader(plan, 5, images, texts, vocabulary, rank, world_size)

    return make_loader


def rows(loader):
    """What identifies each row of the next batch, but not the rounding of its latents."""
    batch = loader.batch()
    tensors = (batch.token_ids, batch.timesteps, batch.layout.document_ids)
    return [tuple(torch.stack(row).flatten().tolist()) for row in zip(*tensors, strict=True)]


def batch_of(loaders):
    """The global batch of all ranks, in the order of its rows."""
    parts = [rows(loader) for loader in loaders]
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


@pytest.fixture(scope="module")
def uninterrupted(make):
    loader = make()
    return [rows(loader) for _ in range(14)]


@pytest.mark.parametrize("seed", range(4))
def test_any_ranks_any_stops_any_workers_give_the_uninterrupted_batches(
    seed, make, uninterrupted, tmp_path
):
    chance, done, state = random.Random(seed), 0, None
    while done < len(uninterrupted):
        world_size, workers = chance.choice([1, 2, 3]), chance.choice([0, 0, 1, 2])
        loaders = [make(rank, world_size, workers=workers) for rank in range(world_size)]
        for loader in loaders:
            if state:
                loader.restore(state)
        for _ in range(chance.randint(1, 6)):
            if done < len(uninterrupted):
                assert batch_of(loaders) == uninterrupted[done]
                done += 1
        state = merge_states([loader.state() for loader in loaders])
        tree.save(state, tmp_path / "place")
        state = tree.load(tmp_path / "place")


def test_prefetched_rows_are_not_counted_as_read(make, uninterrupted):
    loader, plain = make(workers=2), make()
    assert rows(loader) == rows(plain) == uninterrupted[0]
    assert loader.state() == plain.state()


@pytest.mark.parametrize("late", [True, False])
def test_workers_go_on_after_the_signals_of_one_stop(late, make, uninterrupted, monkeypatch):
    """A scheduler signals all processes, torchrun again; the trainer has yet to finish its update.

    A second signal that comes late, of one who does not want to wait, makes them leave at once.
    """
    if late:
        monkeypatch.setattr(data_rows, "SIGNALS_TOGETHER", 0.0)
    else:
        monkeypatch.setattr(data_rows, "SIGNALS_TOGETHER", 60.0)
        monkeypatch.setattr(data_rows, "_LAST_UPDATE", 5.0)
    loader = make(workers=2)
    assert rows(loader) == uninterrupted[0]
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    if late:
        assert [rows(loader) for _ in range(5)] == uninterrupted[1:6]
    time.sleep(0.5)  # two signals that are both waiting are one
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    if not late:
        assert [rows(loader) for _ in range(5)] == uninterrupted[1:6]
    for worker in workers:
        worker.join(20)
        assert worker.exitcode == 1  # or nobody would notice, see test_train_faults.py


def test_figures_and_skipped_records_go_on_across_a_stop(make):
    whole, first, second = make(), make(), make()
    for _ in range(9):
        whole.batch()
    for _ in range(4):
        first.batch()
    second.restore(first.state())
    for _ in range(5):
        second.batch()
    assert whole.rows.broken() == second.rows.broken()
    assert whole.rows.broken()["pictures: empty caption"] > 0
    assert whole.state() == second.state()


def test_changed_data_and_lacking_rows_are_refused(make, data, tmp_path):
    state = make().state()
    (tmp_path / "other.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    changed = {**data, "lines": {**data["lines"], "path": str(tmp_path / "other.jsonl")}}
    with pytest.raises(DataError, match=r"changed since the run was saved \(lines\)"):
        make(sources=changed).restore(state)
    with pytest.raises(DataError, match=r"lacks rows \[0, 2, 4\]"):
        make(0, 2).restore(make(1, 2).state())


class Numbers(Indexed):
    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def record(self, index):
        return Text(str(index), str(index))

    def fingerprint(self):
        return ""


class Shelves(Sharded):
    def __init__(self, sizes):
        self.sizes = sizes

    def num_shards(self):
        return len(self.sizes)

    def shard(self, index):
        for i in range(self.sizes[index]):
            yield Text(f"{index}/{i}", "")

    def fingerprint(self):
        return ""


@pytest.mark.parametrize("lanes", [1, 2, 3, 8])
def test_the_shards_that_lanes_have_begun_add_up(lanes):
    source = Shelves([4] * 4)
    readers = [source.records(lane, lanes, "0", None) for lane in range(lanes)]
    places = [next(reader)[0] for reader in readers]
    for _ in range(2 * 16 // lanes):
        places = [next(reader)[0] for reader in readers]
    begun = sum(source.begun(lane, lanes, place) for lane, place in enumerate(places))
    assert 8 < begun <= 12  # two epochs of four shards, and the third has begun


def test_indexed_lanes_read_every_record_once_an_epoch():
    source, lanes = Numbers(17), 5
    readers = [source.records(lane, lanes, "0", None) for lane in range(lanes)]
    order = [next(readers[i % lanes])[1].key for i in range(3 * 17)]
    epochs = [order[e * 17 : e * 17 + 17] for e in range(3)]
    assert all(sorted(map(int, epoch)) == list(range(17)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(("sizes", "lanes"), [([4, 1, 6], 2), ([9], 4), ([3, 5], 7), ([2] * 8, 3)])
def test_sharded_lanes_read_every_record_once_an_epoch(sizes, lanes):
    """The number of a lane's shard is the first of a place, and tells its turn and the epoch."""
    source, read = Shelves(sizes), {epoch: Counter() for epoch in range(3)}
    turns = len(sizes) * -(-lanes // len(sizes))
    for lane in range(lanes):
        for (turn, _), record in source.records(lane, lanes, "0", None):
            epoch = (lane + turn * lanes) // turns
            if epoch >= 3:
                break
            read[epoch][record.key] += 1
    everything = {f"{s}/{i}": 1 for s, size in enumerate(sizes) for i in range(size)}
    assert all(epoch == everything for epoch in read.values())


def test_a_sharded_lane_goes_on_from_any_of_its_places():
    source = Shelves([3, 1, 4, 2])
    whole = [item for item, _ in zip(source.records(1, 3, "7", None), range(20), strict=False)]
    for i, (place, _) in enumerate(whole[:-1]):
        assert next(source.records(1, 3, "7", place)) == whole[i + 1]


def test_shards_without_records_are_an_error_not_an_endless_search():
    with pytest.raises(DataError, match="no records found"):
        next(Shelves([0, 0]).records(0, 1, "0", None))


def test_shuffled_is_a_permutation_that_differs_by_epoch_and_seed():
    for size in (1, 2, 3, 16, 17, 1000):
        orders = [[shuffled(i, size, s, e) for i in range(size)] for s in "ab" for e in (0, 1)]
        assert all(sorted(order) == list(range(size)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    mean_shift = sum(abs(a - i) for i, a in enumerate(orders[0])) / size
    assert mean_shift == pytest.approx(size / 3, rel=0.1)  # of a random permutation
