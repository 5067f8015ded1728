"""Runs as a user starts them: real processes, stopped and killed for real."""

import json
import math
import random
import resource
import shutil
import signal
import time
from types import SimpleNamespace

import processes
import pytest
import torch
import yaml
from PIL import Image

from mmrdpm import checkpoint, machine, recipe, weights
from mmrdpm.cli import main
from mmrdpm.data import emoji_stream
from mmrdpm.errors import CheckpointError, TrainingError, UsageError
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.samples import Samples, sample
from mmrdpm.train_model import Trainer, train


def start(recipe, run, *more, **how):
    return processes.start("-m", "mmrdpm", "train", recipe, "--run", run, *more, **how)


def finish(process):
    """The exit status and what went to stderr."""
    _, messages = process.communicate(timeout=600)
    return process.returncode, messages


def wait_for(path, process, seconds=120):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.02)


def newest_bytes(run):
    return checkpoint.newest(run).name, checkpoint.newest(run).read_bytes()


def test_a_run_leaves_what_it_promises(tiny_run):
    assert checkpoint.newest(tiny_run).name == "step-0000012.safetensors"
    assert len(list(tiny_run.glob("*.safetensors"))) == 2
    assert list((tiny_run / "tensorboard").iterdir())
    assert (tiny_run / "samples" / "step-0000012.png").stat().st_size > 0
    records = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [2, 4, 6, 8, 10, 12]
    assert {"loss/text", "loss/image", "loss/timestep_01", "lr"} <= records[-1].keys()
    assert records[-1]["loss/text"] < records[0]["loss/text"]


