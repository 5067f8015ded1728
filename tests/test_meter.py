"""The figures of a log, worked by hand, and a log that goes back."""

import json
import math

import pytest
import torch

from mmrdpm.engine import meter
from mmrdpm.engine.meter import Meter
from mmrdpm.monitor import Monitor
from mmrdpm.objective import Losses


def test_means_shares_and_rates_by_hand(monkeypatch):
    now = [10.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    found = Meter(2, torch.device("cpu"), peak=1000.0, weights=(5, 7, 11))
    found.start()
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0])
    made = Losses(losses.sum(), losses, torch.tensor([-1, 1, 2, 2]))
    found.add([made], torch.tensor([[0, 0, 0, -1]]), waited=1.0)
    assert found.done() == (3, 6 * (5 * 3 + 7 * 1 + 11 * 3))
    now[0] = 14.0
    logged, shown = found.figures()
    assert logged["loss/text"] == 1 and logged["loss/image"] == pytest.approx(14 / 3)
    assert (logged["loss/timestep_01"], logged["loss/timestep_02"]) == (2, 6)
    assert logged["tokens_per_second"] == 3 / 4 and logged["useful_tokens"] == 3 / 4
    assert logged["data_wait"] == 1 / 4
    assert logged["share_of_peak"] == pytest.approx(6 * (5 * 3 + 7 * 1 + 11 * 3) / 4 / 1000)
    assert shown["(t=2"] == "6.00" and shown["t=1"] == "2.00)"
    found.start()
    found.add([Losses(losses[0], losses[:1], torch.tensor([1]))], torch.tensor([[0]]), 0.0)
    now[0] = 15.0
    again, shown = found.figures()
    assert again["loss/image"] == 1 and "loss/text" not in again and "loss/timestep_02" not in again
    assert (shown["text"], shown["image"], shown["(t=2"], shown["t=1"]) == (
        "-",
        "1.000",
        "-",
        "1.00)",
    )


def test_a_monitor_that_goes_back_has_every_step_once(tmp_path):
    with Monitor(tmp_path, "title", total=9) as monitor:
        for step in (1, 2, 3, 4):
            monitor.record(step, {"loss": float(step)}, {})
        monitor.rewind(2)
        for step in (3, 4):
            monitor.record(step, {"loss": math.pi}, {})
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    assert [r["loss"] for r in records] == [1, 2, math.pi, math.pi]
