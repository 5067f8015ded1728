"""Prints the losses of a model by the measure of the sweeps: python scripts/losses.py emoji-tiny"""

from __future__ import annotations

import json
import sys

from mmrdpm import api, machine
from mmrdpm.sweep.measure import losses
from mmrdpm.sweep.spec import Measures

if __name__ == "__main__":
    machine.prepare(1)
    print(json.dumps(losses(api.load(sys.argv[1]), Measures(joint_steps=0))))
