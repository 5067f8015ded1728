"""The latent cache and `data inspect`, as a user runs them: real processes, killed for real."""

import json
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import processes
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from mmrdpm import text_tokenizer
from mmrdpm.cli import main
from mmrdpm.data.cache import CacheWriter, bucket_sizes, fingerprint, nearest_size
from mmrdpm.data.documents import Drafter
from mmrdpm.data.loader import Loader
from mmrdpm.data.pictures import open_picture, to_square, to_tensor
from mmrdpm.data.plan import DataPlan
from mmrdpm.data.records import Broken
from mmrdpm.data.sources import SourceConfig, open_source
from mmrdpm.data.sources.cached import CachedLatents, shard_path
from mmrdpm.errors import DataError
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def images(tiny_tokenizers):
    return image_tokenizer.load(tiny_tokenizers / "image")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten wide pictures and two broken records."""
    root = tmp_path_factory.mktemp("pictures")
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (16, 28 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i:02d}.png")
        (root / f"{i:02d}.txt").write_text(f"number {i}")
    (root / "04.png").write_bytes(b"no picture")
    (root / "07.txt").unlink()
    return root


def source(folder):
    return open_source("p", SourceConfig("folder", path=str(folder)))


def write_all(writer):
    return [broken for i in writer.missing() for broken in writer.write(i)[1]]


@pytest.fixture(scope="module")
def cache(folder, images, tmp_path_factory):
    place = tmp_path_factory.mktemp("cache") / "p"
    skipped = write_all(CacheWriter(source(folder), images, place, "tiny", per_shard=5))
    assert {b.key: b.cause for b in skipped} == {
        "04.png": "not a picture that can be read",
        "07.png": "no caption",
    }
    return place


def test_a_broken_record_says_which_why_and_what_is_special():
    assert str(Broken("a.png", "no caption")) == "a.png: no caption"
    assert str(Broken("a.png", "too wide", "9x1")) == "a.png: too wide (9x1)"


@pytest.mark.filterwarnings("ignore")  # ray's own
def test_ray_makes_the_same_shards(folder, images, cache, tmp_path):
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    writer = CacheWriter(source(folder), images, tmp_path / "p", "tiny", per_shard=5)
    skipped = [broken for _, some in writer.write_by_ray(writer.missing()) for broken in some]
    ray.shutdown()
    assert sorted(b.key for b in skipped) == ["04.png", "07.png"] and not writer.missing()
    for shard in range(writer.manifest.shards):
        made, expected = (shard_path(place, shard) for place in (tmp_path / "p", cache))
        assert made.read_bytes() == expected.read_bytes()


@pytest.mark.slow  # Ray starts twice, about half a minute each
@pytest.mark.filterwarnings("ignore")  # ray's own
def test_what_ray_was_killed_in_goes_on_to_the_same_shards(images, tiny_tokenizers, tmp_path):
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    (tmp_path / "data").mkdir()
    for i in range(12):  # so large that the kill comes long before the last
        pixels = np.random.default_rng(i).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{i:02d}.png", compress_level=1)
        (tmp_path / "data" / f"{i:02d}.txt").write_text(f"number {i}")
    path = tmp_path / "r.yaml"
    sources = {"p": {"type": "folder", "path": str(tmp_path / "data")}}
    names = {"image": str(tiny_tokenizers / "image")}
    mapping = {"kind": "model", "tokenizers": names, "data": {"sources": sources}}
    path.write_text(yaml.safe_dump(mapping))
    command = [sys.executable, "-m", "mmrdpm", "data", "cache", str(path), "--ray"]
    command += ["--out", str(tmp_path / "killed"), "--per-shard", "1"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("killed/p/shard-*.safetensors")):
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    whole, killed = (
        CacheWriter(source(tmp_path / "data"), images, tmp_path / name / "p", "tiny", per_shard=1)
        for name in ("whole", "killed")
    )
    write_all(whole)
    assert 0 < len(killed.missing()) < 12
    assert not [broken for _, some in killed.write_by_ray(killed.missing()) for broken in some]
    ray.shutdown()
    for shard in range(12):
        made, expected = (shard_path(writer.folder, shard) for writer in (killed, whole))
        assert made.read_bytes() == expected.read_bytes()


class OnTheGpu:
    """A tokeniser that would be on CUDA, and a Ray that takes it along and makes one worker."""

    def __init__(self, device, cluster):
        self.asked, self.travelled, self.ray = {}, "", []
        self.data, self.cluster_resources = self, lambda: cluster
        self.to(device)

    def init(self, ignore_reinit_error):
        self.ray.append(ignore_reinit_error)

    def to(self, device):
        self.codebook = SimpleNamespace(codes=SimpleNamespace(device=torch.device(device)))

    def cpu(self):
        self.to("cpu")

    def from_items(self, items):
        self.items = items
        return self

    def ActorPoolStrategy(self, **_):
        return None

    def map(self, worker, fn_constructor_args, **asked):
        self.travelled, self.asked = self.codebook.codes.device.type, asked
        self.worker = worker(*fn_constructor_args)
        return self

    def iter_rows(self):
        return map(self.worker, self.items)


@pytest.mark.parametrize(("device", "gpus"), [("cuda", 1), ("cpu", None)])
def test_rays_workers_get_a_gpu_each_and_the_tokeniser_without_one(
    folder, images, tmp_path, monkeypatch, device, gpus
):
    writer = CacheWriter(source(folder), images, tmp_path / "p", "tiny", per_shard=5)
    writer.tokenizer = fake = OnTheGpu(device, {"CPU": 2.0} | ({"GPU": 4.0} if gpus else {}))
    for name in ("ray", "ray.data"):
        monkeypatch.setitem(sys.modules, name, fake)
    seen = []
    monkeypatch.setattr(
        writer, "write", lambda i: (seen.append((i, fake.codebook.codes.device.type)), [])
    )
    assert len(list(writer.write_by_ray([0, 2]))) == 2
    assert (fake.travelled, fake.asked["num_gpus"]) == ("cpu", gpus)
    assert seen == [(0, device), (2, device)]
    assert fake.codebook.codes.device.type == device  # back where it was
    assert fake.ray == [True]


def test_a_cluster_without_gpus_is_told_where_it_would_be_waited_for(
    folder, images, tmp_path, monkeypatch
):
    writer = CacheWriter(source(folder), images, tmp_path / "p", "tiny", per_shard=5)
    writer.tokenizer = fake = OnTheGpu("cuda", {"CPU": 2.0})
    for name in ("ray", "ray.data"):
        monkeypatch.setitem(sys.modules, name, fake)
    with pytest.raises(DataError, match="Ray's cluster has none: start its nodes with GPUs"):
        next(writer.write_by_ray([0]))
    assert fake.travelled == ""


def test_a_cache_holds_the_latents_of_the_pictures_it_was_made_of(folder, images, cache):
    cached = CachedLatents(str(cache))
    assert len(cached) == 10 and cached.manifest.shards == 3
    for record in (cached.record(i) for i in range(10)):
        square = to_square(open_picture(folder / record.key), images.image_size)
        latents = images.autoencoder.encode(to_tensor(square[None]))[0]
        assert record.image.dtype == np.float16
        torch.testing.assert_close(
            torch.from_numpy(record.image).float(), latents, atol=4e-3, rtol=4e-3
        )
        assert record.captions == (f"number {int(record.key[:2])}",)


def test_an_interrupted_cache_says_so_and_goes_on_with_the_same_bytes(
    folder, images, cache, tmp_path
):
    place = tmp_path / "again"
    writer = CacheWriter(source(folder), images, place, "tiny", per_shard=5)
    writer.write(1)
    shard_path(place, 0).with_suffix(".safetensors.partial").write_bytes(b"half")
    with pytest.raises(DataError, match="2 of 3 shards of the cache are still to be made"):
        CachedLatents(str(place))
    again = CacheWriter(source(folder), images, place, "tiny", per_shard=5)
    assert again.missing() == [0, 2]
    write_all(again)
    for i in range(3):
        ours, theirs = (load_file(shard_path(c, i)) for c in (place, cache))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def other_tokenizer(tiny_tokenizers, tmp_path):
    shutil.copytree(tiny_tokenizers / "image", tmp_path / "other")
    changed = image_tokenizer.load(tmp_path / "other")
    with torch.no_grad():
        next(changed.autoencoder.encoder.parameters()).add_(0.5)
    return changed


def test_a_cache_of_another_autoencoder_is_refused_naming_both(
    folder, images, cache, tiny_tokenizers, tmp_path
):
    texts = text_tokenizer.load(tiny_tokenizers / "text")
    changed = other_tokenizer(tiny_tokenizers, tmp_path)
    plan = DataPlan(
        sources={"c": SourceConfig("cache", path=str(cache))},
        seq_len=64,
        steps_per_image=2,
        max_caption_tokens=8,
    )
    with pytest.raises(DataError) as refusal:
        Loader(plan, 0, changed, texts, Vocabulary(texts.size, 16))
    for tokenizer in (images, changed):
        assert fingerprint(tokenizer)[:12] in str(refusal.value)
    with pytest.raises(DataError, match="name another folder"):
        CacheWriter(source(folder), changed, cache, "other", per_shard=5)
    before = fingerprint(changed)
    changed.codebook.codes.add_(1)
    assert fingerprint(changed) == before  # the codebook has no part in it


def test_training_from_a_cache_makes_fresh_codes_of_the_same_latents(
    images, cache, tiny_tokenizers
):
    texts = text_tokenizer.load(tiny_tokenizers / "text")
    plan = DataPlan(
        sources={"c": SourceConfig("cache", path=str(cache))},
        rows=2,
        seq_len=64,
        steps_per_image=3,
        max_caption_tokens=8,
        caption_share=0.0,
    )
    loader = Loader(plan, 0, images, texts, Vocabulary(texts.size, images.codebook_size))
    starts = set()
    for _ in range(8):
        batch = loader.batch()
        starts |= {batch.latents[r][batch.timesteps[r] == 3].numpy().tobytes() for r in range(2)}
    assert len(starts) == 16  # ten pictures, drawn again from other noise


def test_buckets_keep_aspect_ratios(folder, images, tiny_tokenizers, tmp_path):
    assert bucket_sizes(32, 8) == [(24, 40), (32, 32), (40, 24)]
    assert nearest_size((300, 200), [(24, 40), (32, 32), (40, 24)]) == (40, 24)
    assert nearest_size((90, 100), [(24, 40), (32, 32), (40, 24)]) == (32, 32)
    wide = image_tokenizer.ImageTokenizer(images.config)
    wide.load_state_dict(images.state_dict())
    writer = CacheWriter(source(folder), wide, tmp_path / "b", "tiny", buckets=True)
    writer.sizes = [(16, 16), (32, 16), (16, 32)]  # the tiny grid of 2x2 has no oblong bucket
    write_all(writer)
    cached = CachedLatents(str(tmp_path / "b"))
    assert {cached.record(i).image.shape for i in range(10)} == {(2, 4, 4)}
    texts = text_tokenizer.load(tiny_tokenizers / "text")
    plan = DataPlan(
        sources={"c": SourceConfig("cache", path=str(tmp_path / "b"))},
        rows=2,
        seq_len=64,
        steps_per_image=2,
        max_caption_tokens=8,
    )
    loader = Loader(plan, 0, images, texts, Vocabulary(texts.size, images.codebook_size))
    batch = loader.batch()
    assert batch.positions[..., 2].max() == 3 and batch.positions[..., 1].max() == 1
    assert isinstance(loader.stream.drafter, Drafter)


@pytest.fixture(scope="module")
def cache_recipe(folder, tiny_tokenizers, tmp_path_factory):
    mapping = {
        "kind": "model",
        "tokenizers": {t: str(tiny_tokenizers / t) for t in ("image", "text")},
        "data": {
            "sources": {"p": {"type": "folder", "path": str(folder)}},
            "max_broken_share": 0.5,
        },
    }
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    path.write_text(yaml.safe_dump(mapping))
    return path


def test_two_ranks_killed_and_started_again_make_one_cache(cache_recipe, cache, tmp_path):
    command = ["-m", "mmrdpm", "data", "cache", cache_recipe, "--out", tmp_path, "--per-shard", "1"]

    def start(rank):
        return processes.start(*command, env={"RANK": str(rank), "WORLD_SIZE": "2"})

    first = start(0)
    end = time.monotonic() + 60
    while not list(tmp_path.glob("p/shard-*.safetensors")) and first.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    for process in [start(0), start(1)]:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, f"{tmp_path / 'p'}\n"), err
    made, expected = CachedLatents(str(tmp_path / "p")), CachedLatents(str(cache))
    assert len(made) == len(expected) == 10
    assert [made.record(i).key for i in range(10)] == [expected.record(i).key for i in range(10)]


def test_a_cache_of_mostly_broken_or_of_other_records_is_an_error(
    cache_recipe, images, tmp_path, capsys
):
    command = ["data", "cache", str(cache_recipe), "--out", str(tmp_path)]
    assert main([*command, "data.max_broken_share=0.1"]) == 1
    capsys.readouterr()
    assert main([*command, "data.max_broken_share=0.1"]) == 1  # again, with nothing left to make
    said = capsys.readouterr().err
    assert "1 of 12 left out: no caption" in said and "2 of 12 of its records are broken" in said
    (tmp_path / "t.jsonl").write_text('{"text": "no picture"}\n')
    source = open_source("t", SourceConfig("text", path=str(tmp_path / "t.jsonl")))
    with pytest.raises(DataError, match="is no image-text pair"):
        write_all(CacheWriter(source, images, tmp_path / "c", "tiny"))


def test_inspect_prints_samples_and_problems_and_draws_a_sheet(folder, tmp_path, capsys):
    assert main(["data", "inspect", str(folder), "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "source: folder, 12 records"
    assert any("02.png  30x16  8 characters: number 2" in line for line in lines)
    assert "  pictures: 10, width 28 to 39 (median 33.5), height 16 to 16 (median 16)" in lines
    assert "  problem: 1 not a picture that can be read" in lines
    with Image.open(tmp_path / "source.png") as sheet:
        assert sheet.size == (8 * 100 + 4, 2 * 136 + 4)
        frames = [sheet.getpixel((4 + x * 100, 4 + y * 136)) for y in range(2) for x in range(8)]
    faulty = ["PROBLEM" in line for line in lines[1:13]]
    assert sum(faulty) == 2 and [color == (255, 0, 0) for color in frames[:12]] == faulty


def test_inspect_of_a_recipe_shows_each_source(cache_recipe, capsys):
    assert main(["data", "inspect", str(cache_recipe), "--n", "3"]) == 0
    assert capsys.readouterr().out.startswith("p: folder, 12 records\n")
    assert main(["data", "inspect", str(cache_recipe), "data.sources.p.weight=0.5"]) == 1
    assert "add up to 0.5, not to 1" in capsys.readouterr().err
    assert main(["data", "inspect", "/no/such/folder/at/all"]) == 1
    assert "no such file or folder" in capsys.readouterr().err
    assert main(["data", "inspect", "s-0.tar", "s-1.tar"]) == 1
    assert "put braces and stars in quotes" in capsys.readouterr().err


def test_inspect_of_an_image_tokenisers_recipe_wants_no_captions(image_recipe_file, capsys):
    assert main(["data", "inspect", str(image_recipe_file)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("p: folder, 9 records\n") and "  problems: none\n" in said
    assert "  pictures: 9, width 30 to 30" in said
    assert main(["data", "inspect", str(image_recipe_file), "data={}", "--n", "2"]) == 0
    assert capsys.readouterr().out.startswith("emoji: emoji, ")


def test_a_damaged_manifest_is_one_clear_error(cache, tmp_path):
    shutil.copytree(cache, tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_text(json.dumps({"shards": 3}))
    with pytest.raises(DataError, match=r"manifest\.json: damaged: .*autoencoder is missing"):
        CachedLatents(str(tmp_path / "c"))
    shutil.copy(cache / "manifest.json", tmp_path / "c" / "manifest.json")
    shard_path(tmp_path / "c", 1).write_bytes(b"short")
    with pytest.raises(DataError, match="damaged"):
        CachedLatents(str(tmp_path / "c"))
