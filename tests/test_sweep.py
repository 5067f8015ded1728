"""Sweeps on tiny fixtures: what is trained, shared, resumed and refused."""

import json
import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from mmrdpm import recipe, shipped, text_tokenizer
from mmrdpm.cli import main, sweeping
from mmrdpm.errors import CheckpointError, RecipeError, UsageError
from mmrdpm.evaluation.figure import digest
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.sweep import plots, spec
from mmrdpm.sweep.records import Records
from mmrdpm.sweep.report import report, results_table
from mmrdpm.sweep.run import _BESIDE, count_flops, recipe_sha256, run_sweep
from mmrdpm.tokenizer_trainer import TokenizerTrainer
from mmrdpm.train_model import Trainer

FOLDERS = [shipped.folder("recipes") / name for name in ("ablations", "scaling")]
SWEEPS = sorted(path for folder in FOLDERS for path in folder.glob("*.yaml"))


@pytest.fixture
def tiny_sweep(tiny_recipe, tiny_tokenizers, tmp_path):
    """Writes the file of a sweep on the tiny fixtures, with changes."""
    shape = image_tokenizer.load(tiny_tokenizers / "image").config
    base = {
        "kind": "image",
        "tokenizer": recipe.to_dict(shape),
        "train": {
            "steps": 3,
            "decoder_share": 0,
            "codebook_batch": 32,
            "threads": 1,
            "autoencoder_from": str(tiny_tokenizers / "image"),
        },
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))

    def write(**changes):
        mapping = {
            "kind": "sweep",
            "model_recipe": str(tiny_recipe),
            "tokenizer_recipe": str(tmp_path / "base.yaml"),
            "tflops": 2e-4,
            "measures": {"names": 3, "batches": 1, "joint_steps": 1},
            "variants": [
                {"name": "base"},
                {"name": "guided", "sampling": ["guidance_scale=2", "guidance_schedule=rising"]},
                {"name": "eta", "tokenizer": ["tokenizer.trajectory=ancestral"]},
            ],
        }
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(mapping | changes))
        return path

    return write


def silent(line):
    pass


def unwritten(drawn, path):
    """In place of `plots.save`, which takes longer than all else."""


