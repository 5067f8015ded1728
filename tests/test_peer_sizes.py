"""The shipped recipes of the peers: sizes that may be set side by side."""

import pytest
import torch

from mmrdpm import recipe, shipped
from mmrdpm.bench.peers import peers as registry
from mmrdpm.bench.peers.peers import MAKERS, make
from mmrdpm.bench.peers.protocol import PeerBench, Scene

for package in ("diffusers", "transformers", "transfusion_pytorch"):
    pytest.importorskip(package, reason="the extra `peers` is not installed")


@pytest.mark.parametrize("name", ["peers/emoji", "peers/smoke"])
def test_the_peers_of_a_shipped_recipe_are_as_large_as_ours(name, monkeypatch, tmp_path):
    """With the shipped tokenizers, whose codes count."""
    monkeypatch.setattr(registry, "fitted", lambda codes, *_: codes.requires_grad_(False))
    monkeypatch.setattr(
        "mmrdpm.bench.peers.protocol.latents_of",
        lambda images, data: torch.zeros(len(data.names), *images.grid, images.latent_channels),
    )
    loaded = recipe.load(PeerBench, shipped.resolve("recipes", name))
    scene = Scene(loaded)
    for peer in MAKERS:
        make(peer, loaded, scene, tmp_path)  # refuses another size


@pytest.mark.parametrize("peer", MAKERS)
def test_what_a_recipe_leaves_out_is_as_in_the_shipped_one(peer):
    loaded = recipe.load(PeerBench, shipped.resolve("recipes", "peers/emoji"))
    assert getattr(PeerBench(), peer) == getattr(loaded, peer)
