"""What is empty, endless or moves: nothing at all, captions of 100 kB, pictures of many frames."""

import io
import json
import tarfile

import pytest
from PIL import Image

from mmrdpm import recipe, text_tokenizer
from mmrdpm.cli import main
from mmrdpm.data.cache import CacheWriter
from mmrdpm.data.loader import Loader
from mmrdpm.data.pictures import open_picture
from mmrdpm.data.plan import DataPlan
from mmrdpm.data.sources import SourceConfig, open_source
from mmrdpm.errors import DataError
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.train_model import train
from mmrdpm.vocabulary import Vocabulary

LONG = {"words": "red heart " * 10_000, "no blank": "ab" * 50_000, "wide": "\u00e9\u4e2d" * 50_000}


def png():
    stream = io.BytesIO()
    Image.new("RGB", (12, 8)).save(stream, "PNG")
    return stream.getvalue()


def opened(kind, path, **keys):
    return open_source("it", SourceConfig(kind, path=str(path), **keys))


KINDS = ["folder", "text", "interleaved", "webdataset", "huggingface", "cache"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_folder_is_one_clear_line(kind, tmp_path, capsys):
    (tmp_path / "e").mkdir()
    assert main(["data", "inspect", str(tmp_path / "e")]) == 1
    assert capsys.readouterr().err == (
        f"mmrdpm: error: {tmp_path / 'e'}: the folder is empty: correct the path\n"
    )
    path = tmp_path / "r.yaml"
    source = f"{{type: {kind}, path: {tmp_path / 'e'}}}"
    path.write_text(f"kind: model\ndata: {{sources: {{s: {source}}}}}\n")
    assert main(["data", "inspect", str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mmrdpm: error: {tmp_path / 'e'}: ")
    assert any(mend in line for mend in ("correct the path", "check subset", "name the folder of"))


@pytest.fixture(scope="module")
def tokenizers(tiny_tokenizers):
    return (
        image_tokenizer.load(tiny_tokenizers / "image"),
        text_tokenizer.load(tiny_tokenizers / "text"),
    )


def test_a_cache_of_no_records_is_told_when_it_is_read(tokenizers, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "a.txt").write_text("a")
    writer = CacheWriter(opened("folder", tmp_path), tokenizers[0], tmp_path / "c", "tiny")
    assert writer.write(0)[0] == 0 and writer.totals()[0] == 1
    with pytest.raises(DataError, match=r"c: the cache holds no records"):
        opened("cache", tmp_path / "c")


@pytest.mark.parametrize("kind", ["folder", "webdataset"])
@pytest.mark.parametrize("text", LONG)
def test_a_caption_of_100_kb_is_cut_and_learned(kind, text, tokenizers, tmp_path):
    content = {"a.png": png(), "a.txt": LONG[text].encode()}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name in content:
            archive.add(tmp_path / name, name)
    path = tmp_path / "s.tar" if kind == "webdataset" else tmp_path
    mapping = {
        "sources": {"s": {"type": kind, "path": str(path)}},
        **{"rows": 2, "seq_len": 64, "steps_per_image": 2, "max_caption_tokens": 16},
        **{"image_share": 0.0, "caption_share": 1.0},
    }
    images, texts = tokenizers
    vocabulary = Vocabulary(texts.size, images.codebook_size)
    loader = Loader(recipe.from_dict(DataPlan, mapping, "test"), 0, images, texts, vocabulary)
    batch = loader.batch()
    assert not loader.rows.broken()
    ids = batch.token_ids[0].tolist()
    caption = [i for i in ids[: ids.index(vocabulary.image_end) + 17] if i < texts.size][-16:]
    assert texts.decode(caption)[:5] == LONG[text][:5] and vocabulary.eos not in ids


def test_captions_of_100_kb_are_trained_on(tiny_recipe, tmp_path):
    (tmp_path / "data").mkdir()
    for i, text in enumerate(LONG.values()):
        (tmp_path / "data" / f"{i}.png").write_bytes(png())
        (tmp_path / "data" / f"{i}.txt").write_text(text)
    sources = f"{{s: {{type: folder, path: {tmp_path / 'data'}}}}}"
    short = ["train.steps=2", "train.warmup=1", "samples.prompts=[]", "data.max_caption_tokens=32"]
    overrides = [f"data.sources={sources}", *short, "checkpoint.log_every=1"]
    assert train(recipe.load(ModelRecipe, tiny_recipe, overrides), tmp_path / "run")
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in metrics]
    assert len(logged) == 2 and not any(line["data/skipped"] for line in logged)


@pytest.mark.parametrize(("kind", "suffix"), [("WEBP", "webp"), ("PNG", "png"), ("GIF", "gif")])
def test_of_a_picture_that_moves_the_first_frame_is_taken(kind, suffix, tmp_path):
    red, *others = (Image.new("RGB", (12, 8), colour) for colour in ("red", "blue", "lime"))
    path = tmp_path / f"a.{suffix}"
    how = {"lossless": True} if kind == "WEBP" else {}
    red.save(path, kind, save_all=True, append_images=others, duration=50, **how)
    with Image.open(path) as written:
        assert written.n_frames == 3
    (tmp_path / "a.txt").write_text("a")
    (record,) = [opened("folder", tmp_path).record(0)]
    picture = open_picture(record.image)
    assert picture.size == (12, 8) and picture.getcolors() == [(96, (255, 0, 0))]
