"""Prints the table of docs/peers.md: what residual codes of the latents leave, by their levels."""

from __future__ import annotations

import torch

from mmrdpm import machine, recipe, shipped
from mmrdpm.bench.peers.codes import ResidualCodes
from mmrdpm.bench.peers.protocol import PeerBench, Scene
from mmrdpm.data.pictures import to_tensor
from mmrdpm.metrics.reconstruction import psnr

PICTURES = 500  # the first of the training split
SIDES = ([4] * 4, [4] * 5, [4] * 6, [1, 2, 3, *[4] * 4], [1, 2, 3, *[4] * 6])


@torch.no_grad()
def main() -> None:
    machine.prepare(2)
    scene = Scene(recipe.load(PeerBench, shipped.resolve("recipes", "peers/emoji")))
    images = scene.images.cpu()
    latents = scene.training_latents[:PICTURES]
    chosen = scene.data.indices("train")[:PICTURES]
    pixels = to_tensor(scene.data.images[chosen])

    def show(name: str, left: torch.Tensor) -> None:
        error = (left - latents).square().mean().item()
        print(
            f"{name}: error {error:.4f}, {psnr(images.decode_latents(left), pixels).mean():.2f} dB"
        )

    show("autoencoder alone", latents)
    show("ours", images.encode_latents(latents, range(PICTURES))[1][0])
    for sides in SIDES:
        codes = ResidualCodes(sides, images.grid, images.codebook_size, images.latent_channels)
        codes.fit(scene.training_latents, seed=0)
        show(f"sides {sides}, {sum(codes.lengths)} tokens", codes.partial(codes.encode(latents)))


if __name__ == "__main__":
    main()
