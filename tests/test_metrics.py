import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from mmrdpm.data.emoji import load_emoji
from mmrdpm.errors import DataError
from mmrdpm.evaluation.emoji import choose
from mmrdpm.metrics.distance import (
    frechet_distance,
    frechet_interval,
    kernel_distance,
    kernel_interval,
    lowered_by_pairs,
)
from mmrdpm.metrics.features import EfficientNetLite0, kept, ranks
from mmrdpm.metrics.interval import bootstrap, mean_interval
from mmrdpm.metrics.proportion import Proportion
from mmrdpm.metrics.reconstruction import psnr, ssim


def test_psnr_by_hand():
    black = torch.full((1, 3, 16, 16), -1.0)
    assert psnr(-black, black).item() == pytest.approx(0, abs=1e-5)  # as wrong as can be
    assert psnr(black + 0.02, black).item() == pytest.approx(40, abs=1e-3)  # 1% of the range


def test_ssim_equals_its_definition_window_by_window():
    random = torch.Generator().manual_seed(0)
    x, y = (torch.rand(1, 3, 13, 12, generator=random) * 2 - 1 for _ in range(2))
    place = np.arange(11) - 5
    line = np.exp(-(place**2) / 4.5)
    weights = np.outer(line, line) / line.sum() ** 2
    values = []
    for c in range(3):
        a, b = ((t[0, c].double().numpy() + 1) / 2 for t in (x, y))
        for i in range(3):
            for j in range(2):
                p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
                mp, mq = (weights * p).sum(), (weights * q).sum()
                vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
                both = (weights * (p - mp) * (q - mq)).sum()
                values.append(
                    (2 * mp * mq + 1e-4)
                    * (2 * both + 9e-4)
                    / ((mp**2 + mq**2 + 1e-4) * (vp + vq + 9e-4))
                )
    assert ssim(x, y).item() == pytest.approx(np.mean(values), abs=1e-4)
    assert ssim(x, x).item() == pytest.approx(1, abs=1e-5)


def test_the_interval_solves_wilsons_equation():
    """Its ends are where the observed share is 1.96 standard errors away."""
    found = Proportion(140, 200)
    for end in found.interval:
        distance = abs(found.share - end) / math.sqrt(end * (1 - end) / 200)
        assert distance == pytest.approx(1.96, abs=1e-3)
    assert Proportion(0, 10).interval[0] == 0


def test_ranks_by_hand():
    gallery = torch.tensor([[2.0, 0.0], [0.0, 2.0], [-2.0, -2.0]])
    queries = torch.tensor([[3.0, 0.1], [3.0, 0.1], [-1.0, -1.0]])
    assert ranks(queries, gallery, [0, 1, 2]) == [1, 2, 1]


def test_the_backbone_finds_every_emoji_again_when_it_is_made_small():
    data = load_emoji(72)
    chosen = choose(data, "train", 12, seed=0)
    assert len(set(chosen)) == 12 and not any(data.tones[i] for i in chosen)
    real = [Image.fromarray(data.images[i]) for i in chosen]
    features = EfficientNetLite0()
    found = ranks(features([p.resize((32, 32)) for p in real]), features(real), list(range(12)))
    assert found.count(1) >= 11


