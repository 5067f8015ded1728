"""A sharded model on several ranks: on nodes that copy it, in turns, on disk."""

import json

import pytest
import torch
from processes import start
from ranks import finish, losses, remove_after, start_ranks

from mmrdpm import checkpoint, recipe, weights
from mmrdpm.engine import shards
from mmrdpm.errors import CheckpointError
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.train_model import train

pytestmark = pytest.mark.usefixtures("on_the_cpu")

HYBRID = """
import sys
from pathlib import Path

from mmrdpm import distributed, recipe, train_model
from mmrdpm.model_recipe import ModelRecipe


class Looked(train_model.Trainer):
    def save(self, run):
        super().save(run)
        weight = self.transformer.table.weight
        assert weight.device_mesh.mesh.tolist() == [[0, 1], [2, 3]]
        a, b, c, d = distributed.gather_objects(weight.to_local())
        assert a.equal(c) and b.equal(d) and len(a) + len(b) == len(weight) and len(a) < len(weight)


train_model.Trainer = Looked
more = ["train.parallel=hybrid"]
assert train_model.train(recipe.load(ModelRecipe, sys.argv[1], more), Path(sys.argv[3]))
"""


SPOILED = """
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

from mmrdpm import distributed, recipe, train_model
from mmrdpm.engine import parallel
from mmrdpm.model_recipe import ModelRecipe

last, loss, trainers = distributed.rank() == distributed.world_size() - 1, parallel.loss, []


def poisoned(*arguments, **how):  # on the last rank, from update 13 until the guard goes back
    made, trainer = loss(*arguments, **how), trainers[0]
    bad = last and trainer.step >= 12 and not trainer.guard.rollbacks
    return replace(made, total=made.total * math.nan) if bad else made


class Spoiled(train_model.Trainer):
    def __init__(self, *arguments):
        trainers.append(self)
        super().__init__(*arguments)

    def parts(self):
        return [t.to_local() if distributed.is_sharded(t) else t for t in self._sharded().values()]

    def save(self, run):
        super().save(run)
        if self.step == 10:
            self.kept = [part.clone() for part in self.parts()]

    def roll_back(self, run):
        assert self.step == 15
        said = super().roll_back(run)
        assert all(a.equal(b) for a, b in zip(self.parts(), self.kept, strict=True))
        place = self._place()
        told = {"said": said, "step": self.step, "guard": self.guard.state(), "place": place}
        (run / f"rank-{distributed.rank()}.json").write_text(json.dumps(told, default=str))
        return said


train_model.Trainer, parallel.loss = Spoiled, poisoned
assert train_model.train(recipe.load(ModelRecipe, sys.argv[1], sys.argv[4:]), Path(sys.argv[3]))
"""


NARROW = """
import sys
from pathlib import Path

import torch
from torch import nn

from mmrdpm import distributed, recipe
from mmrdpm.optim import Muon
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.train_model import Trainer


def main(path, run):  # what holds the process group is gone before the interpreter ends
    with distributed.joined(60):
        more = ["train.parallel=fsdp", "train.precision=bf16", "optimizer.name=adamw"]
        trainer, seen = Trainer(recipe.load(ModelRecipe, path, more), Path(run)), set()
        for attention in trainer.transformer.attentions:
            attention.register_forward_pre_hook(lambda _, given: seen.add(given[1].dtype))
        assert trainer.update() and seen == {torch.float32}, seen

        generator = torch.Generator().manual_seed(0)
        matrices = [nn.Parameter(torch.randn(4, 6, generator=generator)) for _ in range(3)]
        for p in matrices:
            p.grad = torch.randn(4, 6, generator=generator)
        muon = Muon(matrices, 0.5, torch.float32)
        step = 0.1 * 0.2 * 6**0.5
        expected = [p.detach() * 0.95 - step * muon.orthogonal(p.grad) for p in matrices]
        muon.param_groups[0]["lr"] = 0.1
        muon.step()
        torch.testing.assert_close([p.detach() for p in matrices], expected)


main(sys.argv[1], sys.argv[3])
"""


BESIDE = """
import sys
from pathlib import Path

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from mmrdpm.engine.shards import ShardWriter

dist.init_process_group("gloo")
tensor = distribute_tensor(torch.arange(12.0).view(3, 4), init_device_mesh("cpu", (2,)), [Shard(0)])
written = ShardWriter(background=True).begin({"a": tensor}, Path(sys.argv[-1]))
tensor.zero_()
written()
dist.destroy_process_group()
"""


