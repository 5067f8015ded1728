# ruff: noqa: E402 (what needs the extra is imported after it was looked for)
"""What several peers share: their recipe, residual codes, captions as they see them, plots."""

import itertools
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

for package in ("diffusers", "transformers", "transfusion_pytorch", "matplotlib"):
    pytest.importorskip(package, reason="the extra `peers` is not installed")

import mmrdpm
from mmrdpm import machine, recipe, shipped
from mmrdpm.bench.peers import ours, report
from mmrdpm.bench.peers.codes import ResidualCodes
from mmrdpm.bench.peers.protocol import Judging, PeerBench, Scene, left_padded
from mmrdpm.bench.peers.quality import Quality
from mmrdpm.bench.peers.qwen import prefix_mask
from mmrdpm.data.emoji import load_emoji
from mmrdpm.document import NO_TARGET, TextSegment, length
from mmrdpm.evaluation import drawn, emoji
from mmrdpm.evaluation.store import Store
from mmrdpm.evaluation.suite import EmojiSuite


@pytest.mark.parametrize(
    "path", sorted((shipped.folder("recipes") / "peers").glob("*.yaml")), ids=lambda p: p.stem
)
def test_a_shipped_recipe_fits_its_schema(path):
    recipe.load(PeerBench, path)
    header = path.read_text().split("kind:")[0]
    assert f"recipes/peers/{path.name}" in header and "Hardware:" in header


def test_a_level_codes_what_the_levels_before_left():
    torch.manual_seed(0)
    latents = torch.randn(600, 2, 2, 4)
    codes = ResidualCodes((1, 2, 2), (2, 2), 16, 4)
    codes.fit(latents, seed=0)
    found = codes.encode(latents)
    errors = []
    for level in range(3):
        rest = latents - codes.partial(found[:level]) if level else latents
        small = rest.mean(dim=(1, 2), keepdim=True) if level == 0 else rest
        expected = codes.codebook.nearest(small, level + 1).flatten(1)
        assert torch.equal(found[level], expected)
        errors.append((latents - codes.partial(found[: level + 1])).square().mean())
    assert errors[0] > errors[1] > errors[2]


def test_captions_are_padded_on_the_left_and_text_is_causal():
    ids, real = left_padded([(7,), (8, 9)], first=3, device=torch.device("cpu"))
    assert ids.tolist() == [[0, 3, 7], [3, 8, 9]]
    assert real.tolist() == [[False, True, True], [True, True, True]]
    mask = prefix_mask(real[:1], torch.tensor([0, 1, 1]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],  # padding sees itself, so that its softmax is defined
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 1],
    ]


@pytest.fixture(scope="module")
def smoke():
    """The shipped recipe, and what it learns from."""
    loaded = recipe.load(PeerBench, shipped.resolve("recipes", "peers/smoke"))
    return loaded, Scene(loaded)


def test_ours_learns_so_many_timesteps_of_a_picture(smoke, monkeypatch):
    (loaded, scene), learned = smoke, []
    monkeypatch.setattr(
        ours, "loss", lambda _, packed, **__: learned.append(packed) or SimpleNamespace(total=0)
    )
    for steps in (1, 4, 99):
        shape = replace(loaded.ours, steps_per_image=steps)
        ours.Ours(shape, scene).to(machine.device()).loss(scene.batch(seed=0, step=0, size=3))
        timesteps = learned[-1].timesteps[learned[-1].targets != NO_TARGET]
        of_a_picture, positions = min(steps, scene.images.num_timesteps), 4 * 4
        assert len(timesteps) == 3 * of_a_picture * positions and timesteps.min() >= 1


def test_ours_in_rows_of_several_pictures_learns_what_it_learns_one_by_one(smoke, monkeypatch):
    loaded, scene = smoke
    batch = scene.batch(seed=0, step=0, size=21)
    peer = ours.Ours(loaded.ours, scene).to(machine.device())

    def learned():
        peer.zero_grad()
        torch.manual_seed(0)
        total = peer.loss(batch)
        total.backward()
        return total, peer.transformer.table.weight.grad.clone()

    together = learned()
    monkeypatch.setattr(ours, "_A_ROW", 1)
    torch.testing.assert_close(together, learned(), rtol=1e-4, atol=1e-6)


def test_rows_are_about_alike():
    lengths = [5, 9, 9, 30, 7, 6, 8, 9, 12, 5, 7]
    documents = [[TextSegment((1,) * count)] for count in lengths]
    rows = ours.balanced(documents)
    assert sorted(map(id, itertools.chain(*rows))) == sorted(map(id, documents))
    assert sorted(sum(map(length, row)) for row in rows) == [51, 56]


def test_figures_have_the_protocol_of_an_evaluation(
    pixel_features, tiny_run, tmp_path, monkeypatch
):
    """All of it but how a picture is drawn: the same keys, and the same values."""
    monkeypatch.setattr(emoji, "EfficientNetLite0", drawn.EfficientNetLite0)
    metrics, group = ("named", "kernel_distance"), "held-out concepts"
    suite = EmojiSuite(metrics, (group,), names=3)
    evaluation = emoji.EmojiEvaluation(mmrdpm.load(tiny_run), suite, Store(tmp_path, ""))
    figures = [figure for part in evaluation.parts() for figure in part.make()]
    expected = {k: v for f in figures if f.name.startswith("drawn") for k, v in f.protocol.items()}
    own = {"top", "noise", *asdict(evaluation.model.sampling)}
    scene = SimpleNamespace(data=load_emoji(16))
    quality = Quality(scene, Judging(concepts=3), drawn.emoji_judge(), group)
    assert {k: v for k, v in quality.protocol.items() if k != "noise"} == {
        k: v for k, v in expected.items() if k not in own
    }


def test_quality_lies_over_the_time_of_its_own_updates_and_drawing(monkeypatch, tmp_path):
    drawn = [{"steps": s, "top10": q, "kid": 0.1} for s, q in ((10, 0.2), (10, 0.4), (50, 0.3))]
    result = {"peer": "flow", "curve": [{"step": step, "drawn": drawn} for step in (3, 6)]}
    way = {"peer": "flow", "steps": 10}
    timing = {
        "sampling": [
            {**way, "batch": 1, "seconds_per_picture": 0.5},
            {**way, "batch": 64, "seconds_per_picture": 0.25},
            {**way, "peer": "ours", "batch": 128, "seconds_per_picture": 9.0},
        ],
        "training": [
            {"peer": "ours", "seconds_per_update": 9.0},
            {"peer": "flow", "seconds_per_update": 2.0},
        ],
    }
    timed = report.with_timing(result, timing)
    assert report.is_timed(timed, 10) and not report.is_timed(timed, 50)
    assert not report.is_timed(report.with_timing(result, {}), 10)

    shown = {}
    monkeypatch.setattr(report, "plot", lambda path, lines, *more: shown.update(lines))
    report.over_seconds(tmp_path, [("updates", timed, 10)])
    report.over_sampling(tmp_path, [("drawing", timed, 10)])
    assert shown["updates"] == [(6.0, drawn[1]), (12.0, drawn[1])]
    assert shown["drawing"] == [(0.25, drawn[1])]
