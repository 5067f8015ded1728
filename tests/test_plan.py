import importlib
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from mmrdpm import dry_run, machine, plan, recipe
from mmrdpm.api import build
from mmrdpm.cli import main
from mmrdpm.data.plan import DataPlan
from mmrdpm.errors import UsageError
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.plan import lines, make_plan
from mmrdpm.tally import Tally
from mmrdpm.train_model import Trainer

MIDDLE = ["model.layers=4", "model.width=256", "model.heads=4", "model.kv_heads=2", "model.ffn=512"]


@pytest.fixture(autouse=True)
def known_rate(monkeypatch):
    """FLOP/s of this machine, which half a second would measure for every plan."""
    monkeypatch.setattr(machine, "measured_rate", lambda *_, **__: 1e11)


def load(path, *overrides):
    return recipe.load(ModelRecipe, path, overrides)


def test_the_parameters_are_exact(tiny_recipe, tmp_path):
    planned = make_plan(load(tiny_recipe), 1, "cpu")
    real = Trainer(load(tiny_recipe), tmp_path).transformer
    assert planned.parameters == sum(p.numel() for p in real.parameters())
    assert planned.memory["weights"] == 4 * planned.parameters
    assert planned.tokens_per_image == 3 * 4


@pytest.mark.slow
def test_the_script_beside_runs_plans_and_trains_the_same(tiny_recipe, monkeypatch):
    """Each in a process of its own, whose memory is that of the program and little else."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "scripts")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of those processes
    script = importlib.import_module("plan_against_measured")
    one, other = (
        script.apart(work, str(tiny_recipe), ["train.precision=fp32"])
        for work in (script.planned, script.trained)
    )
    assert one[0] > 0 and other[0] > 0
    assert 1 / 2 < one[1] / other[1] < 2


@pytest.mark.slow
def test_the_peak_of_a_run_is_planned_within_15_percent(tiny_recipe, tmp_path):
    """A model whose update takes several times what the program itself holds."""
    mapping = yaml.safe_load(tiny_recipe.read_text())
    mapping["data"] |= {"rows": 48, "seq_len": 256}
    mapping["train"] |= {"steps": 2, "precision": "fp32"}
    path = tmp_path / "middle.yaml"
    path.write_text(yaml.safe_dump(mapping))
    planned = make_plan(load(path, *MIDDLE), 1, "cpu")
    assert planned.peak > 2 * planned.memory["program"]
    command = [sys.executable, "-m", "mmrdpm", "train", str(path), "--run", str(tmp_path / "run")]
    process = subprocess.Popen([*command, *MIDDLE], stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert planned.peak == pytest.approx(usage.ru_maxrss * 1024, rel=0.15)


def test_the_tally_counts_one_product_and_what_lives_at_once():
    with Tally() as tally:
        a, b = torch.ones(10, 20), torch.ones(20, 30)
        c = (a @ b).sum()
        del a, b
    assert tally.flops == 2 * 10 * 20 * 30
    assert tally.peak >= 4 * (10 * 20 + 20 * 30 + 10 * 30)
    assert tally.live == c.numel() * 4


def test_operations_count_alike_with_memory_and_without():
    """Torch asks a tensor without memory for its device, time and again, as for an operation."""
    tallies = []
    for mode in (nullcontext(), FakeTensorMode()):
        with mode, Tally() as tally:
            x = torch.ones(10, 20, requires_grad=True)
            torch.nn.functional.rms_norm(x @ x.T, (10,)).sum().backward()
        tallies.append((tally.calls, tally.moved, tally.flops))
    assert tallies[0] == tallies[1]


def test_what_dies_views_and_what_is_there_already_take_nothing():
    there = torch.zeros(5000)

    def one_by_one():
        for _ in range(3):
            torch.zeros(1000)

    def together():
        kept = [torch.zeros(1000) for _ in range(3)]
        kept[0].add_(1)
        there.t().add_(1)
        return kept[1][5:]

    for work, peak in ((one_by_one, 4000), (together, 12_000)):
        with Tally() as tally:
            work()
        assert tally.peak == peak


def test_parts_of_a_batch_and_recomputing_need_less(tiny_recipe):
    size = ["data.rows=8", "data.seq_len=256", "model.layers=6"]
    whole, parts, again, sharded = (
        make_plan(load(tiny_recipe, *size, *more), gpus, "h100")
        for gpus, more in (
            (1, []),
            (1, ["train.micro_batch_size=2"]),
            (1, ["train.recompute=true"]),
            (2, ["train.parallel=fsdp"]),
        )
    )
    assert parts.memory["activations"] < whole.memory["activations"] / 2
    assert again.memory["activations"] < whole.memory["activations"] / 2
    assert parts.flops == pytest.approx(whole.flops, rel=0.01)
    assert again.flops > 1.2 * whole.flops
    assert sharded.memory["weights"] == whole.memory["weights"] / 2
    assert "sharded" in next(lines(sharded))


def test_what_does_not_fit_is_said_without_allocating_it(tiny_recipe, capsys):
    huge = ["model.layers=40", "model.width=8192", "model.heads=64", "model.ffn=22016"]
    status = main(["plan", str(tiny_recipe), "--kind", "h100", *huge])
    said = capsys.readouterr().out
    assert status == 1 and "WARNING: it does not fit" in said
    assert main(["plan", str(tiny_recipe), "--kind", "a100"]) == 0
    assert "hours" in capsys.readouterr().out


def test_processes_on_the_cpu_share_the_main_memory(tiny_recipe, monkeypatch):
    loaded = load(tiny_recipe, "data.rows=12")
    one = make_plan(loaded, 1, "cpu").peak
    monkeypatch.setattr(machine, "main_memory", lambda: 2.5 * one)
    assert make_plan(loaded, 1, "cpu").fits
    many = make_plan(loaded, 12, "cpu")
    assert many.peak < many.room < 12 * many.peak and not many.fits
    said = list(lines(many))
    assert any(line.startswith("  all 12 on a machine") and "of" in line for line in said)
    assert any(line.endswith("or use fewer processes") for line in said)


def test_a_gpu_waits_for_the_host_where_there_is_little_to_do(tiny_recipe):
    """A width twice as large needs as many operations; fusing them pays only where bytes count."""

    def seconds(*overrides):
        return make_plan(load(tiny_recipe, *overrides), 1, "h100").seconds

    width = ["model.width=64", "model.ffn=96"]
    assert seconds() == seconds(*width) == seconds("train.compile=false")
    large = ["model.width=2048", "model.heads=16", "data.rows=64", "data.seq_len=512"]
    assert seconds(*large) < 0.8 * seconds(*large, "train.compile=false")
    assert seconds(*large, "train.precision=fp32") > 2 * seconds(*large)  # products take 15 times


def test_bfloat16_that_a_cpu_would_emulate_is_warned_of(tiny_recipe, monkeypatch):
    def warned(kind, precision, has):
        monkeypatch.setattr(machine, "has_bfloat16", lambda _: has)
        said = lines(make_plan(load(tiny_recipe, f"train.precision={precision}"), 1, kind))
        return any("no bfloat16 arithmetic" in line and "fp32 is faster" in line for line in said)

    assert warned("cpu", "bf16", False)
    assert not warned("cpu", "bf16", True) and not warned("cpu", "auto", False)
    assert not warned("h100", "bf16", False)  # of another machine


def test_rows_that_cannot_be_shared_are_refused(tiny_recipe):
    with pytest.raises(UsageError, match=r"data\.rows is 2, no multiple of 3"):
        make_plan(load(tiny_recipe), 3, "h100")


def test_doctor_looks_at_the_machine_and_at_a_recipe(tiny_recipe, capsys):
    assert main(["doctor", str(tiny_recipe)]) == 0
    said = capsys.readouterr().out
    for name in ("torch", "precision", "memory", "disk", "attention", "data", "needs"):
        assert f"  {name} " in said
    if not torch.cuda.is_available():
        assert "xformers: not here: it needs CUDA" in said
    assert main(["doctor", str(tiny_recipe), "data.steps_per_image=9"]) == 1
    assert "! recipe" in capsys.readouterr().out


def test_doctor_tells_what_is_broken_in_the_first_batch(tiny_recipe, tmp_path, capsys):
    lines = ['{"text": "%s"}' % ("word " * 15)] * 5 + ['{"no": 1}', "{"] * 2
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    mapping = yaml.safe_load(tiny_recipe.read_text())
    mapping["data"] |= {"sources": {"t": {"type": "text", "path": str(tmp_path / "t.jsonl")}}}
    mapping["data"]["max_caption_tokens"] = 16
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(mapping))
    assert main(["doctor", str(path)]) == 1
    said = capsys.readouterr().out
    assert re.search(r"! broken +\d+ of \d+ records read for it: t: no text", said)
    assert "more than data.max_broken_share 0.05" in said
    assert main(["doctor", str(path), "data.max_broken_share=0.9"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"  broken +\d+ of \d+ records read for it: t: not valid JSON", said)
    assert "max_broken_share" not in said


def test_doctor_looks_at_the_recipe_of_an_image_tokeniser(image_recipe_file, tmp_path, capsys):
    def told(*overrides, status):
        assert main(["doctor", str(image_recipe_file), *overrides]) == status
        return capsys.readouterr().out

    said = told(status=0)
    assert f"  recipe       {image_recipe_file}: fits its schema" in said
    assert re.search(r"  tokenizer +autoencoder of .*M parameters, p 100.0% of 9 records", said)
    assert re.search(r"  data +the first batch is there, 4 pictures of 16x16", said)
    assert re.search(r"  needs +0\.00 GB for checkpoints", said) and "broken " not in said
    assert re.search(r"  data +the first batch is there", told("data={}", status=0))
    assert "! recipe       train.codebook_batch is 9" in told("train.codebook_batch=9", status=1)
    nowhere = "data.sources.p.path=/nowhere/at/all"
    assert "! recipe       /nowhere/at/all: no such folder" in told(nowhere, status=1)
    (tmp_path / "pictures" / "0.png").write_bytes(b"no picture")
    whole_epoch = ("train.batch_size=9", "train.codebook_batch=9")
    said = told(*whole_epoch, "data.max_broken_share=0.9", status=0)
    assert re.search(r"  broken +\d of \d+ records read for it: p: not a picture", said)
    assert "! broken" in told(*whole_epoch, status=1)


def test_a_plan_of_a_tokeniser_says_what_is_planned_in_its_place(image_recipe_file, capsys):
    assert main(["plan", str(image_recipe_file)]) == 1
    said = capsys.readouterr().err
    assert "kind is 'image', not 'model': plans are made of models" in said
    assert "tokenizers.image=RECIPE.yaml" in said and said.count("\n") == 1
    assert main(["plan", "imagenet256_b", "tokenizers.image=emoji_bpe_4k.yaml"]) == 1
    assert "is of kind 'text', not 'image'" in capsys.readouterr().err


def test_a_shard_holds_no_whole_gradient_but_the_embeddings(tiny_recipe):
    """So few tokens that a copied model's update needs its gradients at once, and little else."""
    size = ["data.rows=2", "data.seq_len=16", "model.width=512", "model.heads=8", "model.ffn=1024"]
    copied, sharded = (
        make_plan(load(tiny_recipe, *size, f"train.parallel={mode}"), 2, "h100")
        for mode in ("ddp", "fsdp")
    )
    inside = sum(
        p.numel()
        for name, p in bare(load(tiny_recipe, *size)).named_parameters()
        if name.startswith(("attentions.", "feed_forwards."))
    )
    assert sharded.memory["gathered"] == 4 * (copied.parameters - inside)
    assert copied.memory["gathered"] == 0
    base = copied.memory["program"]
    assert copied.peak - base > copied.memory["optimiser"] + 2 * copied.memory["weights"]
    held = sharded.memory["optimiser"] + 2 * sharded.memory["weights"]
    assert sharded.peak - base - held - sharded.memory["gathered"] < copied.memory["weights"] / 2


