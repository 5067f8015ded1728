"""Power laws and learning rates from the results of sweeps, and the sizes that are swept."""

import pytest
import torch

from mmrdpm import shipped, text_tokenizer
from mmrdpm.api import build
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.sweep import scaling, spec
from mmrdpm.sweep.scaling import Point
from mmrdpm.vocabulary import Vocabulary


def row(variant, tflops, parameters, loss, *model, seed=0):
    losses = {"loss_image": loss, "loss_text": 2 * loss}
    return {
        "variant": variant,
        "seed": seed,
        "tflops": tflops,
        "parameters": parameters,
        "model": list(model),
        **losses,
    }


def test_a_power_law_is_found_again():
    points = [Point(c, 3 * c**-0.2, 1) for c in (1, 4, 16)]
    law = scaling.fit(points)
    assert (law.scale, law.exponent) == pytest.approx((3, 0.2))
    assert law.at(64) == pytest.approx(3 * 64**-0.2)
    low, high = scaling.spread(points, 64)
    assert low == pytest.approx(high) == pytest.approx(law.at(64))


def test_the_spread_is_what_single_points_decide():
    points = [Point(1, 1.0, 1), Point(10, 0.5, 1), Point(100, 0.125, 1)]
    low, high = scaling.spread(points, 1000)
    # left out: the first, 0.03125; the second, 0.125 * 0.125 ** 0.5; the last, 0.125
    assert (low, high) == pytest.approx((0.03125, 0.125))


def test_the_frontier_is_the_best_mean_of_every_budget():
    rows = [
        row("small", 1, 10, 3.0),
        row("small", 1, 10, 2.0, seed=1),
        row("large", 1, 99, 2.6),
        row("large-4", 4, 99, 1.5),
    ]
    assert scaling.frontier(rows, "loss_image") == [Point(1, 2.5, 10), Point(4, 1.5, 99)]


def test_charts_and_their_tables(tmp_path):
    rows = [row(f"a{c}", c, 10**6 * c, 3 * c**-0.5) for c in (1, 4, 16)]
    table = scaling.compute(rows, tmp_path / "compute.svg")
    assert "| 4 | 4.00M | 1.5000 |" in table
    assert "`loss = 3.000 * TFLOP^-0.5000`; at ten times the largest budget 0.237" in table
    rates = [
        row(f"w{w}{lr}", 2, w, abs(lr - best), f"model.width={w}", f"train.lr={lr}")
        for w, best in ((64, 0.01), (128, 0.02))
        for lr in (0.005, 0.01, 0.02)
    ]
    table = scaling.learning_rates(rates, tmp_path / "lr.svg")
    assert table.splitlines()[2:] == ["| 64 | 0.01 | 0.01 |", "| 128 | 0.02 | 0.02 |"]
    for name in ("compute", "lr"):
        assert (tmp_path / f"{name}.svg").read_text().startswith("<?xml")


def test_the_swept_sizes_are_those_of_their_names():
    sweep = spec.load(shipped.folder("recipes") / "scaling" / "compute.yaml")
    images = image_tokenizer.load(shipped.resolve("tokenizers", "emoji-rdpm-32"))
    texts = text_tokenizer.load(shipped.resolve("tokenizers", "emoji-bpe-4k"))
    sizes = {variant.name.rsplit("-", 1)[0]: variant for variant in sweep.variants}
    assert len(sizes) == 5
    for name, variant in sizes.items():
        shape = spec.model_recipe(sweep, variant, steps=1, seed=0).model
        with torch.device("meta"):
            model = build(shape, Vocabulary(texts.size, images.codebook_size), images)
        parameters = sum(p.numel() for p in model.parameters())
        assert parameters / 1e6 == pytest.approx(float(name.removesuffix("m")), rel=0.15)
        assert variant.tflops == float(variant.name.rsplit("-", 1)[1])
