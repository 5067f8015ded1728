"""How peers that `mmrdpm bench peers` has trained draw what they were never shown.

    python scripts/peer_held_out.py runs/peers-emoji scales [ours ...] [key=value ...]

Draws up to 200 emoji of each split by the last checkpoint, at every guidance scale and temperature
of the recipe's judging, whose keys can be overridden, and prints a JSON line each: the shares whose
concept is the nearest, and among the ten nearest, of all without a skin tone, and KID from the true
pictures.
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
from mmrdpm.bench.peers.protocol import How, PeerBench, Scene
from mmrdpm.bench.peers.trainer import Trainer
from mmrdpm.evaluation import drawn
from mmrdpm.evaluation.emoji import choose
from mmrdpm.model_recipe import Tokenizers

SPLITS, NAMES, AT_ONCE = ("train", "held_out_tone", "held_out_concept"), 200, 50


@torch.no_grad()
def main(out: Path, names: list[str], overrides: list[str]) -> None:
    loaded = recipe.load(PeerBench, out / checkpoint.RECIPE_FILE, overrides)
    machine.prepare(loaded.equal.threads)
    own = Tokenizers(str(out / IMAGE_TOKENIZER), str(out / TEXT_TOKENIZER))
    loaded = replace(loaded, tokenizers=own)
    scene, judge, judging = Scene(loaded), drawn.emoji_judge(), loaded.judging
    data = scene.data
    for name in names:
        trainer = Trainer(name, loaded, scene, out, lr=0.0, steps=1)
        latest = checkpoint.newest(out / name / "run")
        if latest is None:
            raise SystemExit(f"{out / name}: not trained")
        weights.load_into(trainer.peer, latest)
        temperatures = judging.temperatures if trainer.peer.draws_codes else (1.0,)
        grid = product(SPLITS, trainer.peer.steps, judging.guidance_scales, temperatures)
        for split, *way in grid:
            how = How(*way)
            chosen = choose(data, split, NAMES, judging.seed)
            captions = [scene.captions[i] for i in chosen]
            torch.manual_seed(judging.seed)
            pictures: list[Image.Image] = []
            for start in range(0, len(chosen), AT_ONCE):
                latents = trainer.peer.draw(captions[start : start + AT_ONCE], how)
                pictures += scene.decode(latents)
            concepts = [data.concepts[i] for i in chosen]
            top_1, top_10 = drawn.named_in_top(judge, pictures, concepts)
            real = [Image.fromarray(data.images[i]) for i in chosen]
            kid = drawn.kid(judge.features, pictures, real)
            figures = {"top1": top_1.value, "top10": top_10.value, "kid": kid.value}
            line = {"peer": name, "split": split, "count": len(chosen), **asdict(how), **figures}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder of mmrdpm bench peers")
    parser.add_argument("names", nargs="+", metavar="PEER|key=value")
    given = parser.parse_args()
    peers = [word for word in given.names if "=" not in word]
    main(given.out, peers or parser.error("name a peer"), [w for w in given.names if "=" in w])
