import math

import numpy as np
import pytest
import torch
from PIL import Image

from mmrdpm.data.emoji import load_emoji
from mmrdpm.evaluation.emoji import choose
from mmrdpm.metrics.features import EfficientNetLite0, ranks
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
