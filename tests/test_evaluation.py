"""Suites over a tiny model: figures, resuming, comparing, and answers to mistakes."""

import copy
import json
import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mmrdpm
from mmrdpm import shipped
from mmrdpm.api import Model
from mmrdpm.cli import main
from mmrdpm.data import emoji as emoji_data
from mmrdpm.errors import DataError, UsageError
from mmrdpm.evaluation import captioned, drawn, emoji, likelihood, report, results, tokenizer
from mmrdpm.evaluation.compare import compare, differences
from mmrdpm.evaluation.figure import Figure
from mmrdpm.evaluation.part import Shown
from mmrdpm.evaluation.results import NotComputed, Results
from mmrdpm.evaluation.run import default_folder
from mmrdpm.evaluation.tokenizer import WAYS, measure_images
from mmrdpm.metrics.features import EfficientNetLite0, MissingEvaluator
from mmrdpm.rdpm import image_tokenizer

load_emoji = cache(emoji_data.load_emoji)  # decoding all of it takes seconds
NAMES = ["red heart", "pizza", "dog face", "rainbow", "snowman"]
SMALL = ("names=3", "guidance_names=2", "guidance_scales=[1,2]", "retrieval=2", "texts_count=4")


@pytest.fixture(scope="module")
def model(tiny_run):
    return mmrdpm.load(tiny_run)


@pytest.fixture(scope="module")
def real():
    data = load_emoji(72)
    return [Image.fromarray(data.images[data.names.index(name)]) for name in NAMES]


