"""The suites of published metrics, on tiny stand-ins for their data and weights."""

import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmrdpm import hub
from mmrdpm.api import Model
from mmrdpm.cli import main
from mmrdpm.errors import CheckpointError
from mmrdpm.evaluation import captions, published, results
from mmrdpm.evaluation.compare import differences


@pytest.fixture
def run(capsys, monkeypatch, tmp_path, tiny_run):
    """Evaluates the tiny run inside a folder of its own: `(status, stdout, stderr)`."""
    monkeypatch.chdir(tmp_path)

    def run_command(suite, *overrides):
        status = main(["eval", str(tiny_run), "--suite", suite, "--out", "out", *overrides])
        out, err = capsys.readouterr()
        return status, out, err

    return run_command


def assert_mistake(answer, *says):
    status, out, err = answer
    assert status == 1 and out == ""
    assert err.startswith("mmrdpm: error: ") and err.count("\n") == 1
    for text in says:
        assert text in err


def pictures(folder, count, size=16):
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture
def coco(tmp_path):
    """Three pictures; the file and the folder by the names that the suite is told."""
    pictures(tmp_path / "images", 3)
    content = {
        "images": [{"id": i, "file_name": f"{i}.png"} for i in range(3)],
        "annotations": [{"image_id": i, "caption": f"picture {i} of noise"} for i in range(3)] * 2,
    }
    (tmp_path / "notes.json").write_text(json.dumps(content))
    return content


COCO = ("annotations=notes.json", "images=images", "metrics=[cider, bleu]", "words=plain")


