# ruff: noqa: E402 (what needs the extra is imported after it was looked for)
"""What several peers share: residual codes, captions as they see them."""

import pytest
import torch

for package in ("diffusers", "transformers", "transfusion_pytorch", "matplotlib"):
    pytest.importorskip(package, reason="the extra `peers` is not installed")

from mmrdpm.bench.peers.codes import ResidualCodes
from mmrdpm.bench.peers.llama import prefix_mask
from mmrdpm.bench.peers.protocol import left_padded


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
