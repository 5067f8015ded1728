"""What the last steps cost and give when they add the expected code in place of a drawn one.

    python scripts/expected_steps.py [RUN|MODEL] --steps 0 5 10 [--temperatures 0.4] [--threads 1]

Draws 200 training concepts and the held-out pairs of a concept and a skin tone by a model (default:
`emoji-tiny`), with its own guidance, and prints a JSON line for every number of expected steps and
temperature of the steps before: the shares whose concept is the nearest, and among the ten nearest,
of all without a skin tone, KID from the true pictures, and the mean distance of features between
two seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import product

from mmrdpm import api, machine
from mmrdpm.cli.common import status_of
from mmrdpm.data.emoji import load_emoji
from mmrdpm.evaluation import drawn
from mmrdpm.evaluation.emoji import choose_group
from mmrdpm.evaluation.suite import GROUPS

NAMES, SEED = 200, 0


def main(given: argparse.Namespace) -> None:
    machine.prepare(given.threads)
    model, judge = api.load(given.model), drawn.emoji_judge()
    data = load_emoji(model.images.image_size)
    shown = [name for name, split in GROUPS.items() if split in ("train", "held_out_tone")]
    groups = [choose_group(data, name, NAMES, SEED) for name in shown]
    for steps, temperature in product(given.steps, given.temperatures):
        for group in groups:
            count = len(group.names)
            by_seed = [
                model.generate(
                    group.names,
                    [count * draw + i for i in range(count)],  # noise of its own for each
                    expected_steps=steps,
                    temperature=temperature,
                )
                for draw in range(2)
            ]
            top_1, top_10 = drawn.named_in_top(judge, by_seed[0], group.concepts)
            distance = drawn.kid(judge.features, by_seed[0], group.pictures, paired=True)
            line = {
                "model": given.model,
                "group": group.name,
                "count": count,
                "guidance_scale": model.sampling.guidance_scale,
                "expected_steps": steps,
                "temperature": temperature,
                "top1": top_1.value,
                "top10": top_10.value,
                "kid": distance.value,
                "kid_interval": distance.interval,
                "variety": drawn.diversity(judge.features, by_seed).value,
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=api.DEFAULT_MODEL, metavar="RUN|MODEL")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 5, 10])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.4])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    sys.exit(status_of(lambda: main(options)))
