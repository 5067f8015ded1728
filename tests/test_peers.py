# ruff: noqa: E402 (what needs the extra is imported after it was looked for)
"""Peers on pictures of 2x2 positions: resuming, refusals, the whole command."""

import json
import math
import re
from copy import copy

import pytest
import torch
import yaml

from mmrdpm import recipe
from mmrdpm.cli import main
from mmrdpm.errors import RecipeError, UsageError

for package in ("diffusers", "transformers", "transfusion_pytorch", "matplotlib"):
    pytest.importorskip(package, reason="the extra `peers` is not installed")

from mmrdpm.bench.peers import peers as registry
from mmrdpm.bench.peers import report, run
from mmrdpm.bench.peers.peers import make
from mmrdpm.bench.peers.protocol import PeerBench
from mmrdpm.bench.peers.trainer import Diverged, Trainer, fit


def test_a_killed_run_goes_on_exactly(peer_recipe, peer_scene, tmp_path, monkeypatch):
    def trainer():
        return Trainer("flow", peer_recipe, peer_scene, tmp_path, lr=0.01, steps=6)

    straight, killed = trainer(), trainer()
    stopped_at = []
    assert fit(straight, tmp_path / "straight", [3, 6], lambda _: None)
    update = killed.update

    def dying():
        if killed.step == 5:
            raise KeyboardInterrupt
        return update()

    monkeypatch.setattr(killed, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        fit(killed, tmp_path / "run", [3, 6], lambda _: None)
    again = trainer()
    assert fit(again, tmp_path / "run", [3, 6], lambda _: stopped_at.append(again.step))
    assert stopped_at == [6] and again.last_losses == straight.last_losses
    for name, tensor in straight.peer.state_dict().items():
        assert torch.equal(tensor, again.peer.state_dict()[name]), name


def test_updates_that_are_not_finite_are_skipped_and_five_in_a_row_name_the_learning_rate(
    peer_recipe, peer_scene, tmp_path, monkeypatch
):
    trainer = Trainer("flow", peer_recipe, peer_scene, tmp_path, lr=0.5, steps=9)
    losses = iter([0.1, math.nan, 0.2, *[math.inf] * 5])
    honest = trainer.peer.loss
    monkeypatch.setattr(trainer.peer, "loss", lambda batch: honest(batch) * next(losses))
    for learns in (True, False, True):
        before = trainer.peer.table.weight.clone()
        trainer.update()
        assert torch.equal(before, trainer.peer.table.weight) != learns
    assert (trainer.step, trainer.skipped) == (3, 1)
    for _ in range(4):
        trainer.update()
    with pytest.raises(
        UsageError, match=r"5 updates up to 8, with the learning rate 0\.5: begin.*lrs"
    ):
        trainer.update()


@pytest.fixture
def command(peer_mapping, peer_scene, tmp_path, monkeypatch, pixel_features):
    """Runs `bench peers` on a recipe file; gives the exit status."""
    monkeypatch.setattr(run, "Scene", lambda recipe: peer_scene)  # reading it takes seconds
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(peer_mapping))
    return lambda *more: main(["bench", "peers", str(path), "--out", str(tmp_path / "out"), *more])


def test_the_command_runs_all_peers_and_goes_on_where_it_was(command, tmp_path, capsys):
    out = tmp_path / "out"
    assert command("--only", "ours", "flow", "ours.lrs=[0.001,0.01]") == 0
    plan = json.loads((out / "ours" / "plan.json").read_text())
    assert set(plan["search"]) == {"0.001", "0.01"}
    assert plan["search"][f"{plan['lr']:g}"] == min(plan["search"].values())
    results = json.loads((out / "flow" / "results.json").read_text())
    spent = results["curve"][-1]["flops"]
    flow = json.loads((out / "flow" / "plan.json").read_text())
    assert abs(spent - 2e7) <= flow["flops_per_update"]
    assert len(results["curve"]) == 2
    timing = json.loads((out / "timing.json").read_text())
    drawn = [(e["peer"], e["steps"]) for e in timing["sampling"]]
    assert drawn == [("ours", 3), ("flow", 3), ("flow", 2)]
    assert [e["peer"] for e in timing["training"]] == ["ours", "flow"]
    assert all(e["seconds_per_update"] > 0 < e["matrix_share"] for e in timing["training"])
    assert "in turns on" in (out / "table.md").read_text()

    last = results["curve"][-1]["drawn"]
    assert {entry["temperature"] for entry in last} == {None}  # a flow draws no codes
    assert "| 3 | 2 |  |" in (out / "table.md").read_text() and results["protocol"]["count"] == 5
    last.append({**last[0], "top10": 1.0, "kid": -1.0, "guidance_scale": 4.0})
    (out / "flow" / "results.json").write_text(json.dumps(results))
    begun = (out / "ours" / "results.json").stat().st_mtime_ns
    assert command("ours.lrs=[0.001,0.01]") == 0  # the rest
    assert (out / "ours" / "results.json").stat().st_mtime_ns == begun
    timing = json.loads((out / "timing.json").read_text())  # of drawing as it was judged best
    flow = [e for e in timing["sampling"] if e["peer"] == "flow"]
    assert {e["steps"]: e["guidance_scale"] for e in flow} == {3: 4.0, 2: 2.0}
    table = capsys.readouterr().out
    assert all(title in table for title in report.TITLES.values())
    for name in ("flops", "seconds", "sampling"):
        assert (out / f"quality-{name}.svg").read_text().count("<svg") == 1

    assert command() == 1  # another recipe in the same folder
    assert "was begun with ours.lrs" in capsys.readouterr().err


