"""The scripts of docs/peers.md, on a folder that `mmrdpm bench peers` has made."""

import json
import runpy
import sys

import pytest
import yaml

from mmrdpm.cli import main

for package in ("diffusers", "transformers", "transfusion_pytorch", "matplotlib"):
    pytest.importorskip(package, reason="the extra `peers` is not installed")

SHAPE = {"layers": 2, "width": 32, "heads": 2, "ffn": 48, "batch_size": 4, "lrs": [0.01]}


@pytest.fixture
def recipe(tiny_tokenizers, tmp_path, pixel_features):
    path = tmp_path / "tiny.yaml"
    mapping = {
        "kind": "peers",
        "tokenizers": {t: str(tiny_tokenizers / t) for t in ("image", "text")},
        "budget": {"flops": 2e7, "points": 1},
        "equal": {"threads": 1},
        "judging": {"concepts": 5, "repeats": 1, "speed_batches": [2], "temperatures": [0.7]},
        "ours": {**SHAPE, "noise_pool": 1},
    }
    path.write_text(yaml.safe_dump(mapping))
    return path


def _status(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(f"scripts/{name}.py", run_name="__main__")
    return ended.value.code


def test_scripts_judge_as_the_command_does(recipe, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert main(["bench", "peers", str(recipe), "--out", str(out), "--only", "ours"]) == 0
    results = json.loads((out / "ours" / "results.json").read_text())
    capsys.readouterr()

    assert _status(monkeypatch, "peer_held_out", out, "ours") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    shared = ("steps", "guidance_scale", "temperature", "top1", "top10", "kid", "intervals")
    again = [{k: line[k] for k in shared} for line in lines if line["split"] == "train"]
    assert again == results["curve"][-1]["drawn"]
    assert len(lines) == 3 * len(again)  # of every group

    assert _status(monkeypatch, "peer_variety", out, "ours") == 0
    drawn = json.loads(capsys.readouterr().out)
    best = min(again, key=lambda way: (-way["top10"], way["kid"]))
    assert {key: drawn[key] for key in shared[:3]} == {key: best[key] for key in shared[:3]}
    low, high = drawn["interval"]
    assert low <= drawn["variety"] <= high and drawn["of_concepts"] > 0 and len(again) > 1

    own = [f"tokenizers.{kind}={out / 'tokenizers' / kind}" for kind in ("image", "text")]
    few = ["judging.concepts=5", "equal.threads=1", "equal.levels=2", "equal.tolerance=9"]
    few += ["ours.noise_pool=1"]  # as in the recipe above
    tokenizer = out / "tokenizers" / "image"
    assert _status(monkeypatch, "peer_ceilings", tokenizer, "scales", *own, *few) == 0
    ours, scales = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ours["psnr"] == pytest.approx(results["psnr"], abs=1e-4)
    assert scales["sides"] == [1, 2, 2] and scales["count"] == 5

    assert _status(monkeypatch, "peer_held_out", out, "flow") == 1
    assert "flow has no weights here" in capsys.readouterr().err


def test_the_table_at_a_glance_takes_what_names_most_then_the_lowest_distance(tmp_path):
    script = runpy.run_path("scripts/peers_at_a_glance.py")
    for row, (peer, _, _) in script["ROWS"].items():
        (tmp_path / row / peer).mkdir(parents=True)
        results = {"parameters": 6_380_000, "tokens_per_image": 96}
        (tmp_path / row / peer / "results.json").write_text(json.dumps(results))
        ways = [(1.0, 0.5, 0.03), (1.5, 0.6, 0.05), (2.0, 0.6, 0.04 if row == "flow" else 0.06)]
        lines = [
            {"split": split, "steps": 10, "guidance_scale": scale, "temperature": None}
            | {"top10": top10 - less, "top1": 0.25, "kid": kid + less}
            for split, less in (("train", 0), ("held_out_tone", 0.1))
            for scale, top10, kid in ways
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / row / "held-out.jsonl").write_text(text)
    _, _, first, *others = script["table"](tmp_path).splitlines()
    assert first == "| flow | 60.0% / 25.0% | 40 | 50.0%, 140 | 6.38M | 96, 10 |"
    assert len(others) == len(script["ROWS"]) - 1
    assert all("| 60.0% / 25.0% | 50 | 50.0%, 150 |" in line for line in others)