def test_shards_are_read_by_as_many_ranks_as_there_are(shared_recipe, alone, tmp_path):
    run = tmp_path / "run"
    torn = run / "resume" / "step-0000010.partial" / "shards"  # of a save by more ranks, killed
    torn.mkdir(parents=True)
    (torn / "shard-00003-model-00001-of-00001.safetensors").write_bytes(b"torn")
    codes, _, err = finish(start_ranks(shared_recipe, run, "train.parallel=fsdp"))
    assert codes == [0, 0], err
    assert "samples.prompts: a sharded model is not drawn from" in err[0]
    assert not (run / "samples").exists()
    state = run / "resume" / "step-0000010"
    assert {p.suffix for p in state.rglob("*") if p.is_file()} == {".safetensors"}
    parts = sorted((state / "shards").iterdir())
    assert len(parts) == 2 and not list(run.rglob("*.partial"))
    remove_after(run, 10)
    codes, _, err = finish(start_ranks(shared_recipe, run, "--resume", "train.parallel=fsdp"))
    assert codes == [0, 0], err
    assert losses(run) == pytest.approx(losses(alone), abs=1e-4)
    remove_after(run, 10)
    content = parts[1].read_bytes()
    parts[1].write_bytes(content[:-9])
    with pytest.raises(CheckpointError, match="could not be read"):
        train(recipe.load(ModelRecipe, shared_recipe), run, resume=True)
    parts[0].rename(tmp_path / "lost")
    parts[1].write_bytes(content)
    with pytest.raises(CheckpointError, match="is not whole"):
        train(recipe.load(ModelRecipe, shared_recipe), run, resume=True)


def test_adamw_on_shards_has_the_losses_of_one_process(shared_recipe, tmp_path):
    """What follows from its two moments: the second update and those after it."""
    options = ["optimizer.name=adamw", "train.steps=6", "samples.prompts=[]"]
    assert train(recipe.load(ModelRecipe, shared_recipe, options), tmp_path / "one")
    ranks = start_ranks(shared_recipe, tmp_path / "two", *options, "train.parallel=fsdp")
    codes, _, err = finish(ranks)
    assert codes == [0, 0], err
    expected = losses(tmp_path / "one")
    assert len({step for step, _ in expected}) == 6
    assert losses(tmp_path / "two") == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_two_nodes_of_two_ranks_copy_shards_and_one_goes_on(shared_recipe, alone, tmp_path):
    run = tmp_path / "run"
    (tmp_path / "hybrid.py").write_text(HYBRID)
    codes, _, err = finish(
        start_ranks(shared_recipe, run, program=(str(tmp_path / "hybrid.py"),), nodes=2)
    )
    assert codes == [0] * 4, err
    assert losses(run) == pytest.approx(losses(alone), abs=1e-4)
    remove_after(run, 10)
    assert train(recipe.load(ModelRecipe, shared_recipe), run, resume=True)
    assert losses(run) == pytest.approx(losses(alone), abs=1e-4)


def test_turns_stay_exact_where_layers_are_gathered_narrow_and_muon_shares_an_odd_number(
    shared_recipe, tmp_path
):
    (tmp_path / "narrow.py").write_text(NARROW)
    program = (str(tmp_path / "narrow.py"),)
    codes, _, err = finish(start_ranks(shared_recipe, tmp_path / "run", program=program))
    assert codes == [0, 0], err


def test_a_loss_that_is_bad_on_one_rank_takes_both_back_to_one_checkpoint(shared_recipe, tmp_path):
    (tmp_path / "spoiled.py").write_text(SPOILED)
    program, patience = (str(tmp_path / "spoiled.py"),), "train.guard.patience=3"
    alone = [start(*program, shared_recipe, "--run", tmp_path / "one", patience)]
    codes, _, err = finish(alone)
    assert codes == [0], err
    run = tmp_path / "two"
    sharded = [patience, "train.parallel=fsdp"]
    codes, _, err = finish(start_ranks(shared_recipe, run, *sharded, program=program))
    assert codes == [0, 0], err
    first, second = (json.loads((run / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert (first["said"].split(",")[0], first["step"]) == ("back to step-0000010.safetensors", 10)
    assert (first["guard"]["skipped"], first["guard"]["rollbacks"]) == (3, 1)
    assert losses(run) == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    ours, theirs = (weights.load(checkpoint.newest(r))[0] for r in (run, tmp_path / "one"))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-3, rtol=1e-3)


def test_shards_that_are_written_beside_the_training_are_of_the_moment_they_were_begun(tmp_path):
    (tmp_path / "beside.py").write_text(BESIDE)
    program = (str(tmp_path / "beside.py"),)
    codes, _, err = finish(start_ranks("-", tmp_path / "shards", program=program))
    assert codes == [0, 0], err
    again = {"a": torch.zeros(3, 4)}
    shards.load(again, tmp_path / "shards")
    assert torch.equal(again["a"], torch.arange(12.0).view(3, 4))
    with pytest.raises(CheckpointError, match="could not be read"):
        shards.load({"b": torch.zeros(1)}, tmp_path / "shards")
