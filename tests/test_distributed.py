"""Several ranks as a scheduler starts them: real processes, one of them killed or hung for real."""

import io
import os
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import torch
import yaml
from PIL import Image
from ranks import finish, free_port, losses, remove_after, start_ranks

from mmrdpm import checkpoint, distributed, recipe, weights
from mmrdpm.engine import parallel
from mmrdpm.errors import DistributedError, RecipeError
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.train_model import train

pytestmark = pytest.mark.usefixtures("on_the_cpu")


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


def test_nodes_whose_restarted_ranks_would_look_for_dead_ones_are_refused(monkeypatch):
    names = {"WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"}
    for name, value in (names | {"TORCHELASTIC_USE_AGENT_STORE": "True"}).items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(DistributedError, match="with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),
        distributed.joined(60),
    ):
        pass


def test_modes_that_ranks_and_memory_call_for(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    monkeypatch.setattr(distributed, "node_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [mine, mine, 1])
    with pytest.raises(RecipeError, match="nodes have 1 or 2 ranks"):
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


def test_the_watchdog_sleeps_once_its_work_has_failed(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(os, "_exit", lambda code: ended.append(code))
    ended = []
    with pytest.raises(KeyError), distributed.Watchdog(0.2):
        raise KeyError
    time.sleep(0.6)
    assert ended == []


def test_a_folder_in_use_is_told_by_one_rank(shared_recipe, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with checkpoint.claimed(run):
        codes, _, err = finish(start_ranks(shared_recipe, run, "train.parallel=ddp"))
    assert codes == [1, 1] and err[1] == ""
    assert "another process is training in this folder" in err[0] and err[0].count("\n") == 1


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


def test_what_one_began_two_go_on_with_of_which_one_alone_counts_a_restart(
    shared_recipe, alone, tmp_path
):
    """Of several nodes torchrun counts it only on those that have seen a rank end."""
    run = tmp_path / "run"
    assert train(recipe.load(ModelRecipe, shared_recipe), run)
    remove_after(run, 10)
    counted = {"TORCHELASTIC_RESTART_COUNT": "1"}
    ranks = start_ranks(shared_recipe, run, "train.parallel=fsdp", of_last=counted)
    codes, _, err = finish(ranks)
    assert codes == [0, 0], err
    assert losses(run) == pytest.approx(losses(alone), abs=1e-4)


def test_a_signal_to_one_rank_stops_both_at_the_same_step(shared_recipe, tmp_path):
    """As under SLURM, where it comes from there, and from torchrun once more."""
    run = tmp_path / "run"
    launched = {"TORCHELASTIC_RUN_ID": "1"}
    ranks = start_ranks(shared_recipe, run, "train.steps=100000", of_last=launched)
    while checkpoint.newest(run) is None:
        assert ranks[0].poll() is None, ranks[0].communicate()[1]
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGTERM)
    time.sleep(0.3)
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
    ranks[1].send_signal(signal.SIGKILL)
    ranks[1].communicate()
    assert ranks[0].returncode == 1
    assert "mmrdpm: error: rank 0:" in messages and "Traceback" not in messages


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
    assert said.count("2 ranks (ddp)") >= 2, said  # once a start
    assert losses(run) == pytest.approx(losses(alone), abs=1e-4)


def test_gradients_become_the_mean_over_ranks(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda t: t.mul_(4))  # the other's: thrice
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in ((2, 3), (4,), (1,))]
    parameters[0].grad, parameters[1].grad = torch.arange(6.0).view(2, 3), torch.arange(4.0)
    distributed.average_gradients(parameters)
    assert torch.equal(parameters[0].grad, 2 * torch.arange(6.0).view(2, 3))
    assert torch.equal(parameters[1].grad, 2 * torch.arange(4.0))


def test_without_torchrun_everything_stays_as_it_is():
    tensor = torch.ones(2)
    assert distributed.sum_over_ranks(tensor) is tensor
    assert distributed.shard_like(tensor, tensor) is tensor
    assert distributed.anyone(True) and not distributed.anyone(False)
    assert distributed.gather({"a": [torch.tensor(2.0), 1], 3: None}) == {"a": [2.0, 1], 3: None}
