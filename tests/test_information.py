"""What positions of a step tell of each other, by a head on a frozen model."""

import math

import pytest
import torch

from mmrdpm.sweep import information


def test_the_head_finds_what_positions_share():
    """Four equal codes of 2: ln 2 each apart, ln 2 for all together."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    def blocks():
        while True:
            codes = torch.randint(2, (64, 1), generator=generator).expand(64, 4).contiguous()
            flat = torch.zeros(64, 4, 2)
            yield information._Blocks(torch.zeros(64, 4, 8), flat, codes, torch.ones_like(codes))

    head = information.JointHead(8, 4, 2)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _, lesson in zip(range(150), blocks(), strict=False):
        seen = information._orders(lesson.codes.shape, generator, 0.25)
        optimizer.zero_grad()
        information._unseen_mean(head(lesson, seen), seen).mean().backward()
        optimizer.step()
    head.eval()
    found = information._measure(head, (b for b, _ in zip(blocks(), range(20), strict=False)), 1, 0)
    assert found.loss[0] == pytest.approx(math.log(2), abs=1e-5)
    assert found.marginal[0] == pytest.approx(math.log(2), abs=0.02)
    assert found.joint[0] == pytest.approx(math.log(2) / 4, abs=0.05)


def test_orders_see_every_number_of_codes_alike():
    seen = information._orders(torch.Size((8000, 4)), torch.Generator().manual_seed(0))
    share = torch.bincount(seen.sum(1), minlength=4) / 8000
    torch.testing.assert_close(share, torch.full((4,), 0.25), atol=0.03, rtol=0)
    nothing = information._orders(torch.Size((50, 4)), torch.Generator().manual_seed(0), 1.0)
    assert not nothing.any()
