"""How true pictures are judged that went through the codes of image tokenisers.

    python scripts/peer_ceilings.py runs/t4 runs/t5 runs/t6 [emoji-rdpm-32 ...] [key=value ...]

The pictures, their judge and the start noise are those of recipes/peers/emoji.yaml, whose keys can
be overridden: what ours can reach with a tokeniser, were its codes drawn without an error. Prints a
JSON line each.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from mmrdpm import machine, recipe, shipped
from mmrdpm.bench.peers.protocol import PeerBench, Scene
from mmrdpm.bench.peers.quality import Quality
from mmrdpm.data.pictures import to_tensor
from mmrdpm.metrics.reconstruction import psnr


@torch.no_grad()
def main(names: list[str], overrides: list[str]) -> None:
    path = shipped.resolve("recipes", "peers/emoji")
    for name in names:
        loaded = recipe.load(PeerBench, path, [*overrides, f"tokenizers.image={name}"])
        machine.prepare(loaded.equal.threads)
        scene = Scene(loaded)
        quality, images = Quality(scene, loaded.judging), scene.images
        images.noise_pool = loaded.ours.noise_pool
        chosen = quality.group.indices
        latents = scene.latents[chosen]
        through = images.encode_latents(latents, range(len(latents)))[1][0]
        left = psnr(images.decode_latents(through), to_tensor(scene.data.images[chosen]))
        size = {"steps": images.num_timesteps, "codebook_size": images.codebook_size}
        how = {"noise_pool": images.noise_pool, "count": len(latents)}
        figures = {"psnr": left.mean().item(), **asdict(quality(scene.decode(through)))}
        print(json.dumps({"tokenizer": Path(name).name, **size, **how, **figures}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("given", nargs="+", metavar="TOKENIZER|key=value")
    given = parser.parse_args().given
    tokenizers = [word for word in given if "=" not in word]
    main(tokenizers or parser.error("name a tokeniser"), [w for w in given if "=" in w])