def test_a_sweep_trains_each_thing_once_and_goes_on_where_it_is(
    pixel_features, tiny_sweep, tiny_recipe, tmp_path, capsys, monkeypatch
):
    path, out = tiny_sweep(), tmp_path / "out"
    command = ["sweep", str(path), "--out", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(plots, "save", unwritten)
        assert main([*command, "--only", "base", "seeds=[7]"]) == 0
        assert [row["seed"] for row in Records(out / "results.jsonl").all()] == [7]
        (out / "results.jsonl").unlink()
        assert main([*command, "--only", "base"]) == 0
        assert len(Records(out / "results.jsonl").all()) == 1
    assert main(["sweep", str(path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith((out / "tiny.md").read_text() + f"\n{out / 'tiny.md'}\n")
    rows = Records(out / "results.jsonl").all()
    assert [row["variant"] for row in rows] == ["base", "guided", "eta"]
    runs = sorted(p.name for p in (out / "runs").iterdir())
    assert runs == ["base-seed0", "base-seed7", "eta-seed0"]
    assert sorted(p.name for p in (out / "tokenizers").iterdir()) == ["base", "eta"]
    base, guided, _ = rows
    assert base["loss_steps"] == guided["loss_steps"]  # the same weights
    assert base["steps"] == max(1, round(2e-4 / base["tflops_per_step"])) > 1
    assert base["information"] == pytest.approx(4 * sum(base["loss_steps"]))
    assert base["seconds"] > 0 and guided["seconds"] is None
    table = (out / "tiny.md").read_text()
    assert table.count("\n| base |") == 2 and table.count("\n| guided |") == 1
    for plot in ("variants", "quality", "steps", "tokenizers"):
        assert (out / f"tiny-{plot}.svg").read_text().startswith("<?xml")
    monkeypatch.setattr(plots, "save", unwritten)
    assert base["judge"]["evaluator"] == "pixels" and "pairs of one name" in base["judge"]["kernel"]
    others = report(replace(spec.load(path), seeds=(5,)), out)  # a sweep beside it in the folder
    assert "| guided |" not in others.read_text()

    before = (out / "results.jsonl").read_bytes()
    assert run_sweep(spec.load(path), out, None, silent)  # nothing is left to measure
    assert (out / "results.jsonl").read_bytes() == before
    of_before = re.sub(rb', "expected_steps": 0', b"", before)
    assert len(of_before) < len(before)
    (out / "results.jsonl").write_bytes(of_before)  # a line of a time that had no such key
    assert run_sweep(spec.load(path), out, None, silent)
    assert (out / "results.jsonl").read_bytes() == of_before
    with pytest.raises(CheckpointError, match=r"tflops=0\.0002, not 0\.5"):
        run_sweep(spec.load(tiny_sweep(tflops=0.5)), out, None, silent)

    mapping = yaml.safe_load(tiny_recipe.read_text())
    mapping["train"]["lr"] = 0.5
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(mapping))
    with pytest.raises(CheckpointError, match="measured with recipe_sha256="):
        run_sweep(
            spec.load(tiny_sweep(model_recipe=str(tmp_path / "other.yaml"))), out, None, silent
        )
    line = json.loads((out / "tokenizers.jsonl").read_text().splitlines()[0])
    old = json.dumps({**line, "autoencoder_from_sha256": "of another time"})
    (out / "tokenizers.jsonl").write_text(old + "\n")
    with pytest.raises(CheckpointError, match="stands on another"):
        run_sweep(spec.load(path), out, None, silent)
    (out / "tokenizers.jsonl").write_text(json.dumps({**line, "sha256": "of another fit"}) + "\n")
    with pytest.raises(CheckpointError, match="tokeniser base was measured with sha256=of another"):
        run_sweep(spec.load(path), out, None, silent)


def test_a_fit_that_was_stopped_goes_on_beside_lines_from_elsewhere(
    pixel_features, tiny_sweep, tmp_path, monkeypatch
):
    """Of a folder that holds nothing but another folder's lines, as the shipped ones."""
    path, lines = tiny_sweep(), "tokenizers.jsonl"
    first, out = tmp_path / "first", tmp_path / "out"
    assert main(["sweep", str(path), "--out", str(first), "--only", "base"]) == 0
    out.mkdir()
    for name in (lines, "results.jsonl"):
        shutil.copy(first / name, out / name)
    command = ["sweep", str(path), "--out", str(out), "--only", "base"]
    fit = TokenizerTrainer._fit_codebook

    def interrupting(self, generator):
        os.kill(os.getpid(), signal.SIGINT)
        return fit(self, generator)

    with monkeypatch.context() as patch:
        patch.setattr(TokenizerTrainer, "_fit_codebook", interrupting)
        assert main(command) == 130
    assert list((out / "tokenizers" / "base").glob("step-0000001.safetensors"))
    assert main(command) == 0
    assert image_tokenizer.load(out / "tokenizers" / "base")
    for name in (lines, "results.jsonl"):
        assert (out / name).read_bytes() == (first / name).read_bytes()


def test_a_stopped_sweep_goes_on(pixel_features, tiny_sweep, tmp_path, interrupted, capsys):
    """By a signal inside a run: 130, and the run goes on where it was."""
    path, out = tiny_sweep(tflops=1e-3), tmp_path / "out"
    command = ["sweep", str(path), "--out", str(out), "--only", "base"]
    with interrupted(Trainer, 5):
        assert main(command) == 130
    printed, messages = capsys.readouterr()
    assert printed == "" and messages.splitlines()[-1] == "stopped; the same command goes on"
    run = out / "runs" / "base-seed0"
    assert list(run.glob("step-0000005.safetensors")) and not (out / "results.jsonl").exists()
    assert main(command) == 0
    (line,) = Records(out / "results.jsonl").all()
    steps = [json.loads(text)["step"] for text in (run / "metrics.jsonl").read_text().splitlines()]
    assert line["steps"] > 5 and steps == sorted(set(steps)) and steps[-1] == line["steps"]
    assert line["seconds"] is None  # it was stopped in between


def test_ctrl_c_while_measuring_says_how_to_go_on(tiny_sweep, tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sweeping.Measurer, "protocol", {})
    monkeypatch.setattr(sweeping, "run_sweep", stopped)
    assert main(["sweep", str(tiny_sweep()), "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "stopped; the same command goes on\n"


def test_flops_are_those_of_the_products(tiny_recipe):
    """Twice the width of the feed-forward adds its products: 6 per weight and token."""
    base = recipe.load(ModelRecipe, tiny_recipe)
    wider = recipe.load(ModelRecipe, tiny_recipe, ["model.ffn=96"])
    (few, small), (many, large) = count_flops(base), count_flops(wider)
    assert many - few == 6 * (large - small) * 2 * 96


def test_records_survive_a_torn_line(tmp_path):
    records = Records(tmp_path / "r.jsonl")
    records.append({"a": 1})
    with open(records.path, "a") as file:
        file.write('{"a": 2, "b"')
    assert records.all() == [{"a": 1}]
    records.append({"a": 3})
    assert [r["a"] for r in records.all()] == [1, 3] and records.find(a=3)
    records.path.write_text("[\n")
    with pytest.raises(CheckpointError, match=r"r\.jsonl:1: not a JSON object"):
        records.all()


def test_the_table_has_mean_and_spread_over_seeds():
    rows = [{"variant": "a", "top10": share, "seconds": None} for share in (0.1, 0.3)]
    first, _, line = results_table(["b", "a"], rows).splitlines()
    assert first == "| variant | seeds | named in top 10 |"
    assert line == "| a | 2 | 20.0% ± 14.1% |"


def drawn(sweep, out, **changes):
    """The plots, by name, of two variants that differ in no more than their pictures' distance."""
    for name, kid in (("base", 0.1), ("base", 0.3), ("guided", 0.5)):
        figures = {"top10": 0.25, "kid": kid, "information": 700.0, "loss_steps": [4.0, 3.0]}
        Records(out / "results.jsonl").append({"variant": name, "seed": 0, **figures, **changes})
    report(sweep, out)
    return {path.stem: path.read_bytes() for path in out.glob("*.svg")}


def test_the_lines_in_docs_are_of_the_recipes_as_they_are():
    """What has been measured counts: a sweep in a folder with these lines goes on from them."""
    measured = Path(__file__).parent.parent / "docs/measured"
    lines = [
        x for n in ("", "-avx2") for x in Records(measured / f"ablations{n}/results.jsonl").all()
    ]
    seen = set()
    for path in sorted(shipped.folder("recipes").glob("ablations/*.yaml")):
        if yaml.safe_load(path.read_text())["kind"] != "sweep":
            continue
        sweep = spec.load(path)
        for variant in sweep.variants if sweep.model_recipe else ():
            sha256 = recipe_sha256(spec.model_recipe(sweep, variant, steps=1, seed=0))
            own = [line for line in lines if line["variant"] == variant.name]
            assert {line["recipe_sha256"] for line in own} <= {sha256}, variant.name
            seen |= {line["variant"] for line in own}
    assert seen == {line["variant"] for line in lines}


def test_what_came_later_is_of_a_recipe_only_where_it_is_set(tiny_recipe):
    def of(*overrides):
        return recipe_sha256(recipe.load(ModelRecipe, tiny_recipe, overrides))

    hub = "data.sources={pages: {type: huggingface, path: who/texts, revision: %s}}"
    assert len({of(), of("train.codes_apart=false"), of(hub % "v1"), of(hub % "''")}) == 4
    loaded = recipe.load(ModelRecipe, tiny_recipe, [hub % "''", "train.codes_apart=false"])
    before = {k: v for k, v in recipe.to_dict(loaded).items() if k not in _BESIDE}
    before["text"] = text_tokenizer.load(Path(loaded.tokenizers.text)).fingerprint()
    del before["train"]["codes_apart"], before["data"]["sources"]["pages"]["revision"]
    assert digest(before) == recipe_sha256(loaded)


def test_a_line_is_of_one_text_tokeniser(tiny_recipe, tiny_tokenizers, tmp_path):
    """By content: another one in the same folder makes another model of the same recipe."""
    folder = tmp_path / "text"
    shutil.copytree(tiny_tokenizers / "text", folder)
    loaded = recipe.load(ModelRecipe, tiny_recipe, [f"tokenizers.text={folder}"])
    before = recipe_sha256(loaded)
    shutil.copy(shipped.folder("tokenizers") / "emoji-bpe-4k/tokenizer.json", folder)
    assert recipe_sha256(loaded) != before


def test_a_table_refuses_lines_of_different_judges(tiny_sweep, tmp_path):
    sweep, out = spec.load(tiny_sweep()), tmp_path / "out"
    for name, sha256 in (("eta", None), ("base", "a" * 64), ("guided", "b" * 64)):
        judge = {"judge": {"evaluator_sha256": sha256}} if sha256 else {}
        Records(out / "results.jsonl").append({"variant": name, "seed": 0, "kid": 0.1, **judge})
    said = r"of guided, seed 0 was judged otherwise, .* \(aaaaaaaa, bbbbbbbb\): name another folder"
    with pytest.raises(CheckpointError, match=said):
        report(sweep, out)
    report(replace(sweep, variants=sweep.variants[:1]), out)


def test_of_an_odd_number_of_steps_the_first_half_is_the_larger():
    assert plots.first_half([3.0, 2.0, 1.0]) == pytest.approx(5 / 6)
    assert plots.first_half([3.0, 1.0]) == pytest.approx(3 / 4)


def test_the_table_of_what_is_there_needs_no_training(tiny_sweep, tmp_path, capsys):
    """Nor tokenisers of the same bits, which a line from another machine does not have."""
    out = tmp_path / "out"
    command = ["sweep", str(tiny_sweep()), "--out", str(out), "--table"]
    assert main(command) == 1
    assert "holds no lines of tiny: name a folder" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save", unwritten)
        drawn(spec.load(tiny_sweep()), out, tokenizer_sha256="of another machine")
        held = (out / "results.jsonl").read_bytes()
        assert main(command) == 0
    assert "| base | 2 | 25.0% ± 0.0% |" in capsys.readouterr().out
    assert (out / "results.jsonl").read_bytes() == held
    assert {path.name for path in out.iterdir()} == {"results.jsonl", "tiny.md"}


def test_a_plot_shows_what_variants_differ_in(tiny_sweep, tmp_path):
    """Drawn by the same weights they hold the same information: nothing to draw over it."""
    pytest.importorskip("matplotlib")
    sweep = spec.load(tiny_sweep())
    found = drawn(sweep, tmp_path / "out")
    assert list(found) == ["tiny-variants"] and found == drawn(sweep, tmp_path / "again")
    picture = found["tiny-variants"].decode()
    assert "<!-- guided -->" in picture and "<!-- eta -->" not in picture
    assert "<!-- KID" in picture and "<!-- named in top 10 -->" not in picture
    assert "DejaVuSans-Bold" in picture  # the base
    without = replace(sweep, variants=sweep.variants[1:])
    assert without.base is None and drawn(without, tmp_path / "one") == {}  # nothing to differ from
    report(without, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.svg"))  # an earlier plot would show other lines


def test_names_of_dots_in_one_place_do_not_cover_each_other():
    text = pytest.importorskip("matplotlib.text")
    figure, (axis,) = plots.figure(1)
    plots._write_names(figure, axis, dict.fromkeys(("guided", "groups", "base"), (0.5, 0.5)))
    figure.draw_without_rendering()
    boxes = [text.Text.get_window_extent(name) for name in axis.texts]
    assert len(boxes) == 3
    assert not any(a.overlaps(b) for a in boxes for b in boxes if a is not b)


PER_STEP = {
    "tokenizer": ["tokenizer.per_step_codebook=true"],
    "model": ["model.preconditioning=true", "model.code_geometry=true"],
}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"variants": [{"name": "a"}, {"name": "a"}]}, "'a' comes twice"),
        ({"variants": [{"name": "../a"}]}, "a name has a-z"),
        ({"variants": []}, "needs variants"),
        ({"variants": [{"name": "a", "model": ["model.histroy=true"]}]}, "variant a.*history"),
        ({"variants": [{"name": "a", "sampling": ["guidance=1"]}]}, "variant a.*guidance"),
        ({"variants": [{"name": "a", "tokenizer": ["tokenizer.eta=2"]}]}, "at most 1.0"),
        ({"variants": [{"name": "a", **PER_STEP}]}, "variant a: model.preconditioning: the image"),
        ({"tokenizer_recipe": None, "variants": [{"name": "a", "tokenizer": ["x=1"]}]}, "set tok"),
        ({"tflop": 3}, "did you mean tflops"),
        ({"tflops": 0}, "tflops is 0"),
        ({"chart": "lr"}, "needs model.width and train.lr"),
        ({"seeds": [-1]}, r"seeds\[0\] is -1"),
        ({"seeds": [10**22]}, "at most"),
        ({"measures": {"seed": 10**22}}, "measures.seed"),
        ({"name": "../../evil"}, "'../../evil': files are called so"),
        ({"name": ".."}, "files are called so"),
        ({"variants": [{"name": "a", "model": ["train.steps=9"]}]}, "a: train.steps is set by"),
        ({"variants": [{"name": "a", "model": ["train={seed: 9}"]}]}, "a: train.seed is set by"),
        ({"variants": [{"name": "a", "model": ["tokenizers.image=x"]}]}, "use its key tokenizer"),
        ({"variants": [{"name": "a", "model": ["tokenizers.text=nix"]}]}, "a: nix: no such path"),
        ({"variants": [{"name": "a", "model": ["data.steps_per_image=9"]}]}, "has only 3 timest"),
        (
            {
                "tokenizer_recipe": None,
                "variants": [{"name": "a", "model": ["data.steps_per_image=9"]}],
            },
            "has only 3 timest",
        ),
    ],
)
def test_mistakes_show_before_anything_is_trained(changes, says, tiny_sweep):
    with pytest.raises(RecipeError, match=says):
        spec.load(tiny_sweep(**changes))


def test_an_unknown_variant_is_refused(tiny_sweep, tmp_path):
    with pytest.raises(UsageError, match="no such variant: choose one of base, guided, eta"):
        run_sweep(spec.load(tiny_sweep()), tmp_path / "out", None, silent, only="bsae")


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_shipped_sweep_fits_its_schema(path):
    header = path.read_text().split("kind:")[0]
    assert f"recipes/{path.parent.name}/{path.name}" in header and "Hardware:" in header
    if recipe.read(path)["kind"] == "sweep":
        sweep = spec.load(path)
        for variant in sweep.variants:
            if sweep.tokenizer_recipe:
                loaded = spec.tokenizer_recipe(sweep, variant)
                image_tokenizer.ImageTokenizer(loaded.tokenizer)  # its parts fit together


def test_records_are_json_lines(tmp_path):
    records = Records(tmp_path / "deep" / "r.jsonl")
    records.append({"name": "é"})
    assert json.loads(records.path.read_text()) == {"name": "é"}
