"""Things by their id on the Hugging Face hub, over HTTP from a small one on this machine."""

import json
import logging
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from fnmatch import fnmatch

import pytest
import torch
import yaml
from local_hub import Hub
from test_pretrained import make_model, rows_of

import mmrdpm
from mmrdpm import hub, text_tokenizer
from mmrdpm.errors import CheckpointError
from mmrdpm.rdpm import published

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
def user_of(there, *arguments):
    """A process that asks it, from a fresh home."""
    home = {"HF_ENDPOINT": there.url, "HF_HOME": str(there.root / "home")}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-c", USER, *map(str, arguments)]
    ours = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    with subprocess.Popen(command, env={**ours, **home}, text=True, **pipes) as process:
        yield process


def publish_texts(folder):
    """A data set of two subsets, as the hub keeps them."""
    from pyarrow import parquet, table

    for subset in ("wanted", "other"):
        (folder / subset).mkdir(parents=True)
        for shard in range(3):
            texts = [f"{subset} {i} " + "red heart " * (i % 7) for i in range(shard, 90, 3)]
            parquet.write_table(table({"text": texts}), folder / subset / f"{shard}.parquet")
    configs = [{"config_name": s, "data_files": f"{s}/*"} for s in ("other", "wanted")]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")


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
        _, told = process.communicate("\n", timeout=60)
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
    config = published.PublishedConfig("who/pipeline", "vae")
    with pytest.raises(CheckpointError, match=r"vae: holds no config\.json"):
        published.fetch(config)
    ((name, files),) = asked
    assert name == "who/pipeline" and "vae/diffusion_pytorch_model.safetensors" in files
    for unwanted in ("fp16.safetensors", "bin"):
        unwanted = f"vae/diffusion_pytorch_model.{unwanted}"
        assert not any(fnmatch(unwanted, pattern) for pattern in files)


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
