"""Ranks as a scheduler starts them, real processes, and what they have logged."""

import json
import socket

from processes import start

from mmrdpm import checkpoint

SEQUENCE = "loss/"  # the figures that must agree


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def start_ranks(recipe_file, run, *more, program=("-m", "mmrdpm", "train"), nodes=1, of_last=()):
    """Two ranks a node as torchrun starts them, without the launcher.

    of_last: what the environment of the last rank alone says.
    """
    size = 2 * nodes
    common = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = free_port()
    own = [{"RANK": str(r), "LOCAL_RANK": str(r % 2)} for r in range(size)]
    own[-1] |= dict(of_last)
    command = (*program, recipe_file, "--run", run, *more)
    return [start(*command, env={**common, **mine}) for mine in own]


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
