"""Runs as a user starts them: real processes, stopped and killed for real."""

import json
import resource
import signal
import subprocess
import sys
import time

import pytest

from mmrdpm import checkpoint


def start(recipe, run, *more, **kwargs):
    command = [sys.executable, "-m", "mmrdpm", "train", str(recipe), "--run", str(run), *more]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs
    )


def finish(process):
    """The exit status and what went to stderr."""
    _, messages = process.communicate(timeout=120)
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
    assert (again.communicate(timeout=120)[0], again.returncode) == (f"{run}\n", 0)
    assert newest_bytes(run) == newest_bytes(tiny_run)


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


def test_a_full_disk_keeps_the_last_good_checkpoint(tiny_recipe, tiny_run, tmp_path):
    run = tmp_path / "run"
    assert finish(start(tiny_recipe, run, "train.steps=4"))[0] == 0
    before = newest_bytes(run)
    saved = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(saved.replace("steps: 4\n", "steps: 12\n"))

    def no_room():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    code, messages = finish(start(tiny_recipe, run, "--resume", preexec_fn=no_room))
    assert code == 1
    assert "Traceback" not in messages
    assert "make room and go on with --resume" in messages.splitlines()[-1]
    assert newest_bytes(run) == before
    assert finish(start(tiny_recipe, run, "--resume"))[0] == 0
    assert newest_bytes(run)[0] == "step-0000012.safetensors"


def test_a_second_run_in_a_folder_and_a_changed_recipe_are_refused(tiny_recipe, tiny_run):
    code, messages = finish(start(tiny_recipe, tiny_run))
    assert code == 1
    assert "holds a run already" in messages
    code, messages = finish(start(tiny_recipe, tiny_run, "train.lr=0.5", "--resume"))
    assert code == 1
    assert "was begun with train.lr=0.003, not 0.5" in messages
