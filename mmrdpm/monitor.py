"""What a long run shows: a live display, a log that outlives it, and a clean way to stop.

The display goes to stderr; every record also goes to `DIR/metrics.jsonl` and to TensorBoard files
under `DIR/tensorboard`. Ctrl-C and SIGTERM do not kill the run: they set `stopping`, so that the
loop can save and leave; a second one kills.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter


class Monitor:
    """A context manager around a loop of `total` steps that begins at step `done`."""

    def __init__(self, run: Path, title: str, total: int, done: int = 0) -> None:
        self.run, self.stopping = run, False
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=self._console,
        )
        self._task = self._progress.add_task(title, total=total, completed=done, figures="")
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Monitor:
        self._log = open(self.run / "metrics.jsonl", "a", encoding="utf-8")
        self._board = SummaryWriter(str(self.run / "tensorboard"))
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._stop)
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._board.close()
        self._log.close()

    def advance(self, step: int) -> None:
        """Moves the bar."""
        self._progress.update(self._task, completed=step)

    def record(self, step: int, figures: Mapping[str, float], shown: Mapping[str, str]) -> None:
        """Logs figures, and shows some of them beside the bar and, off a terminal, as a line."""
        self._log.write(json.dumps({"step": step, **figures}) + "\n")
        self._log.flush()
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)
        line = "  ".join(f"{name} {text}" for name, text in shown.items())
        self._progress.update(self._task, completed=step, figures=line)
        if not self._console.is_terminal:
            self.say(f"step {step}  {line}")

    def say(self, line: str) -> None:
        """A line above the bar."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def picture(self, name: str, step: int, image: Image.Image) -> None:
        """An RGB picture for TensorBoard."""
        self._board.add_image(name, np.asarray(image), step, dataformats="HWC")

    def text(self, name: str, step: int, text: str) -> None:
        """A text for TensorBoard."""
        self._board.add_text(name, text, step)

    def _stop(self, number: int, _: FrameType | None) -> None:
        self.stopping = True
        signal.signal(number, self._handlers[number])
        self.say("stopping: saving what is done; once more to kill")
