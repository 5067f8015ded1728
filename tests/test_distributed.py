"""Several ranks as a scheduler starts them: real processes, one of them killed or hung for real."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time

import pytest
import torch
import yaml
from PIL import Image

from mmrdpm import checkpoint, distributed, recipe, weights
from mmrdpm.engine import parallel, shards
from mmrdpm.errors import CheckpointError, DistributedError, RecipeError
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.train_model import train

SEQUENCE = "loss/"  # the figures that must agree


@pytest.fixture(scope="module")
def shared_recipe(tiny_recipe, tmp_path_factory):
    """20 updates of four rows, a checkpoint in the middle, the weights averaged, all in float32."""
    mapping = yaml.safe_load(tiny_recipe.read_text())
    mapping["data"]["rows"] = 4
    mapping["train"] |= {"steps": 20, "timeout": 60, "ema": 0.9, "precision": "fp32"}
    mapping["checkpoint"] = {"every": 10, "keep": 3, "log_every": 1}
    path = tmp_path_factory.mktemp("shared") / "shared.yaml"
    path.write_text(yaml.safe_dump(mapping))
    return path


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu():
    """Two ranks would want two GPUs: here they meet on the CPU, whatever the machine has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the ranks
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def alone(shared_recipe, tmp_path_factory):
    """The run of that recipe by one process."""
    run = tmp_path_factory.mktemp("alone") / "run"
    assert train(recipe.load(ModelRecipe, shared_recipe), run)
    return run


