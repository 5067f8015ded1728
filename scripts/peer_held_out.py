"""How peers that `mmrdpm bench peers` has trained draw what they were never shown.

    python scripts/peer_held_out.py runs/peers-emoji scales [ours ...] [key=value ...]

Draws `judging.concepts` emoji of each split by the last checkpoint, at every guidance scale and
temperature of the recipe's judging, whose keys can be overridden, and prints a JSON line each: the
shares whose concept is the nearest, and among the ten nearest, of all without a skin tone, and KID
from the true pictures, with 95% intervals.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import torch
from PIL import Image

from mmrdpm import checkpoint, machine, recipe, weights
from mmrdpm.api import IMAGE_TOKENIZER, TEXT_TOKENIZER
from mmrdpm.bench.peers.protocol import PeerBench, Scene
from mmrdpm.bench.peers.quality import Quality
from mmrdpm.bench.peers.trainer import Trainer
from mmrdpm.evaluation.suite import GROUPS
from mmrdpm.model_recipe import Tokenizers

AT_ONCE = 50  # pictures


@torch.no_grad()
def main(out: Path, names: list[str], overrides: list[str]) -> None:
    loaded = recipe.load(PeerBench, out / checkpoint.RECIPE_FILE, overrides)
    machine.prepare(loaded.equal.threads)
    own = Tokenizers(str(out / IMAGE_TOKENIZER), str(out / TEXT_TOKENIZER))
    loaded = replace(loaded, tokenizers=own)
    scene, judging = Scene(loaded), loaded.judging
    judges = {split: Quality(scene, judging, group) for group, split in GROUPS.items()}
    for name in names:
        trainer = Trainer(name, loaded, scene, out, lr=0.0, steps=1)
        latest = checkpoint.newest(out / name / "run")
        if latest is None:
            raise SystemExit(f"{out / name}: not trained")
        weights.load_into(trainer.peer, latest)
        for (split, quality), how in product(judges.items(), trainer.peer.ways(judging)):
            captions = [scene.captions[i] for i in quality.group.indices]
            torch.manual_seed(judging.seed)
            pictures: list[Image.Image] = []
            for start in range(0, len(captions), AT_ONCE):
                latents = trainer.peer.draw(captions[start : start + AT_ONCE], how)
                pictures += scene.decode(latents)
            line = {"peer": name, "split": split, "count": len(captions), **asdict(how)}
            print(json.dumps({**line, **asdict(quality(pictures))}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder of mmrdpm bench peers")
    parser.add_argument("names", nargs="+", metavar="PEER|key=value")
    given = parser.parse_args()
    peers = [word for word in given.names if "=" not in word]
    main(given.out, peers or parser.error("name a peer"), [w for w in given.names if "=" in w])
