"""Things by their id on the Hugging Face hub, over HTTP from a small one on this machine."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
import yaml
from local_hub import Hub, commit
from PIL import Image
from test_pretrained import make_model, rows_of

import mmrdpm
from mmrdpm import hub, text_tokenizer
from mmrdpm.errors import CheckpointError
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.rdpm.published import PublishedConfig, fetch

USER = """
import pathlib, sys
from mmrdpm.cli import main
input()
recipe, run = sys.argv[1], pathlib.Path(sys.argv[2])
train = ["train", recipe, "--run", str(run)]
assert main(train) == 0
(run / "step-0000006.safetensors").rename(run / "whole")
(run / "first.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
assert main([*train, "--resume"]) == 0
print("closed?", flush=True)
input()
print("closed", file=sys.stderr)
sys.exit(main(["plan", recipe, "tokenizers.text=who/else"]))
"""


@pytest.fixture
def local(tmp_path):
    """A hub without anything."""
    opened = Hub(tmp_path / "hub")
    yield opened
    opened.close()


@contextmanager
def user_of(there, *arguments, program=("-c", USER)):
    """A process that asks it, from a fresh home."""
    home = {"HF_ENDPOINT": there.url, "HF_HOME": str(there.root / "home")}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, *program, *map(str, arguments)]
    ours = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    with subprocess.Popen(command, env={**ours, **home}, text=True, **pipes) as process:
        yield process


def publish_texts(folder, word="wanted"):
    """A data set of two subsets, as the hub keeps them; `word` begins each text of the first."""
    from pyarrow import parquet, table

    for subset in ("wanted", "other"):
        (folder / subset).mkdir(parents=True)
        for shard in range(3):
            first = word if subset == "wanted" else subset
            texts = [f"{first} {i} " + "red heart " * (i % 7) for i in range(shard, 90, 3)]
            parquet.write_table(table({"text": texts}), folder / subset / f"{shard}.parquet")
    configs = [{"config_name": s, "data_files": f"{s}/*"} for s in ("other", "wanted")]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")


OPENER = """
import sys
from mmrdpm.data.records import first_epoch
from mmrdpm.data.sources import SourceConfig, open_source
from mmrdpm.errors import MmrdpmError
for streaming in (False, True):
    for revision in sys.argv[1:]:
        config = SourceConfig("huggingface", path="who/texts", subset="wanted",
                              streaming=streaming, revision=revision)
        try:
            source = open_source("it", config)
            texts = sorted(record.text for _, record in first_epoch(source, "0", 9))
            print(source.fingerprint(), texts[0], sep="|")
        except MmrdpmError as error:
            print(error)
"""


PICTURES = """
source = open_source("it", SourceConfig("huggingface", path="who/pictures", streaming=True))
print(sorted((record.captions, record.image) for record in source.shard(0)))
"""


def write_recipe(path):
    """What the recipe of a test lacks to name things on the hub."""
    mapping = yaml.safe_load(path.read_text())
    source = {"type": "huggingface", "path": "who/texts", "subset": "wanted", "streaming": True}
    mapping["data"] |= {"sources": {"pages": source}, "workers": 1, "max_caption_tokens": 32}
    mapping["tokenizers"]["text"] = "who/qwen"
    mapping["train"] |= {"steps": 6, "lr": 1e-9, "precision": "fp32"}
    mapping["samples"]["prompts"] = []
    path.write_text(yaml.safe_dump(mapping))


def losses(path):
    return [(r["step"], r["loss/text"]) for r in map(json.loads, path.read_text().splitlines())]


def test_a_run_from_the_hub_keeps_its_text_and_goes_on_where_it_was(local, recipe_from, tmp_path):
    run = tmp_path / "run"
    with user_of(local, tmp_path / "from.yaml", run) as process:
        theirs = make_model(tmp_path / "hub/models/who/qwen", shard="20KB")
        publish_texts(tmp_path / "hub/datasets/who/texts")
        write_recipe(recipe_from("who/qwen"))
        process.stdin.write("\n")
        process.stdin.flush()
        while process.stdout.readline() not in ("closed?\n", ""):
            pass
        local.close()
        _, told = process.communicate("\n", timeout=120)
    done, _, gone = told.partition("closed\n")
    assert f"weights of who/qwen; {run}" in " ".join(done.split()) and "Traceback" not in told
    assert process.returncode == 1 and len(gone.splitlines()) == 1
    assert f"who/else: no such folder here, and the hub {local.url} gave none" in gone
    assert "Connection refused" in gone and "hf auth login" in gone
    assert (run / "step-0000006.safetensors").read_bytes() == (run / "whole").read_bytes()
    read = losses(run / "metrics.jsonl")
    assert len(set(read)) == 6 and read == losses(run / "first.jsonl")
    assert any("wanted/2.parquet" in path for path in local.asked)
    assert not any(re.search(r"other/.*\.parquet", path) for path in local.asked)
    model = mmrdpm.load(run)
    ids = torch.arange(40)
    with torch.no_grad():
        hidden = model.transformer(rows_of(ids.tolist(), model.vocabulary))[0]
        found = model.transformer.logits(hidden, slice(model.texts.size))
        expected = theirs(ids[None]).logits[0, :, : model.texts.size]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_of_a_published_autoencoder_no_halves_and_no_pickles_are_fetched(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda *what: asked.append(what) or tmp_path)
    config = PublishedConfig("who/pipeline", "vae")
    with pytest.raises(CheckpointError, match=r"vae: holds no config\.json"):
        fetch(config)
    ((name, files),) = asked
    assert name == "who/pipeline" and "vae/diffusion_pytorch_model.safetensors" in files
    for unwanted in ("fp16.safetensors", "bin"):
        unwanted = f"vae/diffusion_pytorch_model.{unwanted}"
        assert not any(fnmatch(unwanted, pattern) for pattern in files)


def test_a_codebook_is_fitted_on_an_autoencoder_from_the_hub(local, published, tmp_path):
    vae = tmp_path / "hub/models/who/pipeline/vae"
    shutil.copytree(published / "AutoencoderKL", vae)
    for unwanted in ("bin", "fp16.safetensors"):
        (vae / f"diffusion_pytorch_model.{unwanted}").write_bytes(b"not to be touched")
    (tmp_path / "data").mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"data/{i}.png")
    autoencoder = {"diffusers": "who/pipeline", "subfolder": "vae", "image_size": 32}
    mapping = {
        "kind": "image",
        "tokenizer": {"autoencoder": autoencoder, "num_timesteps": 3, "codebook_size": 16},
        "data": {"sources": {"pictures": {"type": "folder", "path": str(tmp_path / "data")}}},
        "train": {"batch_size": 4, "codebook_batch": 8, "threads": 1, "steps": 4,
                  "decoder_share": 0.0, "statistics_images": 16},
    }  # fmt: skip
    (tmp_path / "codes.yaml").write_text(yaml.safe_dump(mapping))
    program = ("-m", "mmrdpm", "tokenizer", "train")
    with user_of(local, tmp_path / "codes.yaml", "--run", tmp_path / "run", program=program) as p:
        _, told = p.communicate(timeout=120)
    assert p.returncode == 0, told
    fetched = [path for path in local.asked if "/resolve/" in path]
    assert any(path.endswith("vae/diffusion_pytorch_model.safetensors") for path in fetched)
    assert not [path for path in fetched if path.endswith((".bin", "fp16.safetensors"))]
    local.close()
    shutil.rmtree(tmp_path / "hub")
    made = image_tokenizer.load(tmp_path / "run")  # holds all that it needs
    assert made.config.autoencoder.diffusers == "who/pipeline"
    assert made.config.autoencoder.sha256 and made.grid == (16, 16)


def test_a_repository_without_what_is_asked_for_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(CheckpointError, match=r"who/weights: .* gave any of tokenizer\.json, t"):
        hub.resolve("tokenizers", "who/weights", text_tokenizer.FILES)


def test_waiting_is_told_once_an_outage(caplog):
    hub.quieten()
    library = logging.getLogger("datasets.utils.file_utils")
    for number in range(1, 4):
        library.warning(f"Got disconnected. Retrying in 7sec [{number}/20]")
    library.warning("Got disconnected. Retrying in 7sec [1/20]")
    again = "Got disconnected. Retrying in 7sec [1/20]"
    assert [r.getMessage() for r in caplog.records] == [again, again]


def test_a_look_at_a_data_set_of_the_hub_fetches_no_more_than_it_shows(local, tmp_path):
    publish_texts(tmp_path / "hub/datasets/who/texts")
    program = ("-m", "mmrdpm", "data", "inspect")
    with user_of(local, "who/texts", "subset=wanted", "--n", "4", program=program) as process:
        said, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert "texts: 4, " in said and "problems: none" in said
    fetched = {path for path in local.asked if path.endswith(".parquet")}
    assert len(fetched) == 1, fetched


def publish_pictures(folder):
    """Image files and a file of their captions."""
    folder.mkdir(parents=True)
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"number {i}"}) for i in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    for i in range(3):
        Image.new("RGB", (9, 9), (i, 0, 0)).save(folder / f"{i}.png")
    return [((f"number {i}",), (folder / f"{i}.png").read_bytes()) for i in range(3)]


def test_a_revision_is_read_and_belongs_to_the_place_in_the_data(local, tmp_path):
    """And pictures that are files of their own come through a stream as they are stored."""
    pictures = publish_pictures(tmp_path / "hub/datasets/who/pictures")
    newest, old = (tmp_path / f"hub/datasets/who/texts{tag}" for tag in ("", "@old"))
    publish_texts(newest)
    publish_texts(old, word="old")
    revisions = ["", "old", commit(old)]
    with user_of(local, *revisions, "f" * 40, program=("-c", OPENER + PICTURES)) as process:
        said, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    *lines, last = said.splitlines()
    assert last == str(pictures)
    for way, size in ((lines[:4], "90 rows"), (lines[4:], "3 shards")):
        now, tagged, exact, gone = way
        assert now.split("|")[0] == f"who/texts, {size}" and "|wanted " in now
        assert tagged.split("|")[0] == f"who/texts at {commit(old)}, {size}" and "|old " in tagged
        assert tagged == exact
        assert gone.startswith("who/texts: the hub did not give revision fff")


def test_of_texts_without_the_hub_no_revision_is_taken_for_another(local, tmp_path):
    """The library takes what its cache was given last, whichever revision is asked for."""
    newest, old = (tmp_path / f"hub/datasets/who/texts{tag}" for tag in ("", "@old"))
    publish_texts(newest)
    publish_texts(old, word="old")
    with user_of(local, "old", "", program=("-c", OPENER)) as process:
        said, told = process.communicate(timeout=120)
    assert process.returncode == 0 and said.count("|") == 4, said + told
    local.close()
    at_once = "import time\ntime.sleep = lambda _: None\n"  # or the hub is waited for
    revisions = "old", commit(newest), commit(old)
    with user_of(local, *revisions, program=("-c", at_once + OPENER)) as process:
        said, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    for tagged, exact, other in (said.splitlines()[:3], said.splitlines()[3:]):
        refused = "who/texts: the hub did not give revision {}, and the cache holds {}: see to"
        assert tagged.startswith(refused.format("old", commit(newest)))
        assert exact.startswith(f"who/texts at {commit(newest)}, ") and "|wanted " in exact
        assert other.startswith(refused.format(commit(old), commit(newest)))


def test_a_cache_of_latents_fetches_no_more_of_texts_than_it_takes_to_tell(
    local, tiny_tokenizers, tmp_path
):
    publish_texts(tmp_path / "hub/datasets/who/texts")
    source = {"type": "huggingface", "path": "who/texts", "subset": "wanted"}
    names = {kind: str(tiny_tokenizers / kind) for kind in ("image", "text")}
    mapping = {"kind": "model", "tokenizers": names, "data": {"sources": {"pages": source}}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(mapping))
    program = ("-m", "mmrdpm", "data", "cache")
    with user_of(local, tmp_path / "r.yaml", "--out", tmp_path / "out", program=program) as process:
        _, told = process.communicate(timeout=120)
    assert process.returncode == 1 and "none of its data.sources holds" in told, told
    assert "pages: left out, it holds no image-text pairs to encode\n" in told
    fetched = {path for path in local.asked if path.endswith(".parquet")}
    assert len(fetched) == 1, fetched