def test_the_kernel_distance_equals_its_definition_pair_by_pair():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(5, 4)), random.normal(size=(7, 4)) + 0.5

    def kernel(a, b):
        return (a @ b / 4 + 1) ** 3

    def mean(values):
        return sum(values) / len(values)

    expected = (
        mean([kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
        + mean([kernel(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
        - 2 * mean([kernel(a, b) for a in x for b in y])
    )
    found = kernel_distance(torch.tensor(x), torch.tensor(y))
    assert found == pytest.approx(expected)
    low, high = kernel_interval(torch.tensor(x), torch.tensor(y), found)
    assert low < found < high


def test_two_pictures_have_no_interval_of_a_kernel_distance():
    """All resamples that tell anything are the same two: it would have no width."""
    two = torch.eye(2)
    with pytest.raises(DataError, match="at least 3 pictures, not 2"):
        kernel_interval(two, two, kernel_distance(two, two))


def test_the_kernel_distance_of_independent_sets_is_unbiased():
    """Its mean over many pairs of samples of one distribution is zero, and it is often negative."""
    random = torch.Generator().manual_seed(0)
    found = [
        kernel_distance(*(torch.randn(6, 3, generator=random) for _ in range(2)))
        for _ in range(400)
    ]
    assert abs(np.mean(found)) < 3 * np.std(found) / 20
    assert min(found) < 0


def test_pairs_of_one_name_lower_the_kernel_distance_by_what_is_told():
    """Against the mean over pairs of different names, which is 0 for a set and itself."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, generator=random, dtype=torch.float64)
    y = x + 0.5 * torch.randn(6, 3, generator=random, dtype=torch.float64)
    kernels = [(a @ b.T / 3 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    xx, yy, xy = (kernel[~torch.eye(6, dtype=torch.bool)].mean().item() for kernel in kernels)
    lowered = lowered_by_pairs(x, y)
    assert lowered > 0.1
    assert kernel_distance(x, y) + lowered == pytest.approx(xx + yy - 2 * xy)
    assert kernel_distance(x, x) == pytest.approx(-lowered_by_pairs(x, x))


@pytest.mark.parametrize("count", [5, 40])
def test_the_frechet_distance_equals_that_of_matrix_roots(count):
    """Fewer samples than features, and more: against the eigenvalues of the product."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(count, 8, generator=random, dtype=torch.float64)
    y = torch.randn(30, 8, generator=random, dtype=torch.float64) * 2 + 1
    a, b = (np.cov(z.numpy(), rowvar=False) for z in (x, y))
    root = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    apart = (x.mean(0) - y.mean(0)).square().sum().item()
    expected = apart + np.trace(a) + np.trace(b) - 2 * root
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(y, y) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("count", [5, 40])
def test_the_frechet_interval_equals_that_of_every_resample_by_itself(count):
    """Fewer samples than features, and more, which take another way."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(count, 8, generator=random) + 100  # far from 0, as sums of squares dislike
    y = torch.randn(30, 8, generator=random) * 2 + 101
    value, seen = frechet_distance(x, y), []

    def progress(numbers):
        for number in numbers:
            seen.append(number)
            yield number

    found = frechet_interval(x, y, value, progress=progress)
    slow = bootstrap(lambda chosen: frechet_distance(x[chosen], y), value, count)
    assert found == pytest.approx(slow, rel=1e-6) and len(seen) == 200


def test_distances_refuse_a_single_sample():
    one, two = torch.zeros(1, 4), torch.zeros(2, 4)
    for distance in (kernel_distance, frechet_distance):
        with pytest.raises(DataError, match="at least 2 pictures in each, not 1"):
            distance(two, one)


def test_the_bootstrap_agrees_with_the_standard_error_of_a_mean():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    mean, (low, high) = mean_interval(values.tolist())
    assert mean == pytest.approx(values.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 20, rel=0.15)
    assert mean_interval(values.tolist()) == (mean, (low, high))


def test_an_interval_ends_where_the_statistic_does():
    shares = [0.0, 1.0, 1.0, 1.0]
    _, (low, high) = mean_interval(shares)
    assert high > 1  # what limits are for
    assert mean_interval(shares, limits=(0.0, 1.0))[1] == (low, 1.0)
    rounded = 1 + 1e-9
    low, high = bootstrap(lambda _: 1.0, rounded, 4, limits=(0.0, 1.0))
    assert low <= rounded <= high


def test_kept_features_are_read_again_only_for_the_same_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    class Features:
        protocol: ClassVar = {"evaluator": "a count"}

        def __call__(self, pictures):
            calls.append(len(pictures))
            return torch.full((len(pictures), 2), 7.0)

    first = kept(Features(), [None] * 3, "a")
    assert torch.equal(kept(Features(), [None] * 3, "a"), first) and calls == [3]
    assert len(kept(Features(), [None] * 4, "b")) == 4 and calls == [3, 4]