@pytest.fixture(scope="module")
def judge(real, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return drawn.Judge(EfficientNetLite0(), NAMES, real)


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs a command inside an empty folder, the gallery 24 emoji: `(status, stdout, stderr)`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(drawn, "emoji_judge", small_gallery)
    for module in (emoji, tokenizer):
        monkeypatch.setattr(module, "load_emoji", load_emoji)

    def run_command(*arguments):
        status = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return run_command


def small_gallery(features):
    data = load_emoji(72)
    chosen = {
        data.concepts[i]
        for split in emoji.GROUPS.values()
        for i in emoji.choose(data, split, 3, seed=0)
    }
    kept = [i for i in data.untoned() if data.concepts[i] in chosen]
    pictures = [Image.fromarray(data.images[i]) for i in kept]
    return drawn.Judge(features, [data.concepts[i] for i in kept], pictures)


def assert_mistake(answer, *says):
    status, out, err = answer
    assert status == 1 and out == ""
    assert err.startswith("mmrdpm: error: ") and err.count("\n") == 1
    for text in says:
        assert text in err


# The judges


def test_plain_pictures_are_judged_without_a_model(judge, real):
    small = [picture.resize((32, 32)) for picture in real]
    found, _ = drawn.named_in_top(judge, small, NAMES)
    assert (found.value, found.count) == (1.0, 5)
    turned = NAMES[1:] + NAMES[:1]
    assert [f.value for f in drawn.named_in_top(judge, small, turned, [1, 5])] == [0, 1]
    assert found.protocol["resolution"] == "32x32" and found.protocol["gallery"] == 5
    assert re.fullmatch("[0-9a-f]{64}", found.protocol["evaluator_sha256"])


def test_distances_grow_with_the_damage(judge, real):
    near = [picture.resize((36, 36)).resize((72, 72)) for picture in real]
    far = [picture.resize((5, 5)).resize((72, 72)) for picture in real]
    for distance in (drawn.kid, drawn.frechet):
        found = [distance(judge.features, made, real) for made in (near, far)]
        assert found[0].value < found[1].value
        assert "EfficientNet-Lite0" in found[0].name and "FID" not in found[0].name
    assert "biased" in drawn.frechet(judge.features, near, real).note
    assert drawn.kid(judge.features, near, real).note == ""
    same = drawn.kid(judge.features, real, real, paired=True)
    assert same.note == f"lowered by {-same.value:.4f} by the pairs of one name"
    assert drawn.diversity(judge.features, [real, real]).value == 0
    assert drawn.diversity(judge.features, [real, far]).value > 0


def test_judges_refuse_what_makes_no_sense(judge, real):
    with pytest.raises(DataError, match="mismatched resolutions: pictures of 32x32 and of 72x72"):
        drawn.kid(judge.features, [p.resize((32, 32)) for p in real], real)
    with pytest.raises(DataError, match=r"4 pictures and 5 references are not pairs: give"):
        drawn.kid(judge.features, real[1:], real, paired=True)
    with pytest.raises(DataError, match="0 pictures for 0 names"):
        drawn.named_in_top(judge, [], [])
    with pytest.raises(DataError, match="'lantern': no such name in the gallery"):
        drawn.named_in_top(judge, real[:1], ["lantern"])
    with pytest.raises(DataError, match="at least 2 seeds"):
        drawn.diversity(judge.features, [real])


# Likelihood


def test_the_matrix_of_scores_holds_the_models_own(model, real):
    scores = likelihood.score_matrix(model, real[:3], NAMES[:2])
    expected = [[model.score(picture, text) for text in NAMES[:2]] for picture in real[:3]]
    assert np.allclose(scores.numpy(), expected, atol=1e-4)


def test_bits_per_byte_of_a_uniform_model_follow_from_the_vocabulary(model):
    found = likelihood.bits_per_byte(flat(model), ["pizza", "é"], "two texts")
    tokens = sum(len(model.texts.encode(text)) + 1 for text in ("pizza", "é"))
    assert found.value == pytest.approx(
        tokens * math.log2(model.vocabulary.code_offset) / 7, rel=1e-5
    )


def flat(model) -> Model:
    """The same model with all scores alike."""
    transformer = copy.deepcopy(model.transformer)
    with torch.no_grad():
        transformer.table.weight.zero_()
    return replace(model, transformer=transformer)


def test_the_loss_of_a_uniform_model_is_the_same_at_every_timestep(model, real):
    found = likelihood.loss_per_timestep(flat(model), real[:2], NAMES[:2], seed=0)
    assert [figure.name for figure in found] == [f"loss at timestep {t}" for t in (3, 2, 1)]
    assert [f.value for f in found] == pytest.approx([math.log(model.vocabulary.codebook_size)] * 3)


def test_losses_of_other_codes_do_not_compare(model, real):
    (one, *_), (other, *_) = (
        likelihood.loss_per_timestep(m, real[:2], NAMES[:2], seed=0)
        for m in (model, replace(model, images=copy.deepcopy(model.images)))
    )
    assert differences(one.protocol, other.protocol) == []
    images = copy.deepcopy(model.images)
    images.codebook.codes += 1e-3
    images.noise_pool = 1
    (other, *_) = likelihood.loss_per_timestep(
        replace(model, images=images), real[:2], NAMES[:2], seed=0
    )
    found = " ".join(differences(one.protocol, other.protocol))
    assert "codes_sha256" in found and "noise_pool (0, 1)" in found


# Suites


def test_a_suite_leaves_results_and_a_page_and_goes_on_where_it_was(run, tiny_run, monkeypatch):
    metrics = (
        "metrics=[named, tone, diversity, caption_exact, retrieval, guidance, loss_per_timestep,"
        " codebook_use]"
    )
    groups = "groups=[training concepts, held-out skin tones]"
    command = ("eval", tiny_run, "--suite", "emoji", "--out", "out", *SMALL, metrics, groups)
    calls = []
    generate = Model.generate

    def counted(self, prompts, *seeds, **how):
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, prompts, *seeds, **how)

    monkeypatch.setattr(Model, "generate", counted)
    status, out, err = run(*command)
    assert status == 130 and out == "" and "the same command goes on" in err
    status, out, err = run(*command)
    assert status == 0
    done = len(calls)
    first = json.loads(Path("out/results.json").read_text())
    assert run(*command)[1] == out and len(calls) == done  # all of it was kept
    assert json.loads(Path("out/results.json").read_text()) == first
    for figure in first["figures"]:
        low, high = figure["interval"]
        assert low <= figure["value"] <= high and figure["count"] > 0
        assert {"evaluator", "count"} <= set(figure["protocol"]), figure["name"]
        if figure["name"].startswith("captioned"):
            assert figure["protocol"]["codes_seed"] == 0
        if figure["name"].startswith(("drawn", "guidance")):
            assert {"guidance_scale", "temperature", "seed", "data_sha256"} <= set(
                figure["protocol"]
            )
    page = Path("out/report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and page.count("<polyline") == 5
    assert page.count("<tr><th>name<th>caption</tr>") == 2  # of each group
    assert not re.search(r"(src|href)=.(?!data:)", page)
    assert "named in top 10" in out and out.endswith("out/report.html\n")


def test_the_same_seed_gives_the_same_figures_and_another_weight_never_old_ones(
    run, tiny_run, tmp_path
):
    suite = ("metrics=[kernel_distance, loss_per_timestep]", "groups=[training concepts]")
    command = ("eval", tiny_run, *SMALL, *suite, "--out")
    values = []
    for out in ("a", "b"):
        assert run(*command, out)[0] == 0
        values.append([figure.value for figure in results.load(tmp_path / out).figures])
    assert values[0] == values[1]
    parts = set((tmp_path / "a/parts").iterdir())
    status, _, err = run(*command, "a", "seed=1")
    assert status == 0 and err.count("results.json there is of other settings and is replaced") == 1
    assert parts < set((tmp_path / "a/parts").iterdir())
    status, out, _ = run("eval", "compare", "a", "a")
    assert status == 0 and "kernel distance" in out
    assert_mistake(run("eval", "compare", "a", "b"), "different protocols", "seed (1, 0)")


def test_a_metric_that_cannot_be_computed_is_named_with_its_reason(run, tiny_run, monkeypatch):
    def missing(*_):
        raise MissingEvaluator("this metric needs the package x")

    monkeypatch.setattr(captioned, "sentence_similarity", missing)
    wanted = "metrics=[sentence_similarity, tone, caption_exact]"
    status, out, _ = run(
        "eval", tiny_run, *SMALL, wanted, "groups=[training concepts]", "--out", "out"
    )
    assert status == 0 and "caption is the name" in out
    assert "not computed: sentence_similarity, training concepts: this metric needs" in out
    assert "not computed: tone: it is about the group 'held-out skin tones'" in out
    assert "this metric needs the package x" in Path("out/report.html").read_text()
    only = "metrics=[sentence_similarity]"
    status, out, err = run("eval", tiny_run, *SMALL, only, "--out", "out")
    assert status == 1 and out == "" and err.endswith("this metric needs the package x\n")
    alone = run("eval", tiny_run, *SMALL, "metrics=[tone]", "groups=[held-out concepts]")
    assert alone[0] == 1 and "error: tone: it is about the group 'held-out skin" in alone[2]


def test_a_tokeniser_is_measured_alone_or_inside_a_run(run, tiny_run, tiny_tokenizers, tmp_path):
    small = ("--suite", "tokenizer", "names=3", "groups=[held-out concepts]")
    status, out, _ = run("eval", tiny_tokenizers / "image", *small, "--out", "a")
    assert status == 0 and "latent error" in out and "codebook use" in out
    assert out.count(" by the pairs of one name") == 2  # by the autoencoder, through the codes
    page = Path("a/report.html").read_text()
    assert "held-out concepts (n=3)" in page
    few = "too low: 12 codes cannot show how evenly 16 are used, at most 75.0% of them"
    assert page.count(f"<em>held-out concepts: {few}</em>") == 1 and page.count(few) == 4
    status, out, _ = run("eval", tiny_run, *small, "--out", "b")
    assert status == 0
    status, out, _ = run("eval", "compare", "a", "b/results.json")
    assert status == 0 and out.count("held-out concepts/PSNR") == 2
    one = ("--suite", "tokenizer", "names=1", "groups=[held-out concepts]", "--out", "c")
    assert_mistake(run("eval", tiny_run, *one), "psnr needs at least 2 pictures")
    two = (*one, "names=2", "metrics=[psnr, kernel_distance]")
    assert_mistake(run("eval", tiny_run, *two), "kernel_distance needs at least 3 pictures")
    Path("mine").mkdir()
    for number, colour in enumerate(("red", "white", "olive")):
        Image.new("RGB", (30, 20 + number), colour).save(f"mine/{number}.png")
    mine = ("--suite", "tokenizer", "metrics=[psnr, codebook_use]", "images=mine", "--out", "d")
    assert run("eval", tiny_run, *mine)[0] == 0
    figures = results.load(tmp_path / "d").figures
    assert {f.name.split("/")[1] for f in figures} == {"pictures"} and figures[0].count == 3
    assert_mistake(run("eval", tiny_run, *mine, "images=nowhere"), "nowhere")
    grouped = (*mine, "groups=[held-out concepts]")
    assert_mistake(run("eval", tiny_run, *grouped), "groups are those of the emoji")
    protocols = [figure.protocol for figure in results.load(tmp_path / "a").figures]
    keys = {"evaluator", "data_sha256", "count", "seed", "resolution"}
    assert all(keys <= set(p) for p in protocols)


def test_the_latent_error_of_the_last_step_is_that_of_the_codes(tiny_tokenizers, monkeypatch):
    tiny = image_tokenizer.load(tiny_tokenizers / "image")
    squares = load_emoji(16).images[:5]
    found = measure_images(tiny, squares, seed=3)
    images = torch.from_numpy(squares.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    latents = tiny.autoencoder.encode(images)
    _, states = tiny.encode_latents(latents, range(3, 8))
    expected = (latents - states[0]).square().flatten(1).mean(1)
    assert torch.allclose(found.latent_error[-1], expected, atol=1e-5)
    assert all(1 / 16 <= use <= 1 for use in found.usage)
    monkeypatch.setattr(tokenizer, "_PIXELS", 16 * 16 * 2)  # two at a time
    parts = measure_images(tiny, squares, seed=3)
    assert torch.equal(parts.code_indices, found.code_indices)
    for way in WAYS:
        torch.testing.assert_close(parts.images[way], found.images[way])
        torch.testing.assert_close(parts.ssim[way], found.ssim[way])
    torch.testing.assert_close(parts.latent_error, found.latent_error)
    with pytest.raises(DataError, match="mismatched resolutions: pictures of 8x8"):
        measure_images(tiny, np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(DataError, match="empty data set"):
        measure_images(tiny, squares[:0])
    monkeypatch.setattr(tokenizer, "WINDOW", 17)
    with pytest.raises(DataError, match="SSIM needs pictures of at least 17x17"):
        measure_images(tiny, squares)


@pytest.mark.parametrize("name", ["emoji-tiny", "models/emoji-tiny"])
def test_what_is_shipped_keeps_its_folder_as_it_is(name, tmp_path, monkeypatch):
    """Also where a clone is worked in, and the model is named by its path."""
    monkeypatch.chdir(shipped.folder("models").parent)
    folder = shipped.resolve("models", name)
    assert default_folder(folder, "emoji") == Path("runs/eval/emoji-tiny-emoji")
    assert default_folder(tmp_path, "emoji") == tmp_path / "eval/emoji"


def test_mistakes_are_one_clear_line(run, tiny_run, tiny_tokenizers, tmp_path):
    def evaluate(*overrides, model=tiny_run, suite="emoji"):
        return run("eval", model, "--suite", suite, "--out", "out", *overrides)

    assert_mistake(evaluate("metrics=[kernel_distanse]"), "did you mean kernel_distance?")
    assert_mistake(evaluate("groups=[nobody]"), "unknown 'nobody'", "held-out concepts")
    assert_mistake(evaluate("metrics=[]"), "metrics is empty")
    assert_mistake(evaluate("metrics=[named, tone, named]"), "metrics: 'named' comes twice")
    twice = "groups=[held-out concepts, held-out concepts]"
    assert_mistake(evaluate(twice), "groups: 'held-out concepts' comes twice")
    assert_mistake(evaluate("namez=3"), "did you mean names?")
    assert_mistake(evaluate("names=2"), "kernel_distance needs at least 3 pictures")
    for metric in ("bleu", "sentence_similarity", "diversity", "loss_per_timestep"):
        few = evaluate("names=1", f"metrics=[{metric}]")
        assert_mistake(few, f"{metric} needs at least 2 pictures")
    assert_mistake(evaluate(suite="emojy"), "did you mean emoji")
    (tmp_path / "kindless.yaml").write_text("names: 3\n")
    assert_mistake(evaluate(suite="kindless.yaml"), "kind is None: choose one of emoji")
    for tokeniser in (tiny_tokenizers / "image", "emoji-rdpm-32"):
        assert_mistake(evaluate(model=tokeniser), "use --suite tokenizer")
    assert_mistake(evaluate(model="emoji-tinny"), "none of the shipped models", "did you mean")
    text = tiny_tokenizers / "text"
    assert_mistake(evaluate(model=text, suite="tokenizer"), "no image tokeniser")
    (tmp_path / "empty.txt").write_text("\n\n")
    bits = "metrics=[bits_per_byte]"
    assert_mistake(evaluate(bits, "texts=empty.txt"), "empty.txt: holds no text")
    assert_mistake(evaluate(bits, "texts=none.txt"), "none.txt: cannot be read")
    assert_mistake(evaluate(bits, "texts=lines.jsonl"), "without JSON around it")
    assert_mistake(evaluate(bits, "texts_count=1"), "bits_per_byte needs at least 2 texts, not 1")
    (tmp_path / "long.txt").write_text("no end " * 500 + "\npizza\n")
    assert_mistake(evaluate("names=3", "texts=long.txt"), "more than the model's context")
    assert not (tmp_path / "out").exists()
    assert_mistake(run("eval", "compare", "out"), "two results, not 1")
    assert_mistake(run("eval", "compare", "x", "y"), "x: no such file")
    assert_mistake(run("eval", "compare", tiny_run, tiny_run), "name the folder of an evaluation")
    (tmp_path / "list.json").write_text("[1]")
    assert_mistake(run("eval", "compare", "list.json", "list.json"), "not the results")


# Comparing and reporting


def figure(name, value, **protocol):
    return Figure(name, value, (value - 1, value + 1), "", 9, protocol)


def made(*figures):
    return Results("s", {}, "m", "0" * 64, list(figures), [NotComputed("p", "no x")])


def test_only_figures_of_one_protocol_stand_side_by_side():
    a, b = figure("d/g/m", 1, seed=0, count=9), figure("d/g/m", 5, seed=0, count=9)
    lines = list(compare(made(a), made(b, figure("d/g/other", 2))))
    assert lines[1].startswith("d/g/m  1 [0, 2]") and lines[1].endswith("intervals apart")
    assert "only B has d/g/other" in lines and "A did not compute p: no x" in lines
    other = figure("d/g/m", 5, seed=1, top=3)
    keys = r"d/g/m: count \(9, None\); seed \(0, 1\); top \(None, 3\): evaluate both"
    with pytest.raises(UsageError, match=keys):
        list(compare(made(a), made(other)))
    with pytest.raises(UsageError, match="no figure in common"):
        list(compare(made(a), made(figure("d/g/x", 1))))


def test_figures_of_other_protocols_are_refused_after_those_on_equal_terms(run, tmp_path):
    names = ("d/g/m", "d/g/k", "d/g/l")
    for out, seed in (("a", 0), ("b", 1)):
        figures = [figure(n, 1, seed=0 if n == "d/g/m" else seed) for n in names]
        made(*figures).save(tmp_path / out)
    status, out, err = run("eval", "compare", "a", "b")
    assert status == 1 and "d/g/m  1 [0, 2]" in out
    assert "d/g/k" not in out and "d/g/l" not in out
    assert err.count("\n") == 1 and "not comparable: d/g/k, d/g/l: seed (0, 1)" in err


def test_curves_are_gathered_by_group_and_texts_are_escaped(tmp_path):
    figures = [figure(f"l/<g{g}>/loss at timestep {t}", t + g) for g in (1, 2) for t in (2, 1)]
    found = report.curves([*figures, figure("d/g/m", 1)])
    assert set(found) == {"loss against timestep"}
    assert [x for x, _ in found["loss against timestep"]["<g2>"]] == [2.0, 1.0]
    shown = Shown("<b>", Image.new("RGB", (2, 2)), [("name", "caption"), ("<i>", "a & b")])
    report.write_report(made(*figures), [shown], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "<g1>" not in page and "&lt;g1&gt;" in page and "<b>" not in page
    assert "<tr><th>name<th>caption</tr><tr><td>&lt;i&gt;<td>a &amp; b</tr>" in page