@pytest.mark.parametrize(
    ("gpus", "more", "expected"),
    [  # of P parameters, S in the stack, M in Muon's matrices: in float32 but for bfloat16's 2
        (1, ["train.parallel=ddp"], lambda p, s, m: 0),
        (4, ["train.parallel=ddp"], lambda p, s, m: 2 * 3 / 4 * 4 * p + 3 / 4 * 2 * m),
        (4, ["train.parallel=ddp", "optimizer.name=adamw"], lambda p, s, m: 6 * p),
        (
            4,
            ["train.parallel=fsdp", "optimizer.name=adamw"],
            lambda p, s, m: 3 / 4 * (2 * 2 * s + 4 * (p - s) + 4 * p),
        ),
        (
            4,
            ["train.parallel=fsdp", "train.micro_batch_size=3"],  # of eight rows: three passes
            lambda p, s, m: 3 * 3 / 4 * (2 * 2 * s + 4 * (p - s) + 4 * p) + 3 / 4 * (4 + 2) * m,
        ),
        (
            16,
            ["train.parallel=hybrid", "optimizer.name=adamw"],  # two nodes add up eighths
            lambda p, s, m: 7 / 8 * (2 * 2 * s + 4 * (p - s) + 4 * p) + 2 * 1 / 2 * 4 * p / 8,
        ),
    ],
)
def test_the_exchange_between_gpus_by_hand(gpus, more, expected, tiny_recipe):
    loaded = load(tiny_recipe, "data.rows=32", *more)
    by_name = {name: p.numel() for name, p in bare(loaded).named_parameters()}
    inside = [n for name, n in by_name.items() if name.startswith(("attentions.", "feed_forwards"))]
    matrices = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)  # q, o; k, v of one head; three of ffn
    made = make_plan(loaded, gpus, "h100")
    bytes_ = expected(sum(by_name.values()), sum(inside), matrices)
    assert made.exchanged == pytest.approx(bytes_)
    said = [line for line in lines(made) if line.startswith("exchange")]
    assert len(said) == (gpus > 1)
    assert all(f"{bytes_ / 50e9:.3g} s at 50 GB/s if nothing overlaps" in line for line in said)


