"""The same on a GPU as on a CPU, but for rounding: training, compiled or not, and drawing."""

import json
import signal
import subprocess
import sys

import pytest
import torch

from mmrdpm import api, machine, recipe
from mmrdpm.attention import backend
from mmrdpm.cli import main
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.train_model import Trainer, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")

FLEX = ("train.attention=flex", "model.width=64", "model.heads=4", "model.kv_heads=2")

# One GPU is one rank, which is not sharded: here it is, over NCCL, as one of many would be.
SHARDED = """
import sys
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch.distributed.tensor import DTensor

from mmrdpm import distributed, recipe, train_model
from mmrdpm.engine import parallel
from mmrdpm.model_recipe import ModelRecipe


@contextmanager
def joined(timeout):
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


distributed.joined, parallel.resolve = joined, lambda *_: "fsdp"
distributed.is_sharded = lambda thing: isinstance(thing, DTensor)
loaded, run = recipe.load(ModelRecipe, sys.argv[1], sys.argv[3:]), Path(sys.argv[2])
sys.exit(not train_model.train(loaded, run, resume=(run / "recipe.yaml").exists()))
"""


@pytest.fixture
def on(monkeypatch):
    """Says which device counts as this machine's, and that convolutions are exact."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return lambda device: monkeypatch.setattr(machine, "device", lambda: device)


def losses(path, run, *overrides):
    """Of every update, text and image."""
    loaded = recipe.load(ModelRecipe, path, overrides)
    assert train(loaded, run)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return torch.tensor([(line["loss/text"], line["loss/image"]) for line in lines])


@pytest.mark.parametrize("compiled", ["true", "false"])
@pytest.mark.parametrize("name", backend.BACKENDS)
def test_training_follows_that_on_a_cpu(name, compiled, on, tiny_recipe, tmp_path):
    if why := backend.why_not(name, CUDA):
        pytest.skip(why)
    more = (
        "train.precision=fp32",
        "checkpoint.log_every=1",
        "model.width=64",
        "model.heads=4",
        "model.kv_heads=2",
    )
    on(CPU)
    expected = losses(tiny_recipe, tmp_path / "cpu", *more)
    on(CUDA)
    there = f"train.attention={name}", f"train.compile={compiled}"
    found = losses(tiny_recipe, tmp_path / "cuda", *more, *there)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_bfloat16_stays_near(on, tiny_recipe, tmp_path):
    on(CUDA)
    exact, rounded = (
        losses(tiny_recipe, tmp_path / p, f"train.precision={p}") for p in ("fp32", "bf16")
    )
    torch.testing.assert_close(rounded, exact, rtol=2e-2, atol=2e-2)
    assert not torch.equal(rounded, exact)


def test_a_run_goes_on(interrupted, tiny_recipe, tmp_path):
    loaded = recipe.load(ModelRecipe, tiny_recipe, ["train.precision=fp32"])
    with interrupted(Trainer, 6):
        assert not train(loaded, tmp_path / "parts")
    assert train(loaded, tmp_path / "parts", resume=True)
    assert train(loaded, tmp_path / "whole")
    parts, whole = (api.load(tmp_path / n).transformer.state_dict() for n in ("parts", "whole"))
    assert parts.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("compiled", ["true", "false"])
def test_a_sharded_run_killed_goes_on(compiled, shared_recipe, tmp_path):
    more = "model.width=64", "model.heads=4", "model.kv_heads=2", "checkpoint.every=4"
    expected = losses(shared_recipe, tmp_path / "whole", *more)
    run, wanted = tmp_path / "sharded", [*more, f"train.compile={compiled}"]
    program = [sys.executable, "-c", SHARDED, str(shared_recipe), str(run), *wanted]
    first = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in first.stdout:
        if line.startswith("step 11 "):  # what was begun at 8 is on the disk, 12 may be half-way
            break
    first.kill()
    assert first.wait() == -signal.SIGKILL
    kept = {path.name for path in (run / "resume").iterdir()}
    assert kept & {"step-0000004", "step-0000008"} and not any(n.endswith("tensors") for n in kept)
    assert all((run / "resume" / name / "shards").is_dir() for name in kept)
    again = subprocess.run(program, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: (line["loss/text"], line["loss/image"]) for line in lines}
    found = torch.tensor([by_step[step] for step in range(1, 21)])
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_pictures_and_captions_are_those_of_a_cpu(on, tiny_run):
    on(CUDA)
    model = api.load(tiny_run)
    assert model.transformer.table.weight.is_cuda
    cpu = api.load(tiny_run).to("cpu")
    names = ["red heart", "snowman", "pizza"]
    pictures, there = model.generate(names, seed=3), cpu.generate(names, seed=3)
    alike = [
        sum(a == b for a, b in zip(x.tobytes(), y.tobytes(), strict=True)) / len(x.tobytes())
        for x, y in zip(pictures, there, strict=True)
    ]
    assert min(alike) > 0.9
    assert model.caption(there) == cpu.caption(there)


def test_benches_and_plans_run(tiny_recipe, tiny_run, tmp_path, capsys):
    for asked in (
        ["bench", "train", str(tiny_recipe), "--rounds", "1"],
        ["bench", "train", str(tiny_recipe), "--rounds", "1", *FLEX],
        ["doctor", str(tiny_recipe)],
        ["plan", str(tiny_recipe), "--kind", "h100"],
    ):
        assert main(asked) == 0
    assert torch.cuda.get_device_name() in capsys.readouterr().out
