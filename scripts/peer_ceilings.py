"""How true pictures are judged that went through the codes of image tokenisers, or of peers.

    python scripts/peer_ceilings.py runs/t4 runs/t5 runs/t6 [emoji-rdpm-32 ...] [key=value ...]
    python scripts/peer_ceilings.py raster scales [key=value ...]

The pictures, their judge and the start noise are those of recipes/peers/emoji.yaml, whose keys can
be overridden: what ours can reach with a tokeniser, or a peer, were its codes drawn without an
error. Prints a JSON line each. A tokeniser in a folder of a peer's name is written ./raster.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from mmrdpm import machine, recipe, shipped
from mmrdpm.bench.peers import peers
from mmrdpm.bench.peers.protocol import PeerBench, Scene
from mmrdpm.bench.peers.quality import Quality
from mmrdpm.cli.common import apart, status_of
from mmrdpm.data.pictures import to_tensor
from mmrdpm.evaluation.drawn import emoji_judge
from mmrdpm.metrics.reconstruction import psnr

PEERS = ("raster", "scales")  # masked tokens are those of raster


@torch.no_grad()
def main(names: list[str], overrides: list[str]) -> None:
    path = shipped.resolve("recipes", "peers/emoji")
    judge = emoji_judge()
    for name in names:
        image = [] if name in PEERS else [f"tokenizers.image={name}"]
        loaded = recipe.load(PeerBench, path, [*overrides, *image])
        machine.prepare(loaded.equal.threads)
        scene = Scene(loaded)
        quality, images = Quality(scene, loaded.judging, judge), scene.images
        images.noise_pool = loaded.ours.noise_pool
        chosen = quality.group.indices
        latents = scene.latents[chosen].to(machine.device())
        if name in PEERS:
            with tempfile.TemporaryDirectory() as folder:
                codes = peers.make(name, loaded, scene, Path(folder)).codes.to(latents.device)
            through = codes.partial(codes.encode(latents))
            about = {"peer": name, "sides": codes.sides, "codebook_size": codes.codebook.size}
        else:
            through = images.encode_latents(latents, range(len(latents)))[1][0]
            about = {"tokenizer": Path(name).name, "steps": images.num_timesteps}
            about |= {"noise_pool": images.noise_pool, "codebook_size": images.codebook_size}
        drawn = images.decode_latents(through).cpu()
        left = psnr(drawn, to_tensor(scene.data.images[chosen]))
        figures = {
            "count": len(latents),
            "psnr": left.mean().item(),
            **asdict(quality(scene.decode(through))),
        }
        print(json.dumps({**about, **figures}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("given", nargs="+", metavar="TOKENIZER|PEER|key=value")
    given = parser.parse_args().given
    names, overrides = apart(given)
    if not names:
        parser.error("name one of them")
    sys.exit(status_of(lambda: main(names, overrides)))
