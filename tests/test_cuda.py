"""The same on a GPU as on a CPU, but for rounding: training, compiled or not, and drawing."""

import json

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


def test_pictures_and_captions_are_those_of_a_cpu(tiny_run):
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
        ["doctor", str(tiny_recipe)],
        ["plan", str(tiny_recipe), "--kind", "h100"],
    ):
        assert main(asked) == 0
    assert torch.cuda.get_device_name() in capsys.readouterr().out
