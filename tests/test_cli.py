"""The command line as a stranger uses it: what it prints, writes and answers to mistakes."""

import json
import os
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from mmrdpm import api, cli
from mmrdpm.api import Model
from mmrdpm.cli import main, use


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Runs a command inside an empty folder: `(status, stdout, stderr)`."""
    monkeypatch.chdir(tmp_path)

    def run_command(*arguments):
        status = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return run_command


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def look(path):
    """Width, height and number of frames of a file."""
    with Image.open(path) as picture:
        return (*picture.size, getattr(picture, "n_frames", 1))


def test_generate_prints_the_paths_it_wrote_and_nothing_else(run, tiny_run, tmp_path):
    status, out, err = run(
        "generate", "red heart", "Red heart!", "--model", tiny_run, "--n", 2, "--out", "made"
    )
    assert (status, err) == (0, "")
    paths = out.splitlines()
    assert paths[:2] == ["made/red-heart-0.png", "made/red-heart-1.png"]
    assert len(set(paths)) == 4
    assert all(look(path) == (16, 16, 1) for path in paths)
    first = (tmp_path / paths[1]).read_bytes()
    status, out, _ = run(
        "generate", "red heart", "--model", tiny_run, "--seed", 1, "--out", "b.png"
    )
    assert out == "b.png\n"
    assert (tmp_path / "b.png").read_bytes() == first


def test_the_last_steps_can_be_expected(run, tiny_run, tmp_path):
    for name, steps in (("none", 0), ("last", 1), ("all", 3)):
        how = ("--seed", 3, "--expected-steps", steps, "--out", tmp_path / f"{name}.png")
        assert run("generate", "cat", "--model", tiny_run, *how)[0] == 0
    assert len({(tmp_path / f"{n}.png").read_bytes() for n in ("none", "last", "all")}) == 3
    assert_mistake(
        run("generate", "cat", "--model", tiny_run, "--expected-steps", -1), "steps -1: it must"
    )


def test_trace_saves_every_step_as_a_strip_and_a_film(run, tiny_run):
    status, out, _ = run("generate", "cat", "--model", tiny_run, "--trace")
    picture, strip, film = out.splitlines()
    assert status == 0 and look(picture) == (16, 16, 1)
    assert look(strip)[0] >= 4 * 16
    assert look(film) == (16, 16, 4)


def test_caption_and_complete_answer_a_line_each(run, tiny_run, photo):
    status, out, _ = run("caption", photo, photo, "--model", tiny_run)
    lines = out.splitlines()
    assert status == 0 and len(lines) == 2 and lines[0] == lines[1]
    _, out, _ = run("caption", photo, "--model", tiny_run, "--json")
    assert json.loads(out) == {"image": str(photo), "caption": lines[0]}
    status, out, _ = run("complete", "A lantern", "--model", tiny_run, "--max-tokens", 3)
    assert status == 0 and out.startswith("A lantern") and out.count("\n") == 1


def test_tokenizer_commands(run, tiny_tokenizers, photo):
    status, out, _ = run("tokenizer", "eval", tiny_tokenizers / "image")
    assert status == 0
    assert out.count("PSNR") == out.count("codebook usage") == out.count("latent error") == 3
    status, out, _ = run("tokenizer", "eval", tiny_tokenizers / "text")
    assert status == 0 and " 0 changed by a round trip" in out
    text = run("tokenizer", "eval", tiny_tokenizers / "text", "--images", photo.parent)
    assert_mistake(text, "is a text tokeniser: leave it out")
    status, out, _ = run("tokenizer", "eval", tiny_tokenizers / "image", "--images", photo.parent)
    assert "usage is too low: 4 codes cannot show" in out
    wrong = run("tokenizer", "show", photo, "--tokenizer", tiny_tokenizers / "text")
    assert_mistake(wrong, "the folder of no image tokeniser")
    status, out, _ = run("tokenizer", "show", photo, "--tokenizer", tiny_tokenizers / "image")
    assert status == 0 and look(out.strip())[0] > 5 * 96


def damaged(tmp_path, tiny_run, change):
    run = tmp_path / "damaged"
    shutil.copytree(tiny_run, run)
    change(run)
    return run


def truncate(run):
    path = sorted(run.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-100])


def pickled(run):
    torch.save({"w": torch.zeros(1)}, run / "step-9999999.safetensors")


def narrowed(run):
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("width: 32", "width: 16"))


def softened(run):
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("soft_labels: 0.0", "soft_labels: some"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (truncate, "truncated"),
        (pickled, "pickled"),
        (narrowed, "the model needs"),
        (softened, "train.soft_labels must be a number"),
    ],
)
def test_damaged_models_are_one_clear_line(run, tmp_path, tiny_run, change, says):
    model = damaged(tmp_path, tiny_run, change)
    assert_mistake(run("generate", "a", "--model", model), says)


def assert_mistake(answer, *says):
    status, out, err = answer
    assert status == 1 and out == ""
    assert err.startswith("mmrdpm: error: ") and err.count("\n") == 1
    for text in says:
        assert text in err


def test_bad_pictures_are_one_clear_line(run, tmp_path, tiny_run):
    def caption(path):
        return run("caption", path, "--model", tiny_run)

    assert_mistake(caption("missing.png"), "missing.png", "no such file")
    (tmp_path / "text.png").write_text("no picture")
    assert_mistake(caption("text.png"), "text.png", "not a picture")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    assert_mistake(caption("huge.png"), "huge.png", "megapixels")
    Image.new("RGB", (300, 300), "red").save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-300])
    assert_mistake(caption("cut.png"), "cut.png", "could not be read")
    assert_mistake(caption(tmp_path), "could not be read")


def test_bad_recipes_are_one_clear_line(run, tmp_path, tiny_recipe):
    def train(*overrides):
        return run("train", tiny_recipe, "--run", tmp_path / "r", *overrides)

    assert_mistake(train("train.stepz=3"), "unknown key train.stepz", "did you mean train.steps?")
    assert_mistake(train("train.steps=many"), "train.steps must be an integer")
    assert_mistake(train("model.heads=3"), "must divide")
    assert_mistake(train("train.lr"), "key=value")
    assert_mistake(run("train", "emoji_cpv"), "did you mean emoji_cpu")
    assert_mistake(run("train", "emoji_rdpm_32"), "use mmrdpm tokenizer train")
    assert_mistake(run("tokenizer", "train", tiny_recipe), "use mmrdpm train")
    assert_mistake(train("train.lr=.inf"), "finite")
    assert_mistake(train("model.width=30"), "pairs")
    assert_mistake(train("data.image_share=0.9"), "more than 1")
    assert_mistake(train("train.seed=99999999999999999999"), "at most")
    assert_mistake(train("train.threads=99999999999"), "at most 1024")
    assert_mistake(train("train.lr=1e300"), "at most")
    seed = "seed=99999999999999999999"
    assert_mistake(run("eval", "emoji-rdpm-32", "--suite", "tokenizer", seed), "at most")
    for key in (f"equal.{seed}", f"judging.{seed}", "equal.threads=99999999999"):
        assert_mistake(run("bench", "peers", "peers/smoke", key), "at most")
    assert not (tmp_path / "r").exists()
    assert_mistake(train("tokenizers.image=emoji-rdmp-32"), "did you mean emoji-rdpm-32")
    if not torch.cuda.is_available():
        assert_mistake(train("train.attention=xformers"), "needs CUDA")
    assert not (tmp_path / "r" / "recipe.yaml").exists()
    assert train("train.steps=1", "samples.prompts=[]")[0] == 0  # the folder is still free


def test_bad_prompts_are_one_clear_line(run, tiny_run):
    assert_mistake(run("generate", "", "--model", tiny_run), "empty")
    assert_mistake(run("generate", "word " * 300, "--model", tiny_run), "make it shorter")
    assert_mistake(run("generate", "a", "--model", tiny_run, "--guidance", "nan"), "guidance")
    assert_mistake(run("generate", "a", "--model", tiny_run, "--out", "a.jpg"), "PNG")
    assert_mistake(run("complete", "", "--model", tiny_run), "empty")
    assert_mistake(run("generate", "a", "--model", "nothing"), "no such path")
    with pytest.raises(SystemExit) as stop:
        run("generate", "a", "--nn", "3")
    assert stop.value.code == 2


def test_where_nothing_can_be_written_nothing_is_drawn(run, tiny_run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(api.Model, "generate", None)
    assert_mistake(run("generate", "a", "--model", tiny_run, "--out", "file/deeper"), "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_one_clear_line(run, tiny_run, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    assert_mistake(run("generate", "a", "--model", tiny_run, "--out", "locked"), "locked")


def test_text_tokenizers_train_from_a_recipe(run, tmp_path):
    (tmp_path / "t.yaml").write_text("kind: text\nmodel: sentencepiece\n")
    assert_mistake(
        run("tokenizer", "train", "t.yaml", "vocab_size=257", "--run", "made"), "257", "raise it"
    )
    status, out, err = run("tokenizer", "train", "t.yaml", "vocab_size=600", "--run", "made")
    assert (status, out, err) == (0, "made\n", "")
    (tmp_path / "few.txt").write_text("a few words\n")
    few = "data.sources={few: {type: text, path: few.txt}}"
    status, _, err = run("tokenizer", "train", "t.yaml", "model=bpe", few, "--run", "few")
    assert status == 0 and re.search(r"^the texts give 2\d\d ids, not 4096$", err, re.M)
    status, out, _ = run("tokenizer", "eval", "made")
    assert status == 0 and " 0 changed by a round trip" in out
    assert_mistake(
        run("tokenizer", "train", "t.yaml", "--run", "made"), "holds a tokeniser already"
    )


def test_a_full_gpu_is_said_in_one_line(monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 ...")

    monkeypatch.setattr(cli, "quickstart", fail)
    assert main(["quickstart"]) == 1
    message = capsys.readouterr().err
    assert "memory is full (CUDA out of memory" in message and len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:119] . DefaultCPUAllocator: can't allocate memory:"
                " you tried to allocate 12 bytes. Error code 12 (Cannot allocate memory)"
            ),
            "main memory is full (can't allocate memory: you tried",
        ),
        (MemoryError(), "main memory is full (no more"),
    ],
)
def test_full_main_memory_is_said_in_one_line(error, says, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(cli, "quickstart", fail)
    assert main(["quickstart"]) == 1
    message = capsys.readouterr().err
    assert message.startswith("mmrdpm: error: ") and says in message and message.count("\n") == 1


def test_other_errors_of_torch_keep_their_trace(monkeypatch):
    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "quickstart", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["quickstart"])


@pytest.mark.parametrize("command", [["eval"], ["bench", "sample"], ["bench", "attention"]])
def test_too_many_threads_are_refused(command, run, capsys):
    with pytest.raises(SystemExit) as stop:
        run(*command, "--threads", 99999999999)
    assert stop.value.code == 2
    assert "--threads 99999999999: it must be at most 1024" in capsys.readouterr().err


def test_pictures_are_saved_as_they_come(run, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(use, "_AT_ONCE", 2)
    draw, drawn = Model.generate, []

    def interrupted(self, prompts, *rest, **how):
        drawn.append(prompts)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return draw(self, prompts, *rest, **how)

    options = ("generate", "a", "b", "--n", "2", "--model", tiny_run, "--out", "pictures")
    with monkeypatch.context() as patch:
        patch.setattr(Model, "generate", interrupted)
        status, out, _ = run(*options)
    assert status == 130 and out.splitlines() == ["pictures/a-0.png", "pictures/a-1.png"]
    early = [(tmp_path / line).read_bytes() for line in out.splitlines()]
    status, out, _ = run(*options)
    assert status == 0 and len(out.splitlines()) == 4
    assert [(tmp_path / line).read_bytes() for line in out.splitlines()[:2]] == early


def test_paths_go_to_stdout_beside_a_bar_on_stderr(run, tiny_run, monkeypatch):
    monkeypatch.setattr(use, "_AT_ONCE", 1)
    monkeypatch.setattr(use, "Console", partial(Console, force_terminal=True))
    options = ("generate", "a", "--n", "2", "--model", tiny_run)
    status, out, err = run(*options)
    assert status == 0 and out.splitlines() == ["a-0.png", "a-1.png"]
    assert "drawing" in err and "a-0.png" not in err


def test_a_guidance_that_leaves_no_numbers_is_refused(run, tiny_run):
    assert_mistake(run("generate", "a", "--model", tiny_run, "--guidance", "1e38"), "0 to 1000")


@pytest.mark.parametrize(
    ("option", "key", "value"),
    [
        ("--guidance", "guidance_scale", 100.0),
        ("--temperature", "temperature", 0.0),
        ("--top-k", "top_k", 1),
        ("--top-p", "top_p", 0.05),
    ],
)
def test_an_option_of_sampling_reaches_the_model(option, key, value, run, tiny_run, tmp_path):
    model, path, prompt = api.load(tiny_run), tmp_path / "a.png", "a cat"
    made = ("generate", prompt, "--model", tiny_run, "--seed", 0, "--out", path)
    assert run(*made, option, value)[0] == 0
    with Image.open(path) as picture:
        drawn = np.asarray(picture)
    wanted, plain = (model.generate([prompt], seed=0, **how)[0] for how in ({key: value}, {}))
    assert np.array_equal(drawn, np.asarray(wanted))
    assert not np.array_equal(drawn, np.asarray(plain))


def test_pictures_of_one_file_name_are_numbered_and_a_late_mistake_draws_none(
    run, tiny_run, tmp_path
):
    made = run("generate", "a", "b", "--n", 2, "--model", tiny_run, "--out", "x.png")
    assert made[:2] == (0, "x-0.png\nx-1.png\nx-2.png\nx-3.png\n")
    for wrong in (("a", " "), ("a", "--n", 2, "--seed", 2**32 - 1)):  # the second seed is too large
        status, out, err = run("generate", *wrong, "--model", tiny_run, "--out", tmp_path / "none")
        assert status == 1 and not out and err.count("\n") == 1
    assert not list(tmp_path.glob("none/*.png"))


def test_a_text_tokeniser_cannot_be_resumed(run):
    status, _, err = run("tokenizer", "train", "emoji_bpe_4k", "--resume")
    assert status == 1 and "leave --resume out" in err
