"""How different the pictures of one caption are, of peers that `mmrdpm bench peers` has trained.

    python scripts/peer_variety.py runs/peers-emoji ours [scales ...] [key=value ...]

Draws 100 of the judged concepts with four seeds each by the last checkpoint, at the first of
its numbers of steps, with the guidance scale and temperature that named most (the first of
`judging.temperatures` where it was judged without one), and prints a JSON line each: the mean
distance of two seeds' features, with its 95% interval, and that of the true pictures of two
different concepts.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from mmrdpm import machine
from mmrdpm.bench.peers import report
from mmrdpm.bench.peers.protocol import How, Scene
from mmrdpm.bench.peers.quality import Quality
from mmrdpm.bench.peers.run import read, recipe_of
from mmrdpm.bench.peers.trainer import Trainer
from mmrdpm.cli.common import apart, status_of
from mmrdpm.evaluation import drawn

CONCEPTS, SEEDS = 100, 4


def main(out: Path, names: list[str], overrides: list[str]) -> None:
    loaded = recipe_of(out, overrides)
    machine.prepare(loaded.equal.threads)
    scene = Scene(loaded)
    quality = Quality(scene, loaded.judging, drawn.emoji_judge())
    real, features = quality.group.pictures[:CONCEPTS], quality.judge.features
    others = drawn.diversity(features, [real, real[1:] + real[:1]])
    for name in names:
        peer = Trainer.trained(name, loaded, scene, out).peer
        last = read(out / name / "curve.json")["points"][-1]
        best = report.best(last, peer.steps[0])
        temperature = best["temperature"] or loaded.judging.temperatures[0]
        how = How(best["steps"], best["guidance_scale"], temperature if peer.draws_codes else None)
        captions = [scene.captions[i] for i in quality.group.indices[:CONCEPTS]]
        torch.manual_seed(loaded.judging.seed)
        by_seed = []
        with torch.no_grad():
            for _ in range(SEEDS):
                by_seed.append(scene.decode(peer.draw(captions, how)))
        found = drawn.diversity(features, by_seed)
        line = {"peer": name, "overrides": overrides, **asdict(how)}
        line |= {"variety": found.value, "interval": found.interval, "of_concepts": others.value}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder of mmrdpm bench peers")
    parser.add_argument("names", nargs="+", metavar="PEER|key=value")
    given = parser.parse_args()
    peers, overrides = apart(given.names)
    if not peers:
        parser.error("name a peer")
    sys.exit(status_of(lambda: main(given.out, peers, overrides)))
