"""What an evaluation keeps: seeds of its own for every picture, and nothing old for new."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmrdpm.api import Model
from mmrdpm.cli import main
from mmrdpm.data.emoji import concept_of, load_emoji
from mmrdpm.errors import DataError
from mmrdpm.evaluation import drawn, emoji, likelihood, results, store
from mmrdpm.evaluation.figure import Figure
from mmrdpm.evaluation.store import Store, picture_seeds

PROMPTS = [f"prompt {i}" for i in range(40)]
ONE_GROUP = ("names=3", "groups=[training concepts]")


@pytest.fixture
def evaluate(monkeypatch, tmp_path, pixel_features, capsys):
    """Runs the suite emoji over a model, in an empty folder; gives the status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(emoji, "EfficientNetLite0", drawn.EfficientNetLite0)

    def run(model, *overrides):
        command = ["eval", str(model), "--suite", "emoji", "--out", "out", *ONE_GROUP, *overrides]
        return main(command)

    return run


def test_every_picture_of_a_set_has_its_own_seed_stopped_or_not(tmp_path):
    white = Image.new("RGB", (4, 4), "white")

    def drawn(folder, seed, stop_after=99):
        found = {}

        def draw(prompts, seeds):
            if len(found) > stop_after:
                raise KeyboardInterrupt
            found.update(zip(prompts, seeds, strict=True))
            return [white] * len(prompts)

        try:
            Store(tmp_path / folder, "model").draw("drawing", PROMPTS, seed, {}, draw)
        except KeyboardInterrupt:
            assert 0 < len(found) < len(PROMPTS)
        return found

    whole = drawn("a", 0)
    assert list(whole) == PROMPTS and len(set(whole.values())) == len(PROMPTS)
    assert drawn("b", 0, stop_after=1) | drawn("b", 0) == whole
    assert not set(drawn("c", 1).values()) & set(whole.values())
    assert max(picture_seeds(7, 1000)) < 2**32


def test_a_concept_is_the_name_without_its_skin_tones():
    data = load_emoji(16)
    assert [concept_of(name) for name in data.names] == data.concepts
    assert concept_of("waving hand medium-light skin tone") == "waving hand"
    assert concept_of("kiss person person light skin tone dark skin tone") == "kiss person person"


def test_another_decoder_is_never_judged_by_old_figures(evaluate, tiny_run):
    shutil.copytree(tiny_run, "run")
    assert evaluate("run", "metrics=[named]") == 0
    pictures, parts = (set(Path("out", kind).iterdir()) for kind in ("pictures", "parts"))
    path = Path("run/tokenizers/image/tokenizer.safetensors")
    tensors = load_file(path)
    changed = {k: v for k, v in tensors.items() if k.startswith("autoencoder.decoder")}
    assert changed
    save_file(tensors | {k: v / 2 for k, v in changed.items()}, path)
    assert evaluate("run", "metrics=[named]") == 0
    assert set(Path("out/pictures").iterdir()) > pictures
    assert set(Path("out/parts").iterdir()) > parts


