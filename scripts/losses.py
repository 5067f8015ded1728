"""Prints the losses of a model by the measure of the sweeps: python scripts/losses.py emoji-tiny"""

from __future__ import annotations

import argparse
import json
import sys

from mmrdpm import api, machine
from mmrdpm.cli.common import status_of
from mmrdpm.sweep.measure import losses
from mmrdpm.sweep.spec import Measures


def main(model: str) -> None:
    machine.prepare(1)
    print(json.dumps(losses(api.load(model), Measures(joint_steps=0))))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("model", help="name or folder of a model")
    given = parser.parse_args()
    sys.exit(status_of(lambda: main(given.model)))