def test_killed_and_resumed_equals_never_stopped(tiny_recipe, tiny_run, tmp_path):
    run = tmp_path / "run"
    process = start(tiny_recipe, run)
    wait_for(run / "step-0000004.safetensors", process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert newest_bytes(run)[0] != "step-0000012.safetensors"
    again = start(tiny_recipe, run, "--resume")
    assert (again.communicate(timeout=600)[0], again.returncode) == (f"{run}\n", 0)
    assert newest_bytes(run) == newest_bytes(tiny_run)


def losses(run):
    """Step and losses of every record, as they were written."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k == "step" or k.startswith("loss/")} for r in records]


def changed(tiny_recipe, folder, **sections):
    """A recipe that differs in some keys."""
    mapping = yaml.safe_load(tiny_recipe.read_text())
    for section, values in sections.items():
        mapping[section] = mapping.get(section, {}) | values
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(mapping))
    return path


def last_step(run):
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return len(lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="bits are promised for CPUs alone")
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_the_losses_are_the_same_bit_for_bit(kills, tiny_recipe, tmp_path):
    """Every step is saved; every other kill falls into the saving of one."""
    policy = {"every": 1, "keep": 3, "log_every": 1}
    steps, chance = 15 * kills, random.Random(0)
    path = changed(tiny_recipe, tmp_path, train={"steps": steps}, checkpoint=policy)
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train(recipe.load(ModelRecipe, path), whole)
    unfinished, while_saving = set(), 0
    for kill in range(kills):
        process = start(path, run, *["--resume"] * (kill > 0))
        before = last_step(run)
        while process.poll() is None and last_step(run) in (0, before):
            time.sleep(0.005)
        moment, left = time.monotonic() + chance.uniform(0, 0.4), set()
        while process.poll() is None and not (left if kill % 2 else time.monotonic() > moment):
            left = {path.name for path in run.rglob("step-*.partial")} - unfinished
        process.send_signal(signal.SIGKILL)
        process.communicate()
        left = {path.name for path in run.rglob("step-*.partial")} - unfinished
        unfinished, while_saving = unfinished | left, while_saving + bool(left)
        for saved in run.glob("step-*.safetensors"):
            weights.load(saved)
            assert checkpoint.state_of(saved)["step"] == checkpoint.step_of(saved)
    assert while_saving or kills < 20  # a file may just have been finished
    code, messages = finish(start(path, run, "--resume"))
    assert code == 0, messages
    assert losses(run) == losses(whole)
    assert newest_bytes(run) == newest_bytes(whole)


def test_a_window_of_the_log_survives_a_stop_in_its_middle(tiny_recipe, tmp_path):
    policy = {"every": 3, "keep": 9, "log_every": 4}
    path = changed(tiny_recipe, tmp_path, checkpoint=policy)
    whole, run = tmp_path / "whole", tmp_path / "run"
    for folder in (whole, run):
        assert train(recipe.load(ModelRecipe, path), folder)
    for saved in run.glob("step-*.safetensors"):
        if checkpoint.step_of(saved) > 6:
            saved.unlink()
    with open(run / "metrics.jsonl", "a") as log:
        log.write('{"step": 13, "lo')  # as a kill leaves it
    assert train(recipe.load(ModelRecipe, path), run, resume=True)
    assert losses(run) == losses(whole)


@pytest.mark.skipif(torch.cuda.is_available(), reason="bits are promised for CPUs alone")
def test_what_a_run_saves_logs_and_draws_may_change_on_the_way(tiny_recipe, tiny_run, tmp_path):
    run = tmp_path / "run"
    assert train(recipe.load(ModelRecipe, tiny_recipe), run)
    for saved in run.glob("step-*.safetensors"):
        if checkpoint.step_of(saved) > 8:
            saved.unlink()
    kept = {"every": 1, "keep": 3, "keep_every": 8, "log_every": 1}
    drawn = {"every": 10, "prompts": ["rainbow"]}
    more = {"data": {"max_broken_share": 0.9}, "checkpoint": kept, "samples": drawn}
    path = changed(tiny_recipe, tmp_path, **more)
    assert train(recipe.load(ModelRecipe, path), run, resume=True)
    assert [checkpoint.step_of(p) for p in sorted(run.glob("step-*"))] == [8, 10, 11, 12]
    written = recipe.read(run / checkpoint.RECIPE_FILE)
    assert all(written[section][k] == v for section, keys in more.items() for k, v in keys.items())
    assert newest_bytes(run) == newest_bytes(tiny_run)
    with pytest.raises(CheckpointError, match=r"begun with train\.steps=12, not 13"):
        train(recipe.load(ModelRecipe, path, ["train.steps=13"]), run, resume=True)
    del written["train"]["codes_apart"]  # as before there was the key, when all was scored together
    (run / checkpoint.RECIPE_FILE).write_text(yaml.safe_dump(written))
    with pytest.raises(CheckpointError, match="add codes_apart: false to its train"):
        train(recipe.load(ModelRecipe, path), run, resume=True)


def test_a_run_goes_on_with_a_lower_rate(tiny_recipe, tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "step-0000012.safetensors").unlink()
    assert train(recipe.load(ModelRecipe, tiny_recipe, ["train.lr=0.001"]), run, resume=True)
    before, after = (
        {r["step"]: r["lr"] for r in map(json.loads, log.read_text().splitlines())}
        for log in (tiny_run / "metrics.jsonl", run / "metrics.jsonl")
    )
    lowered = {step: lr / 3 if step > 8 else lr for step, lr in before.items()}
    assert after == pytest.approx(lowered)


@pytest.mark.parametrize("poisoned", [True, False])
def test_the_log_is_json_where_an_update_was_bad(poisoned, tiny_recipe, tmp_path):
    trainer = Trainer(recipe.load(ModelRecipe, tiny_recipe), tmp_path / "run")
    if poisoned:
        trainer.transformer.table.weight.data.fill_(torch.nan)
    assert trainer.update() != poisoned
    figures, _ = trainer.figures()
    assert ("gradient_norm" in figures) != poisoned
    json.dumps(figures, allow_nan=False)


def test_the_objective_does_not_depend_on_how_a_batch_is_split(tiny_recipe, tmp_path):
    """Rows with very different numbers of targets, whole and one by one, recomputed or not."""
    exact = {"z_loss": 1e-3, "precision": "fp32"}
    path = changed(tiny_recipe, tmp_path, data={"rows": 3}, train=exact)
    found = []
    for index, more in enumerate([[], ["train.micro_batch_size=1", "train.recompute=true"]]):
        trainer = Trainer(recipe.load(ModelRecipe, path, more), tmp_path / str(index))
        for _ in range(3):
            assert trainer.update()
        found.append((trainer.latest, trainer.transformer.state_dict()))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-4)
    for name, tensor in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], tensor, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("pool", "starts"), [(1, 1), (2, 2), (0, None)])
def test_pictures_begin_with_the_noises_of_the_pool(tiny_recipe, tmp_path, pool, starts):
    path = changed(tiny_recipe, tmp_path, model={"noise_pool": pool}, data={"rows": 6})
    trainer = Trainer(recipe.load(ModelRecipe, path), tmp_path / "run")
    batch, channels = trainer.loader.batch(), trainer.images.latent_channels
    begun = batch.latents[batch.timesteps == trainer.images.num_timesteps]  # of whole grids
    begun = begun.view(-1, math.prod(trainer.images.grid), 2 * channels)[..., channels:]
    assert len(begun) > 2 and len(begun.unique(dim=0)) == (starts or len(begun))


def test_a_faulty_prompt_leaves_no_run(tiny_recipe, tmp_path):
    path = changed(tiny_recipe, tmp_path, samples={"prompts": ["red heart", " "]})
    with pytest.raises(UsageError, match="the prompt is empty"):
        train(recipe.load(ModelRecipe, path), tmp_path / "run")
    assert not (tmp_path / "run" / checkpoint.RECIPE_FILE).exists()


def test_the_average_is_what_is_saved_and_survives_a_stop(tiny_recipe, tiny_run, tmp_path):
    path = changed(tiny_recipe, tmp_path, train={"ema": 0.5})
    whole, run = tmp_path / "whole", tmp_path / "run"
    for folder in (whole, run):
        assert train(recipe.load(ModelRecipe, path), folder)
    (run / "step-0000012.safetensors").unlink()
    assert train(recipe.load(ModelRecipe, path), run, resume=True)
    assert newest_bytes(run) == newest_bytes(whole)
    newest = checkpoint.newest(whole)
    averaged, raw = weights.load(newest)[0], checkpoint.state_of(newest)["raw"]
    assert averaged.keys() == raw.keys()
    plain = weights.load(checkpoint.newest(tiny_run))[0]  # an average changes nothing that learns
    for name, tensor in plain.items():
        torch.testing.assert_close(raw[name], tensor)
    assert any(not torch.equal(averaged[name], raw[name]) for name in raw)


def test_bad_updates_are_skipped_then_undone_then_given_up(tiny_recipe, tmp_path):
    guard = {"patience": 2, "rollbacks": 1}
    path = changed(tiny_recipe, tmp_path, train={"guard": guard})
    trainer = Trainer(recipe.load(ModelRecipe, path), tmp_path / "run")
    with pytest.raises(TrainingError, match=r"lower train\.lr"):
        trainer.roll_back(tmp_path / "run")
    assert trainer.update()
    trainer.save(tmp_path / "run")
    kept = {name: p.clone() for name, p in trainer.transformer.state_dict().items()}
    trainer.transformer.table.weight.data.fill_(torch.nan)
    assert not trainer.update() and not trainer.guard.lost_patience
    assert not trainer.update() and trainer.guard.lost_patience
    place = trainer.loader.state()
    assert "back to step-0000001" in trainer.roll_back(tmp_path / "run")
    assert (trainer.step, trainer.loader.state()) == (1, place)
    for name, tensor in trainer.transformer.state_dict().items():
        assert torch.equal(tensor, kept[name])
    assert trainer.update() and trainer.guard.skipped == 2
    with pytest.raises(TrainingError, match="after 1 returns"):
        trainer.roll_back(tmp_path / "run")


def test_a_run_that_goes_back_ends_and_logs_every_step_once(tiny_recipe, tmp_path, monkeypatch):
    path = changed(
        tiny_recipe,
        tmp_path,
        train={"guard": {"patience": 2, "rollbacks": 2}},
        checkpoint={"every": 4, "log_every": 1},
    )
    update, spoiled = Trainer.update, []

    def spoil(self):
        if self.step == 6 and not spoiled:
            spoiled.append(True)
            self.transformer.table.weight.data.fill_(torch.nan)
        return update(self)

    monkeypatch.setattr(Trainer, "update", spoil)
    assert train(recipe.load(ModelRecipe, path), tmp_path / "run") and spoiled
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["step"] for r in records] == list(range(1, 13))
    assert (records[3]["rollbacks"], records[-1]["rollbacks"]) == (0, 1)
    assert records[-1]["skipped_updates"] == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number, tiny_recipe, tiny_run, tmp_path):
    run = tmp_path / "run"
    process = start(tiny_recipe, run, "train.steps=100000")
    wait_for(run / "step-0000004.safetensors", process)
    process.send_signal(number)
    code, messages = finish(process)
    assert code == 130
    assert "--resume" in messages.splitlines()[-1]
    path = checkpoint.newest(run)
    assert checkpoint.state_of(path)["step"] == int(path.stem.removeprefix("step-"))


def no_room():
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_full_disk_keeps_the_last_good_checkpoint(tiny_recipe, tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    (run / "step-0000012.safetensors").unlink()  # as it was after step 8
    before = newest_bytes(run)

    code, messages = finish(start(tiny_recipe, run, "--resume", before=no_room))
    assert code == 1
    assert "Traceback" not in messages
    assert "make room and run the command again" in messages.splitlines()[-1]
    assert newest_bytes(run) == before
    assert train(recipe.load(ModelRecipe, tiny_recipe), run, resume=True)
    name, whole = newest_bytes(tiny_run)
    assert newest_bytes(run)[0] == name
    assert torch.cuda.is_available() or newest_bytes(run)[1] == whole  # promised for CPUs alone


def test_a_second_run_in_a_folder_and_a_changed_recipe_are_refused(tiny_recipe, tiny_run, capsys):
    command = ["train", str(tiny_recipe), "--run", str(tiny_run)]
    assert main(command) == 1
    assert "holds a run already" in capsys.readouterr().err
    assert main([*command, "train.warmup=5", "--resume"]) == 1
    assert "was begun with train.warmup=2, not 5" in capsys.readouterr().err


def test_tokeniser_and_transformer_lie_on_the_device_of_the_run(tiny_recipe, tmp_path, monkeypatch):
    """On the meta device in place of a GPU; its tensors have no values to fetch."""
    monkeypatch.setattr(machine, "device", lambda: torch.device("meta"))
    monkeypatch.setattr(machine, "peak_rate", lambda *_: 1.0)
    monkeypatch.setattr(emoji_stream, "latents_of", lambda *_: torch.zeros(1))
    model = Trainer(recipe.load(ModelRecipe, tiny_recipe), tmp_path).model()
    parts = (model.transformer, model.images)
    tensors = [t for part in parts for t in (*part.parameters(), *part.buffers())]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_a_caption_that_does_not_end_is_cut_short_on_the_console_alone(tmp_path):
    model = SimpleNamespace(
        images=SimpleNamespace(image_size=8),
        generate=lambda prompts: [Image.new("RGB", (8, 8)) for _ in prompts],
        caption=lambda pictures: ["r" * 200, ""],
    )
    said, logged = [], []
    monitor = SimpleNamespace(
        run=tmp_path,
        say=said.append,
        picture=lambda *_: None,
        text=lambda name, step, text: logged.append(text),
    )
    sample(model, Samples(prompts=("red heart", "rainbow")), 3, monitor)
    assert logged == ["red heart -> " + "r" * 200 + "; rainbow -> (nothing)"]
    assert said == ["step 3  captions: red heart -> " + "r" * 60 + "...; rainbow -> (nothing)"]