def test_what_a_stopped_evaluation_did_not_reach_is_said(evaluate, tiny_run, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    assert evaluate(tiny_run, "metrics=[named]") == 0 and Path("out/report.html").is_file()
    monkeypatch.setattr(likelihood, "loss_per_timestep", stopped)
    assert evaluate(tiny_run, "metrics=[named, loss_per_timestep]") == 130
    (left,) = json.loads(Path("out/results.json").read_text())["not_computed"]
    assert left == {"part": "loss_per_timestep, training concepts", "why": "stopped before it"}
    assert not Path("out/report.html").exists()  # it showed other results


@pytest.mark.parametrize(
    ("scales", "said"),
    [
        ("[]", "name at least one"),
        ("[-1, 2]", "guidance_scales[0] is -1.0: it must be at least 0.0 and at most 1000.0"),
        ("[1, 5000]", "guidance_scales[1] is 5000.0: it must be at least 0.0 and at most 1000.0"),
    ],
)
def test_guidance_scales_that_cannot_be_drawn_are_refused(scales, said, evaluate, tiny_run, capsys):
    assert evaluate(tiny_run, f"guidance_scales={scales}") == 1
    assert said in capsys.readouterr().err
    assert not Path("out").exists()


def test_figures_of_a_perfect_model_and_of_one_that_knows_no_skin_tones(
    evaluate, tiny_run, monkeypatch
):
    data = load_emoji(16)
    shown = {
        name: Image.fromarray(picture)
        for name, picture in zip(data.names, data.images, strict=True)
    }
    names = {shown[name].tobytes(): name for name in data.names}
    monkeypatch.setattr(
        Model, "generate", lambda _, prompts, *__, **___: [shown[p] for p in prompts]
    )
    wanted = ("groups=[held-out skin tones]", "metrics=[named, tone, caption_exact]", "names=20")
    found = {}
    for kind, said in (("perfect", str), ("toneless", concept_of)):
        monkeypatch.setattr(
            Model,
            "caption",
            lambda _, pictures, said=said: [said(names[p.tobytes()]) for p in pictures],
        )
        monkeypatch.setattr(store, "_FORMAT", kind)  # nothing is kept for the other
        assert evaluate(tiny_run, *wanted) == 0
        figures = json.loads(Path("out/results.json").read_text())["figures"]
        found[kind] = {f["name"].split("/")[-1]: f["value"] for f in figures}
    assert (
        found["perfect"]["caption is the name"]
        == found["perfect"]["caption names the concept"]
        == 1
    )
    assert found["toneless"]["caption is the name"] == 0
    assert found["toneless"]["caption names the concept"] == 1
    assert found["perfect"]["named skin tone is the nearest"] > 0.9


@pytest.mark.parametrize(
    ("scores", "expected"),  # pictures by texts
    [([[2, 1], [3, 4]], [1.0, 0.5]), ([[4, 3], [4, 3]], [0.5, 1.0])],
    ids=["apart", "of the same picture"],
)
def test_the_right_one_is_the_likeliest_in_its_row_or_column(scores, expected, monkeypatch):
    monkeypatch.setattr(likelihood, "score_matrix", lambda *_: torch.tensor(scores).double())
    found = likelihood.retrieval(None, [Image.new("RGB", (4, 4))] * 2, ["a", "b"])
    names = ("image to text, top 1", "text to image, top 1")
    assert {f.name: f.value for f in found} == dict(zip(names, expected, strict=True))


@pytest.mark.parametrize(
    "content", ["{}", "[]", '{"content": 3}', '{"content": [{}]}', '{"content": [7]}']
)
def test_a_damaged_part_is_one_line_that_names_it(content, tmp_path):
    kept = Store(tmp_path, "model")
    figure = Figure("a/b/c", 1.0, (0.5, 1.5), "", 3)
    assert kept.figures("part", 1, lambda: [figure]) == [figure]
    (path,) = (tmp_path / "parts").iterdir()
    path.write_text(content)
    with pytest.raises(DataError, match=rf"{path.name}: .*: remove it, and it is made anew"):
        kept.figures("part", 1, lambda: [figure])


@pytest.mark.parametrize(
    ("key", "value"),
    [("value", None), ("value", "1"), ("interval", [0, None]), ("count", "3"), ("protocol", 3)],
)
def test_a_damaged_figure_is_named(key, value, tmp_path, capsys):
    figure = Figure("a/b/c", 1.0, (0.5, 1.5), "", 3)
    results.Results("suite", {}, "model", "hash", [figure], []).save(tmp_path)
    path = tmp_path / "results.json"
    mapping = json.loads(path.read_text())
    assert main(["eval", "compare", str(tmp_path), str(path)]) == 0
    mapping["figures"][0][key] = value
    path.write_text(json.dumps(mapping))
    capsys.readouterr()
    assert main(["eval", "compare", str(tmp_path), str(path)]) == 1
    message = capsys.readouterr().err
    assert f"{path}: figure 'a/b/c': its {key} is " in message and message.count("\n") == 1


@pytest.mark.parametrize("kept", [3, ["a"], ["a", 5]])
def test_kept_texts_that_are_none_are_named(kept, tmp_path):
    kept_in = Store(tmp_path, "model")
    assert kept_in.texts("captions", "x", 2, lambda: ["a", "b"]) == ["a", "b"]
    (path,) = (tmp_path / "parts").iterdir()
    path.write_text(json.dumps({"part": "captions", "content": kept}))
    with pytest.raises(DataError, match=f"{path.name}: is not 2 texts: remove it"):
        kept_in.texts("captions", "x", 2, lambda: ["c", "d"])