def bare(loaded):
    images, vocabulary = plan._tokenizers(loaded)
    with torch.device("meta"):
        return build(loaded.model, vocabulary, images)


def test_the_operations_of_attention_are_counted(tiny_recipe):
    """Rows of 32 positions as two documents of 16, or as one of 24 and one of 8."""
    # all among all, so that targets of both kinds cost alike
    one_row = ("data.rows=1", "data.seq_len=32", "train.codes_apart=false")
    short, long = (
        make_plan(load(tiny_recipe, *one_row, f"data.steps_per_image={steps}"), 1, "h100")
        for steps in (1, 3)
    )
    pairs = 24**2 + 8**2 - 2 * 16**2
    assert long.flops - short.flops == 7 * 2 * pairs * 32 * 2  # products, width, layers


def test_a_container_without_a_limit_has_the_memory_of_its_machine(tmp_path, monkeypatch):
    for name, text in (("memory.max", "max\n"), ("meminfo", "MemTotal:  2048 kB\n")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / path.rsplit("/", 1)[-1])
    assert machine.main_memory() == 2048 * 1024
    (tmp_path / "memory.max").write_text("4096\n")
    assert machine.main_memory() == 4096


def test_compiled_layers_hold_what_goes_into_products_and_comes_out(tiny_recipe):
    """Per position and layer neither the copy of q and k that is normalised nor silu's output."""
    size = ["data.rows=8", "data.seq_len=512", "model.width=256", "model.heads=4", "model.ffn=512"]
    compiled, plain = (
        make_plan(load(tiny_recipe, *size, f"train.compile={on}"), 1, "h100")
        for on in ("true", "false")
    )
    spared = 8 * 512 * 2 * (4 * (256 + 128) + 2 * 512)  # positions, layers; float32, bfloat16
    assert plain.peak - compiled.peak == pytest.approx(spared, rel=0.05)
    assert compiled.flops == plain.flops


def test_a_row_of_drawings_alone_ends_in_padding_that_has_no_target():
    data = DataPlan(image_share=1.0, caption_share=0.0, steps_per_image=4, seq_len=256)
    mixed = DataPlan(image_share=0.9, caption_share=0.1, steps_per_image=4, seq_len=256)
    lengths = dry_run.documents(data, 16)
    assert lengths == [76, 76, 76, 28] == dry_run.documents(mixed, 16)
    assert dry_run.targets(data, lengths) == 3 * 75
    assert dry_run.targets(mixed, lengths) == 3 * 75 + 27