def test_captions_of_annotated_pictures(run, coco, tmp_path):
    pytest.importorskip("pycocoevalcap", reason="the extra eval is not installed")
    status, out, _ = run("caption", *COCO)
    assert status == 0 and "CIDEr" in out and "BLEU-4" in out
    found = captions.read_annotations(tmp_path / "notes.json", tmp_path / "images", 3)
    assert found[1] == (tmp_path / "images/1.png", ["picture 1 of noise"] * 2)
    page = (tmp_path / "out/report.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "<tr><td>1.png<td>" in page and "<td>picture 1 of noise / picture 1 of noise" in page
    (figure, _) = results.load(tmp_path / "out").figures
    assert figure.count == 3 and figure.protocol["words"] == "plain"
    assert figure.protocol["evaluator_version"] and figure.protocol["codes_seed"] == 0
    (tmp_path / "images/2.png").unlink()
    assert run("caption", *COCO, "count=2")[0] == 0
    assert_mistake(run("caption", *COCO, "count=3"), "2.png: no such picture")
    assert_mistake(run("caption", *COCO, "count=1"), "needs at least 2 captions, not 1")


def test_mistakes_in_annotations_are_one_clear_line(run, coco, tmp_path):
    def evaluate(change):
        content = json.loads(json.dumps(coco))
        change(content)
        (tmp_path / "notes.json").write_text(json.dumps(content))
        return run("caption", *COCO)

    assert_mistake(
        evaluate(lambda c: c["images"][0].update(file_name="../../etc/passwd")), "leads out of"
    )
    assert_mistake(evaluate(lambda c: c["images"][0].update(file_name="x.png")), "x.png: no such")
    assert_mistake(evaluate(lambda c: c.pop("annotations")), "not a COCO captions file")
    assert_mistake(evaluate(lambda c: c["annotations"].clear()), "'0.png' has no caption")
    assert_mistake(evaluate(lambda c: c["annotations"][1].update(image_id=9)), "annotation 1")
    assert_mistake(
        evaluate(lambda c: (c["images"].clear(), c["annotations"].clear())), "data set is empty"
    )
    assert_mistake(run("caption"), "captions_val2017.json", "annotations=FILE")


def unreachable(name, files):
    raise CheckpointError(f"{name}: the hub gave none of {files}")


def test_what_is_missing_for_the_published_scores_is_said_before_drawing(
    run, tmp_path, monkeypatch
):
    assert_mistake(run("imagenet256"), "mismatched resolutions", "256x256", "draws 16x16")
    small = ("resolution=16", "prompts=p.txt", "reference=real", "inception=weights.pth")
    assert_mistake(run("imagenet256", *small), "p.txt: cannot be read", "one text a line")
    (tmp_path / "p.txt").write_text("red heart\npizza\n")
    assert_mistake(run("imagenet256", *small), "real: no pictures", "reference=DIR")
    monkeypatch.setattr(hub, "fetch", unreachable)
    assert_mistake(run("t2i"), "prompts.txt: cannot be read")
    nowhere = f"clip={tmp_path / 'none'}"
    assert_mistake(run("t2i", "prompts=p.txt", nowhere), "none: no such folder: put config.json")
    (tmp_path / "one.txt").write_text("red heart\n")
    assert_mistake(run("t2i", "prompts=one.txt", nowhere), "one.txt: clip_score needs at least 2")
    (tmp_path / "long.txt").write_text("red heart\n" + "word " * 200 + "\n")
    assert_mistake(run("t2i", "prompts=long.txt", nowhere), "the prompt 'word ", "make it shorter")
    assert_mistake(run("imagenet256", small[0], "prompts=long.txt"), "the prompt 'word ")
    pictures(tmp_path / "real", 12)
    Image.new("RGB", (16, 8)).save(tmp_path / "real/5.png")
    assert_mistake(run("imagenet256", *small), "5.png: mismatched resolutions: 16x8")
    (tmp_path / "real/5.png").write_text("no picture")
    assert_mistake(run("imagenet256", *small), "5.png: not a picture that can be read")
    Image.new("RGB", (16, 16)).save(tmp_path / "real/5.png")
    assert_mistake(run("imagenet256", *small), "weights.pth: no Inception weights: download http")
    on_the_hub = run("imagenet256", *small[:3], "inception=who/none")
    assert_mistake(on_the_hub, "who/none: the hub gave none of ['weights-inception-", "download")
    assert not (tmp_path / "out/pictures").exists()


def test_a_picture_of_another_size_or_a_pickle_is_refused(tmp_path):
    pictures(tmp_path / "a", 2, size=8)
    files = published.pictures_in(tmp_path / "a")
    assert published.read_batch(files, 8).shape == (2, 3, 8, 8)
    with pytest.raises(published.DataError, match=r"0\.png: mismatched resolutions: 8x8"):
        published.read_batch(files, 16)
    torch.save({"code": Path("x")}, tmp_path / "w.pth")
    with pytest.raises(published.DataError, match=r"w\.pth: not plain weights"):
        published.read_weights(tmp_path / "w.pth")


@pytest.fixture
def torch_fidelity(monkeypatch):
    """The library, with a stand-in for the parts of torchvision that we don't use."""
    if "torchvision" not in sys.modules:
        names = ("torchvision", "torchvision.datasets", "torchvision.transforms")
        for name in (*names, "torchvision.transforms.functional"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        datasets = sys.modules["torchvision.datasets"]
        for name in ("CIFAR10", "STL10", "CIFAR100"):
            monkeypatch.setattr(datasets, name, object, raising=False)
        monkeypatch.setattr(
            sys.modules["torchvision.transforms"],
            "functional",
            sys.modules["torchvision.transforms.functional"],
            raising=False,
        )
    return pytest.importorskip("torch_fidelity", reason="the extra published is not installed")


@pytest.fixture
def small_inception(tmp_path, torch_fidelity, monkeypatch):
    """A small network instead of Inception, what it is to judge, and the keys that name both."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    class Small(torch.nn.Module):
        def __init__(self, name, layers, feature_extractor_weights_path):
            super().__init__()
            self.maps = torch.nn.Conv2d(3, 8, 4, stride=4)
            self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

        def forward(self, x):
            features = self.maps(x.float() / 255).mean(dim=(2, 3))
            return features, features[:, :5] * 9

    monkeypatch.setattr(module, "FeatureExtractorInceptionV3", Small)
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 8, 4, stride=4)
    torch.save({f"maps.{k}": v for k, v in conv.state_dict().items()}, tmp_path / "weights.pth")
    (tmp_path / "p.txt").write_text("red heart\npizza\n")
    pictures(tmp_path / "real", 12)
    keys = ("resolution=16", "prompts=p.txt", "reference=real", "inception=weights.pth")
    return Small, keys


def test_of_few_alike_among_the_real_ones_precision_is_whole_and_recall_small(torch_fidelity):
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(40, 8, generator=generator)
    drawn = real.mean(0) + 1e-3 * torch.randn(20, 8, generator=generator)
    found = published.precision_recall(drawn, real)
    assert (found["precision"].share, found["precision"].count) == (1.0, 20)
    assert found["recall"].share < 0.1 and found["recall"].count == 40


PUBLISHED = "metrics=[fid, inception_score, precision_recall]"


def test_published_scores_on_a_stand_in(run, tmp_path, small_inception, monkeypatch):
    """The library's own metrics, and what is kept of them."""
    network, small = small_inception
    against = ("guidance_scales=[0.5, 1.5]", "guidance_samples=11")
    status, _, err = run("imagenet256", *small, *against, "samples=11", "guidance_scale=1.5")
    assert status == 0, err
    found = {f.name.split("/")[-1]: f for f in results.load(tmp_path / "out").figures}
    at = {f"{name} at guidance {s}" for name in ("precision", "recall") for s in ("0.5", "1.5")}
    assert set(found) == {"FID", "Inception score", "precision", "recall"} | at
    assert found["precision at guidance 1.5"].value == found["precision"].value  # the same pictures
    at_half = found["recall at guidance 0.5"]
    assert at_half.count == 12 and found["precision at guidance 0.5"].count == 11
    assert at_half.protocol["guidance_scale"] == 0.5 and at_half.protocol["count"] == 11
    page = (tmp_path / "out/report.html").read_text()
    assert "precision against guidance" in page and "recall against guidance" in page
    assert found["FID"].value > 0 and found["FID"].count == 11
    assert found["FID"].protocol["reference"] == 12
    assert found["FID"].protocol["guidance_scale"] == 1.5
    assert all(f.protocol["evaluator_version"] for f in found.values())
    assert found["precision"].protocol["neighbours"] == 3
    score = found["Inception score"].protocol
    assert score["splits"] == 10 and not {"reference", "reference_sha256"} & set(score)
    assert len(list(Path("out/pictures").rglob("*.png"))) == 22
    alone = ("metrics=[inception_score]", "guidance_scale=1.5", "reference=nowhere")
    assert run("imagenet256", *small, "samples=11", *alone)[0] == 0
    assert results.load(tmp_path / "out").figures == [found["Inception score"]]
    seen, forward = [], network.forward
    monkeypatch.setattr(network, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    more = ("samples=12", "guidance_scale=1.5", PUBLISHED)
    assert run("imagenet256", *small, *more)[0] == 0 and seen == [12]  # the real ones were kept
    for kept in (tmp_path / "out/parts").glob("*.safetensors"):
        kept.write_bytes(kept.read_bytes()[:20])
    status, out, err = run("imagenet256", *small, "samples=11", "seed=1", PUBLISHED)
    assert status == 1 and out == "" and err.endswith("remove it, and it is made anew\n")


def test_what_published_scores_cannot_be_made_of_is_said(run, tmp_path, small_inception):
    _, small = small_inception
    whole = (tmp_path / "real/5.png").read_bytes()
    (tmp_path / "real/5.png").write_bytes(whole[:200])
    status, _, err = run("imagenet256", *small, "samples=11")
    assert status == 1 and "5.png: the picture could not be read" in err
    assert not (tmp_path / "out/pictures").exists()
    (tmp_path / "real/5.png").write_bytes(whole)
    at_most = ("metrics=[guidance]", "guidance_samples=3")
    assert_mistake(run("imagenet256", *small, *at_most), "guidance needs", "raise guidance_samples")
    few = (*small, "samples=3", "metrics=[fid, precision_recall]")
    assert_mistake(run("imagenet256", *few), "at least 4 pictures", "not 3 samples: raise samples")
    assert_mistake(run("imagenet256", *small, "samples=9"), "at least 10 pictures")
    torch.save({"other": torch.zeros(1)}, tmp_path / "weights.pth")
    assert_mistake(run("imagenet256", *small), "not Inception weights")
    for number in range(3, 12):
        (tmp_path / f"real/{number}.png").unlink()
    assert_mistake(run("imagenet256", *small, "samples=11"), "at least 4", "real holds 3")


@pytest.fixture
def clip(tmp_path):
    """The folder of a random CLIP of a few thousand weights."""
    transformers = pytest.importorskip("transformers", reason="the extra published is missing")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "projection_dim": 8}
    words = ["a", "photo", "depicts", "red", "heart", "pizza"]
    tokens = ["<|startoftext|>", "<|endoftext|>", *(f"{w}</w>" for w in words)]
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    transformers.CLIPTokenizer(
        vocab={t: i for i, t in enumerate(tokens)}, merges=[]
    ).save_pretrained(folder)
    config = transformers.CLIPConfig(
        text_config={**shape, "vocab_size": len(tokens), "eos_token_id": 1, "bos_token_id": 0},
        vision_config={**shape, "image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=size).save_pretrained(
        folder
    )
    return folder


def test_clip_score_of_prompts(run, clip, tmp_path):
    (tmp_path / "p.txt").write_text("red heart\npizza\n")
    status, _, err = run("t2i", "prompts=p.txt", f"clip={clip}", "seeds=2")
    assert status == 0, err
    (figure,) = results.load(tmp_path / "out").figures
    assert 0 <= figure.value <= 2.5 and figure.count == 2 and figure.protocol["seeds"] == 2
    assert len(figure.protocol["evaluator_sha256"]) == 64
    assert (tmp_path / "out/report.html").read_text().count("data:image/png;base64,") == 2
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/food.txt").write_text("pizza\npizza\n")
    shutil.copy("p.txt", "lists/all.txt")
    status, _, err = run("t2i", "prompts=lists", f"clip={clip}", "seeds=2")
    assert status == 0, err
    both = results.load(tmp_path / "out").figures
    assert [f.name for f in both] == ["drawn/all/CLIPScore", "drawn/food/CLIPScore"]
    assert both[0].value == figure.value and both[0].protocol == figure.protocol
    (tmp_path / "lists/food.txt").write_text("pizza\n")
    assert_mistake(run("t2i", "prompts=lists", f"clip={clip}"), "food.txt: clip_score needs at lea")
    shutil.rmtree(tmp_path / "lists")
    (tmp_path / "lists").mkdir()
    assert_mistake(run("t2i", "prompts=lists", f"clip={clip}"), "lists: holds no list of prompts")
    (clip / "model.safetensors").unlink()
    assert_mistake(run("t2i", "prompts=p.txt", f"clip={clip}"), "no CLIP model", "put config.json")


def test_another_guidance_preprocessing_or_tokeniser_is_another_protocol(
    run, clip, tmp_path, monkeypatch
):
    """The weights stay, yet no old figure is taken for the new one."""
    (tmp_path / "p.txt").write_text("red heart\npizza\n")

    def evaluate(*overrides):
        status, _, err = run("t2i", "prompts=p.txt", f"clip={clip}", *overrides)
        assert status == 0, err
        return results.load(tmp_path / "out").figures[0]

    generate, scales = Model.generate, []

    def seen(self, *prompts, guidance_scale):
        scales.append(guidance_scale)
        return generate(self, *prompts, guidance_scale=guidance_scale)

    monkeypatch.setattr(Model, "generate", seen)
    first = evaluate()
    guided = evaluate("guidance_scale=0")
    assert scales == [3.0, 0.0]  # the model's own is 3
    assert differences(first.protocol, guided.protocol) == ["guidance_scale (3.0, 0.0)"]
    assert_mistake(run("t2i", "prompts=p.txt", "guidance_scale=-1"), "at least 0.0")
    processor, tokenizer = clip / "preprocessor_config.json", clip / "tokenizer_config.json"
    processor.write_text(processor.read_text().replace("0.48145466", "0.1"))
    second = evaluate()
    assert second.value != first.value
    (differing,) = differences(first.protocol, second.protocol)
    assert differing.startswith("preprocessing_sha256")
    tokenizer.write_text(tokenizer.read_text() + "\n")
    (differing,) = differences(second.protocol, evaluate().protocol)
    assert differing.startswith("tokenizer_sha256")
