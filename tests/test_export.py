"""A model to ship: what it holds, what may differ, and what is refused."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmrdpm
from mmrdpm import weights
from mmrdpm.cli import main
from mmrdpm.errors import CheckpointError
from mmrdpm.export import export


def test_an_export_is_the_same_model_in_float16_without_the_state_of_training(
    tiny_run, tmp_path, capsys
):
    folder = tmp_path / "small"
    assert main(["export", str(tiny_run), str(folder), "sampling.guidance_scale=2.5"]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    held = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    (checkpoint,) = folder.glob("step-*.safetensors")
    assert held == {
        "recipe.yaml",
        checkpoint.name,
        "tokenizers/image/tokenizer.safetensors",
        "tokenizers/image/tokenizer.yaml",
        "tokenizers/text/tokenizer.json",
    }
    whole = load_file(tiny_run / checkpoint.name)
    small = load_file(checkpoint)
    assert all(torch.equal(small[name], whole[name].half()) for name in whole)
    model = mmrdpm.load(folder)
    assert model.sampling.guidance_scale == 2.5
    assert [p.size for p in model.generate(["red heart"])] == [(16, 16)]


def test_an_export_is_begun_with_and_not_resumed(tiny_run, tiny_recipe, tmp_path, capsys):
    assert main(["export", str(tiny_run), str(tmp_path / "small")]) == 0
    resumed = ["train", str(tiny_recipe), "--run", str(tmp_path / "small"), "--resume"]
    assert main(resumed) == 1
    said = capsys.readouterr().err
    assert f"begin another run with model.init_from={tmp_path / 'small'}" in said


def test_matrices_in_int8_are_read_back_as_rounded(tiny_run, tmp_path):
    folders = [tmp_path / "half", tmp_path / "int8"]
    for folder, more in zip(folders, ([], ["--int8"]), strict=True):
        assert main(["export", str(tiny_run), str(folder), *more]) == 0
    half, small = (next(folder.glob("step-*.safetensors")) for folder in folders)
    assert small.stat().st_size < 0.7 * half.stat().st_size
    whole = load_file(tiny_run / small.name)
    read = mmrdpm.load(folders[1]).transformer.state_dict()
    assert read.keys() == whole.keys() == weights.shapes(small).keys()
    for name, tensor in whole.items():
        step = tensor.abs().amax(-1, keepdim=True) / 127
        assert ((read[name].cpu() - tensor).abs() <= 0.51 * step).all(), name
        assert torch.equal(weights.tensor(small, name), read[name].cpu())
    raw = load_file(small)
    raw["table.weight.int8_scale"] = torch.ones(3)
    save_file(raw, small)
    with pytest.raises(CheckpointError, match=r"'table\.weight' does not fit its factors"):
        weights.load(small)


def test_what_cannot_be_exported_is_one_clear_line(tiny_run, tmp_path, capsys):
    def refused(*arguments):
        assert main(["export", *map(str, arguments)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    folder = tmp_path / "small"
    assert "sampling.* only" in refused(tiny_run, folder, "model.layers=3")
    assert "no checkpoint to export" in refused(tmp_path, folder)
    assert "exists already" in refused(tiny_run, tmp_path)
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    newest = sorted(run.glob("step-*.safetensors"))[-1]
    tensors, about = weights.load(newest)
    tensors["table.weight"][0, 0] = 1e6
    weights.save(tensors, newest, about)
    assert "'table.weight' does not fit into float16" in refused(run, folder)
    assert not folder.exists()


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("mmrdpm ")


def test_an_export_touches_nothing_but_its_folder(tiny_run, tmp_path):
    beside = tmp_path / "shipped.partial"
    beside.mkdir()
    (beside / "thesis.txt").write_text("mine")
    export(tiny_run, tmp_path / "shipped")
    assert (beside / "thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shipped", "shipped.partial"]
