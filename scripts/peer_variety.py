"""How different the pictures of one caption are, of peers that `mmrdpm bench peers` has trained.

    python scripts/peer_variety.py runs/peers-emoji ours [scales ...]

Draws 100 of the judged concepts with four seeds each by the last checkpoint, with the guidance
scale and temperature that named most, and prints the mean distance of two seeds' features beside
that of the true pictures of two different concepts.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from mmrdpm import checkpoint, machine, recipe, weights
from mmrdpm.api import IMAGE_TOKENIZER, TEXT_TOKENIZER
from mmrdpm.bench.peers.protocol import How, PeerBench, Scene
from mmrdpm.bench.peers.quality import Quality
from mmrdpm.bench.peers.run import read
from mmrdpm.bench.peers.trainer import Trainer
from mmrdpm.evaluation import drawn
from mmrdpm.model_recipe import Tokenizers

CONCEPTS, SEEDS = 100, 4


def main(out: Path, names: list[str]) -> None:
    loaded = recipe.load(PeerBench, out / checkpoint.RECIPE_FILE)
    machine.prepare(loaded.equal.threads)
    own = Tokenizers(str(out / IMAGE_TOKENIZER), str(out / TEXT_TOKENIZER))
    loaded = replace(loaded, tokenizers=own)
    scene = Scene(loaded)
    quality = Quality(scene, loaded.judging)
    real, features = quality.group.pictures[:CONCEPTS], quality.judge.features
    others = drawn.diversity(features, [real, real[1:] + real[:1]])
    print(f"two concepts' true pictures: {others.value:.3f}")
    for name in names:
        trainer = Trainer(name, loaded, scene, out, lr=0.0, steps=1)
        latest = checkpoint.newest(out / name / "run")
        assert latest, f"{out / name}: not trained"
        weights.load_into(trainer.peer, latest)
        best = max(read(out / name / "curve.json")["points"][-1]["drawn"], key=lambda d: d["top10"])
        how = How(best["steps"], best["guidance_scale"], best["temperature"])
        captions = [scene.captions[i] for i in quality.group.indices[:CONCEPTS]]
        torch.manual_seed(loaded.judging.seed)
        by_seed = []
        with torch.no_grad():
            for _ in range(SEEDS):
                by_seed.append(scene.decode(trainer.peer.draw(captions, how)))
        found = drawn.diversity(features, by_seed)
        interval = found.interval
        print(f"{name}: {found.value:.3f} (95%: {interval[0]:.3f} to {interval[1]:.3f}), {how}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