def test_a_rank_without_a_gpu_of_its_own_says_how_many_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(DistributedError, match=r"rank 1: .* has 1 GPU, .*--nproc-per-node to 1"),
        distributed.joined(60),
    ):
        pass


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def start_ranks(recipe_file, run, *more, program=("-m", "mmrdpm", "train")):
    """Two ranks as torchrun starts them, without the launcher."""
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *program, str(recipe_file), "--run", str(run), *more],
            env={**os.environ, **common, "MASTER_PORT": port, "RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]


def finish(processes):
    """Exit statuses, stdouts and stderrs."""
    said = [p.communicate(timeout=240) for p in processes]
    return [p.returncode for p in processes], [o for o, _ in said], [e for _, e in said]


def losses(run):
    """The losses by (step, name)."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == sorted({r["step"] for r in records})
    return {
        (r["step"], name): value
        for r in records
        for name, value in r.items()
        if name.startswith(SEQUENCE)
    }


def remove_after(run, step):
    for path in run.glob("step-*.safetensors"):
        if checkpoint.step_of(path) > step:
            path.unlink()


def test_modes_that_ranks_and_memory_call_for(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "node_size", lambda: 2)
    with pytest.raises(RecipeError, match="3 ranks are no multiple of the 2"):
        parallel.resolve("hybrid", 10, torch.device("cpu"))
    assert parallel.resolve("auto", 10**12, torch.device("cpu")) == "ddp"
    monkeypatch.setattr(distributed, "gather_objects", lambda memory: [memory, 9e9, memory])
    card = type("Card", (), {"total_memory": 80e9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    found = [parallel.resolve("auto", n, torch.device("cuda")) for n in (10**8, 2 * 10**8)]
    assert found == ["ddp", "fsdp"]  # 16 bytes each, in a third of the smallest card


def test_the_watchdog_says_what_was_done_last(monkeypatch):
    code = "import time; from mmrdpm.distributed import Watchdog; d = Watchdog(1.0);"
    code += "d.doing('the thing'); time.sleep(60)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "WORLD_SIZE": "2", "RANK": "1"},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 1
    assert "rank 1: nothing was done for 1 s, the last thing begun was the thing" in done.stderr


@pytest.mark.parametrize("mode", ["ddp", "fsdp", "hybrid"])
def test_two_ranks_train_as_one_and_go_on_as_one(mode, shared_recipe, alone, tmp_path):
    run = tmp_path / "run"
    options = [f"train.parallel={mode}", "train.micro_batch_size=1", "train.recompute=true"]
    codes, out, err = finish(start_ranks(shared_recipe, run, *options))
    assert codes == [0, 0], err
    assert out == [f"{run}\n", ""] and f"2 ranks ({mode})" in err[0] and err[1] == ""
    expected = losses(alone)
    assert len({step for step, _ in expected}) == 20
    assert losses(run) == pytest.approx(expected, abs=1e-4)
    remove_after(run, 10)
    assert train(recipe.load(ModelRecipe, shared_recipe), run, resume=True)
    assert losses(run) == pytest.approx(expected, abs=1e-4)
    ours, theirs = (weights.load(checkpoint.newest(r))[0] for r in (run, alone))
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-3, rtol=1e-3)


def test_shards_are_read_by_as_many_ranks_as_there_are(shared_recipe, alone, tmp_path):
    run = tmp_path / "run"
    torn = run / "resume" / "step-0000010.partial" / "shards"  # of a save by more ranks, killed
    torn.mkdir(parents=True)
    (torn / "shard-00003-model-00001-of-00001.safetensors").write_bytes(b"torn")
    codes, _, err = finish(start_ranks(shared_recipe, run, "train.parallel=fsdp"))
    assert codes == [0, 0], err
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


def test_turns_stay_exact_where_layers_are_gathered_narrow_and_muon_shares_an_odd_number(
    shared_recipe, tmp_path
):
    (tmp_path / "narrow.py").write_text(NARROW)
    program = (str(tmp_path / "narrow.py"),)
    codes, _, err = finish(start_ranks(shared_recipe, tmp_path / "run", program=program))
    assert codes == [0, 0], err


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


def test_what_one_began_two_go_on_with(shared_recipe, alone, tmp_path):
    run = tmp_path / "run"
    assert train(recipe.load(ModelRecipe, shared_recipe), run)
    remove_after(run, 10)
    codes, _, err = finish(start_ranks(shared_recipe, run, "--resume", "train.parallel=fsdp"))
    assert codes == [0, 0], err
    assert losses(run) == pytest.approx(losses(alone), abs=1e-4)


def test_a_signal_to_one_rank_stops_both_at_the_same_step(shared_recipe, tmp_path):
    run = tmp_path / "run"
    ranks = start_ranks(shared_recipe, run, "train.steps=100000")
    while checkpoint.newest(run) is None:
        assert ranks[0].poll() is None, ranks[0].communicate()[1]
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGTERM)
    codes, _, err = finish(ranks)
    assert codes == [130, 130]
    assert "--resume" in err[0].splitlines()[-1] and err[1] == ""
    path = checkpoint.newest(run)
    assert checkpoint.state_of(path)["step"] == checkpoint.step_of(path)


def test_a_hung_rank_ends_the_job_with_a_message(shared_recipe, tmp_path):
    run = tmp_path / "run"
    ranks = start_ranks(shared_recipe, run, "train.steps=100000", "train.timeout=20")
    while checkpoint.newest(run) is None:
        assert ranks[0].poll() is None, ranks[0].communicate()[1]
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGSTOP)
    _, messages = ranks[0].communicate(timeout=120)
    ranks[1].kill()
    ranks[1].communicate()
    assert ranks[0].returncode == 1
    assert "mmrdpm: error: rank 0:" in messages and "Traceback" not in messages


@pytest.mark.slow
def write_shard(path, shard):
    with tarfile.open(path, "w") as archive:
        for i in range(3):
            picture = io.BytesIO()
            Image.new("RGB", (9, 7), (40 * i, 0, 40 * shard)).save(picture, "PNG")
            for kind, content in (("png", picture.getvalue()), ("txt", b"shard %d" % shard)):
                member = tarfile.TarInfo(f"{i}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def test_where_one_rank_has_no_data_both_save_and_go_on_later(shared_recipe, tmp_path):
    for shard in range(4):
        write_shard(tmp_path / f"{shard}.tar", shard)
    give, opened = tmp_path / "give.sh", tmp_path / "opened"
    mapping = yaml.safe_load(shared_recipe.read_text())
    source = {"type": "webdataset", "path": f"pipe:sh {give} {{0..3}}"}
    mapping["data"] |= {"sources": {"s": source}, "max_caption_tokens": 16}
    path, whole, run = tmp_path / "r.yaml", tmp_path / "whole", tmp_path / "run"
    path.write_text(yaml.safe_dump(mapping))
    give.write_text(f"cat {tmp_path}/$1.tar")
    assert train(recipe.load(ModelRecipe, path), whole)
    third = f"echo >> {opened}; [ $(wc -l < {opened}) = 9 ] && exit 3"
    give.write_text(f"if [ $1 = 2 ]; then {third}; fi; cat {tmp_path}/$1.tar")
    codes, _, err = finish(start_ranks(path, run))
    assert codes == [1, 1] and "".join(err).count("mmrdpm: error: pipe:sh") == 1, err
    step = checkpoint.step_of(checkpoint.newest(run))
    assert step % 10 and f"step {step}  no next batch: this step is the last saved" in err[0]
    codes, _, err = finish(start_ranks(path, run, "--resume"))
    assert codes == [0, 0], err
    assert losses(run) == pytest.approx(losses(whole), abs=1e-4)


def test_a_killed_rank_is_started_again_and_the_job_goes_on(shared_recipe, alone, tmp_path):
    run = tmp_path / "run"
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
    launch += ["--master-port", free_port(), "--monitor-interval", "0.2", "-m", "--"]
    command = ["mmrdpm", "train", str(shared_recipe), "--run", str(run), "train.steps=20"]
    job = subprocess.Popen(
        [sys.executable, *launch, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while checkpoint.newest(run) is None:
        assert job.poll() is None, job.communicate()[0]
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    said, _ = job.communicate(timeout=240)
    assert job.returncode == 0, said
    assert losses(run) == pytest.approx(losses(alone), abs=1e-4)


def test_without_torchrun_everything_stays_as_it_is():
    tensor = torch.ones(2)
    assert distributed.sum_over_ranks(tensor) is tensor
    assert distributed.shard_like(tensor, tensor) is tensor
    assert distributed.anyone(True) and not distributed.anyone(False)
    assert distributed.gather({"a": [torch.tensor(2.0), 1], 3: None}) == {"a": [2.0, 1], 3: None}
