"""The guard against updates that spoil a run: what it takes for one, and a run that meets one."""

import json

import pytest

from mmrdpm import checkpoint, recipe
from mmrdpm.engine.guard import Guard, GuardConfig
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.optim import Optimizers
from mmrdpm.train_model import Trainer, train


def test_the_guard_knows_a_spike_from_a_bump():
    guard = Guard(GuardConfig(spike=10.0, patience=2))
    assert all(guard.accepts(1.0 + 0.1 * (i % 3)) for i in range(60))
    assert guard.accepts(5.0) and not guard.accepts(50.0) and guard.accepts(1.0)
    assert not guard.accepts(float("nan")) and not guard.accepts(float("inf"))
    assert guard.lost_patience and guard.skipped == 3
    assert Guard(GuardConfig(spike=0.0)).accepts(1e9)
    again = Guard(guard.config)
    again.restore(guard.state())
    assert again == guard


def test_no_checkpoint_is_written_while_updates_are_bad(tiny_recipe, tmp_path, monkeypatch):
    """The last good one is what a roll back wants."""
    is_bad = Guard._is_bad
    monkeypatch.setattr(
        Guard,
        "_is_bad",
        lambda self, norm: self.accepted + self.skipped + 1 in (6, 7) or is_bad(self, norm),
    )
    more = ["train.steps=9", "checkpoint.every=1", "checkpoint.keep=99", "samples.prompts=[]"]
    assert train(recipe.load(ModelRecipe, tiny_recipe, more), tmp_path)
    saved = sorted(checkpoint.step_of(p) for p in tmp_path.glob("step-*.safetensors"))
    assert saved == [1, 2, 3, 4, 5, 8, 9]


def test_a_spike_within_a_run_is_skipped_and_the_losses_go_on(tiny_recipe, tmp_path, monkeypatch):
    """The gradients of update 56 a thousand times as large: the guard judges after fifty."""
    update, clip, weights = Trainer.update, Optimizers.clip, {}

    def watched(self):
        before = {n: p.detach().clone() for n, p in self.transformer.named_parameters()}
        accepted = update(self)
        if self.step in (55, 56, 57):
            now = self.transformer.named_parameters()
            weights[self.step] = accepted, any(not p.equal(before[n]) for n, p in now)
        return accepted

    def spoiled(self):
        spoiled.calls += 1
        for p in self.parameters if spoiled.calls == 56 else ():
            p.grad.mul_(1000)
        return clip(self)

    spoiled.calls = 0
    monkeypatch.setattr(Trainer, "update", watched)
    monkeypatch.setattr(Optimizers, "clip", spoiled)
    more = ["train.steps=60", "checkpoint.log_every=1", "checkpoint.every=60"]
    assert train(recipe.load(ModelRecipe, tiny_recipe, more), tmp_path)
    assert weights == {55: (True, True), 56: (False, False), 57: (True, True)}
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = {record["step"]: record for record in map(json.loads, lines)}
    assert records[56]["gradient_norm"] > 20 * records[55]["gradient_norm"]
    assert "loss/text" not in records[56]  # nothing was learned from it
    counts = [records[step]["skipped_updates"] for step in (55, 56, 60)]
    assert counts == [0, 1, 1] and records[60]["rollbacks"] == 0
    assert records[60]["loss/text"] == pytest.approx(records[55]["loss/text"], rel=0.5)
