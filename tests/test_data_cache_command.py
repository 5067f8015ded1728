"""`data cache` as a command: which sources of a recipe it takes, and the buckets that it writes."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmrdpm import recipe
from mmrdpm.cli import main
from mmrdpm.data.cache import CacheWriter, bucket_sizes
from mmrdpm.data.sources import SourceConfig, open_source
from mmrdpm.data.sources.cached import CachedLatents
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.rdpm.autoencoder import AutoencoderConfig
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from mmrdpm.train_model import train


def pictures(folder, *sizes):
    """Captioned pictures, the caption of each its size."""
    folder.mkdir()
    for width, height in sizes:
        name = f"{width}x{height}"
        Image.new("RGB", (width, height), "red").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    return {"type": "folder", "path": str(folder)}


def write_recipe(path, image, text, sources):
    names = json.dumps({"image": str(image), "text": str(text)})
    for source in sources.values():
        source["weight"] = 1 / len(sources)
    path.write_text(f"kind: model\ntokenizers: {names}\ndata: {{sources: {json.dumps(sources)}}}\n")
    return path


def write_parquet(path, rows):
    from pyarrow import parquet, table

    parquet.write_table(table(rows), path)
    return {"type": "huggingface", "path": str(path)}


def png():
    stream = io.BytesIO()
    Image.new("RGB", (12, 8)).save(stream, "PNG")
    return stream.getvalue()


def test_sources_of_texts_are_left_out_whatever_their_type(tiny_tokenizers, tmp_path, capsys):
    pytest.importorskip("datasets")
    (tmp_path / "lines.jsonl").write_text('{"text": "one"}\n')
    pages = write_parquet(tmp_path / "pages.parquet", {"text": ["one", "two"]})
    sources = {
        "photos": pictures(tmp_path / "photos", (20, 10)),
        "pages": pages,
        "streamed": {**pages, "streaming": True},
        "lines": {"type": "text", "path": str(tmp_path / "lines.jsonl")},
        "table": write_parquet(tmp_path / "t.parquet", {"image": [png()], "caption": ["a"]}),
    }
    path = write_recipe(
        tmp_path / "r.yaml", tiny_tokenizers / "image", tiny_tokenizers / "text", sources
    )
    out = tmp_path / "out"
    assert main(["data", "cache", str(path), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{out / 'photos'}\n{out / 'table'}\n"
    for name in ("pages", "streamed", "lines"):
        assert f"{name}: left out, it holds no image-text pairs to encode\n" in said.err
    assert sorted(p.name for p in out.iterdir()) == ["photos", "table"]
    assert CachedLatents(str(out / "table")).record(0).captions == ("a",)
    del sources["photos"], sources["table"]
    write_recipe(path, tiny_tokenizers / "image", tiny_tokenizers / "text", sources)
    assert main(["data", "cache", str(path), "--out", str(tmp_path / "none")]) == 1
    assert "none of its data.sources holds image-text pairs" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_command_writes_oblong_buckets(tiny_tokenizers, tmp_path):
    torch.manual_seed(0)
    shape = AutoencoderConfig(image_size=32, latent_channels=4, widths=(8, 16), blocks=1)
    made = ImageTokenizer(ImageTokenizerConfig(shape, num_timesteps=3, codebook_size=16))
    made.codebook.codes.normal_()
    made.save(tmp_path / "image")
    assert bucket_sizes(32, shape.factor) == [(24, 40), (32, 32), (40, 24)]
    sizes = (90, 50), (50, 90), (64, 60)
    sources = {"p": pictures(tmp_path / "photos", *sizes)}
    path = write_recipe(tmp_path / "r.yaml", tmp_path / "image", tiny_tokenizers / "text", sources)
    command = ["data", "cache", str(path), "--out", str(tmp_path / "out"), "--buckets"]
    assert main(command) == 0
    cached = CachedLatents(str(tmp_path / "out" / "p"))
    found = {r.captions[0]: r.image.shape for r in (cached.record(i) for i in range(3))}
    assert found == {"90x50": (3, 5, 4), "50x90": (5, 3, 4), "64x60": (4, 4, 4)}


def test_a_model_trains_on_buckets_of_several_shapes(tiny_tokenizers, tiny_recipe, tmp_path):
    (tmp_path / "p").mkdir()
    for i, (width, height) in enumerate([(32, 16), (16, 32), (16, 16)] * 4):
        pixels = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"p/{i:02d}.png")
        (tmp_path / f"p/{i:02d}.txt").write_text(f"number {i}")
    images = image_tokenizer.load(tiny_tokenizers / "image")
    source = open_source("p", SourceConfig("folder", path=str(tmp_path / "p")))
    writer = CacheWriter(source, images, tmp_path / "c", "tiny", buckets=True)
    writer.sizes = [(16, 16), (32, 16), (16, 32)]
    assert not [broken for i in writer.missing() for broken in writer.write(i)[1]]
    cached = CachedLatents(str(tmp_path / "c"))
    assert {cached.record(i).image.shape[:2] for i in range(12)} == {(2, 2), (2, 4), (4, 2)}
    more = [
        f"data.sources={{c: {{type: cache, path: {tmp_path / 'c'}}}}}",
        *("data.max_caption_tokens=16", "train.steps=4", "samples.prompts=[]"),
        "checkpoint.log_every=1",
    ]
    assert train(recipe.load(ModelRecipe, tiny_recipe, more), tmp_path / "run")
    logged = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    found = [(r["loss/image"], r["skipped_updates"]) for r in logged]
    assert len(found) == 4 and all(np.isfinite(loss) and not bad for loss, bad in found)