def test_ctrl_c_saves_and_the_same_command_goes_on(command, tmp_path, capsys, interrupted):
    with interrupted(Trainer, 1):
        assert command("--only", "flow") == 130
    assert "the same command goes on" in capsys.readouterr().err
    saved = tmp_path / "out" / "flow" / "run" / "step-0000001.safetensors"
    assert saved.exists()
    assert command("--only", "flow") == 0
    log = (tmp_path / "out" / "flow" / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in log]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 1


@pytest.mark.parametrize(
    "error, reason",
    [
        (ModuleNotFoundError("No module named 'x'", name="x"), "needs the package x: pip install"),
        (
            RuntimeError("Failed to import diffusers.models because of:\ncannot import name 'y'"),
            "its libraries do not go together (cannot import name 'y')",
        ),
    ],
)
def test_a_peer_without_its_library_stays_in_the_table(
    command, capsys, monkeypatch, tmp_path, error, reason
):
    monkeypatch.setattr(report, "PLOTS", {})  # drawing them takes longer than all else

    def failing(name):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(registry, "import_module", failing)
        assert command("--only", "flow") == 0
        assert f"not run: {reason}" in capsys.readouterr().out
    assert command("--only", "flow", "ours") == 0  # the library is there now
    (tmp_path / "out" / "timing.json").unlink()
    monkeypatch.setattr(registry, "import_module", failing)
    assert command("--only", "ours") == 0
    timing = json.loads((tmp_path / "out" / "timing.json").read_text())
    assert [e["peer"] for e in timing["training"]] == ["ours"]
    assert list(timing["missing"]) == ["flow"] and reason in timing["missing"]["flow"]
    assert "flow was not timed" in capsys.readouterr().err
    assert command("--only", "ours") == 0  # what cannot be timed is not tried at every call
    assert "timing" not in capsys.readouterr().err


def test_bad_input_is_one_line(command, capsys):
    assert command("--only", "flo") == 1
    assert "--only flo: no such peer: choose among ours, flow" in capsys.readouterr().err
    assert command("flow.ffn=100") == 1
    assert "flow.ffn is 100: the library's blocks have 4 * width = 128" in capsys.readouterr().err


def test_settings_that_cannot_be_measured_are_refused(peer_mapping, peer_scene, tmp_path):
    def made(**changed):
        name = next(iter(changed))
        altered = {**peer_mapping, name: {**peer_mapping[name], **changed[name]}}
        return make(name, recipe.from_dict(PeerBench, altered, "altered"), peer_scene, tmp_path)

    with pytest.raises(RecipeError, match="steps is empty"):
        made(flow={"steps": []})
    with pytest.raises(RecipeError, match=r"ours\.steps: the method fixes it at 3"):
        made(ours={"steps": [50]})
    with pytest.raises(RecipeError, match=r"flow\.noise_pool: it belongs to ours alone"):
        made(flow={"noise_pool": 1})
    with pytest.raises(RecipeError, match="lrs: name at least one"):
        made(ours={"lrs": []})


def test_peers_have_a_number_of_codes_of_their_own(peer_mapping, peer_scene, tmp_path):
    equal = {**peer_mapping["equal"], "codebook_size": 8}
    loaded = recipe.from_dict(PeerBench, {**peer_mapping, "equal": equal}, "altered")
    scene = copy(peer_scene)
    scene.equal = loaded.equal
    for name in ("raster", "masked", "scales"):
        peer = make(name, loaded, scene, tmp_path)
        assert peer.codes.codebook.size == peer.head.out_features == 8
    assert scene.images.codebook_size != 8  # of ours


def test_a_rate_that_diverges_loses_the_search_and_all_of_them_end_the_run(
    command, tmp_path, capsys, monkeypatch
):
    update = Trainer.update

    def diverging(self):
        if self.lr > 0.01:
            raise Diverged("too high")
        return update(self)

    monkeypatch.setattr(Trainer, "update", diverging)
    assert command("--only", "flow", "flow.lrs=[0.01,0.5]") == 0
    plan = json.loads((tmp_path / "out" / "flow" / "plan.json").read_text())
    assert plan["search"]["0.5"] is None and plan["lr"] == 0.01
    assert command("--only", "flow", "flow.lrs=[0.5,0.6]", "--out", str(tmp_path / "other")) == 1
    assert "diverges with every rate of flow.lrs" in capsys.readouterr().err


def test_a_peer_of_another_size_is_refused_before_anything_is_trained(command, tmp_path, capsys):
    assert command("--only", "ours", "scales", "equal.tolerance=0.05", "scales.layers=4") == 1
    assert re.search(r"scales has [\d,]+ parameters, ours [\d,]+: \+", capsys.readouterr().err)
    assert not (tmp_path / "out" / "ours").exists()
