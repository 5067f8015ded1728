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
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
from PIL import Image

from mmrdpm import machine
from mmrdpm.bench.peers.protocol import Scene
from mmrdpm.bench.peers.quality import Quality
from mmrdpm.bench.peers.run import recipe_of
from mmrdpm.bench.peers.trainer import Trainer
from mmrdpm.cli.common import apart, status_of
from mmrdpm.evaluation.drawn import emoji_judge
from mmrdpm.evaluation.suite import GROUPS

AT_ONCE = 50  # pictures


@torch.no_grad()
def main(out: Path, names: list[str], overrides: list[str]) -> None:
    loaded = recipe_of(out, overrides)
    machine.prepare(loaded.equal.threads)
    scene, judging, judge = Scene(loaded), loaded.judging, emoji_judge()
    groups = {split: Quality(scene, judging, judge, group) for group, split in GROUPS.items()}
    for name in names:
        peer = Trainer.trained(name, loaded, scene, out).peer
        for (split, quality), how in product(groups.items(), peer.ways(judging)):
            captions = [scene.captions[i] for i in quality.group.indices]
            torch.manual_seed(judging.seed)
            pictures: list[Image.Image] = []
            for start in range(0, len(captions), AT_ONCE):
                latents = peer.draw(captions[start : start + AT_ONCE], how)
                pictures += scene.decode(latents)
            line = {"peer": name, "split": split, "count": len(captions), **asdict(how)}
            print(json.dumps({**line, **asdict(quality(pictures))}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder of mmrdpm bench peers")
    parser.add_argument("names", nargs="+", metavar="PEER|key=value")
    given = parser.parse_args()
    peers, overrides = apart(given.names)
    if not peers:
        parser.error("name a peer")
    sys.exit(status_of(lambda: main(given.out, peers, overrides)))
