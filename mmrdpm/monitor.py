"""What a long run shows: a live display, a log that outlives it, and a clean way to stop.

The display goes to stderr; every record also goes to `DIR/metrics.jsonl`, to TensorBoard files
under `DIR/tensorboard` and, where asked for, to Weights & Biases. Of many ranks only the first
shows and logs. Ctrl-C and SIGTERM do not kill the run: they set `stopping`, so that the loop can
save and leave; a second one kills, but not what torchrun passes on of one that all have received.
"""

from __future__ import annotations

import json
import signal
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import IO, Any, Protocol

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.distributed import is_torchelastic_launched
from torch.utils.tensorboard import SummaryWriter

from mmrdpm import distributed, weights
from mmrdpm.checkpoint import LOG_FILE
from mmrdpm.errors import CheckpointError, RecipeError


class Log(Protocol):
    """Where records go."""

    def figures(self, step: int, figures: Mapping[str, float]) -> None: ...
    def picture(self, name: str, step: int, image: Image.Image) -> None: ...
    def text(self, name: str, step: int, text: str) -> None: ...
    def rewind(self, done: int) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line.

    A run that goes on from step `done` drops the records of later steps, which will come again,
    and a last line that a kill cut short.
    """

    def __init__(self, path: Path, done: int) -> None:
        self._path, self._file = path, _kept(path, done)

    def rewind(self, done: int) -> None:
        """Drops the records of the steps after `done`."""
        self._file.close()
        self._file = _kept(self._path, done)

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()

    def picture(self, name: str, step: int, image: Image.Image) -> None:
        pass  # the run's folder holds it

    def text(self, name: str, step: int, text: str) -> None:
        pass

    def close(self) -> None:
        self._file.close()


def _kept(path: Path, done: int) -> IO[str]:
    """The file, open for more, with the records up to step `done`."""
    kept, lines = [], path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            if json.loads(line)["step"] <= done:
                kept.append(line + b"\n")
        except (ValueError, TypeError, KeyError):
            if number == len(lines):  # cut off by a kill
                break
            raise CheckpointError(
                f"{path}:{number}: no record of a run: remove the line, or move the file away"
            ) from None
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(b"".join(kept))
    weights.put(partial, path)
    return open(path, "a", encoding="utf-8")


class TensorBoard:
    """Event files; a run that goes on hides what came after step `done`."""

    def __init__(self, folder: Path, done: int) -> None:
        self._folder = str(folder)
        self._board = SummaryWriter(self._folder, purge_step=done + 1)

    def rewind(self, done: int) -> None:
        """Hides what came after step `done`."""
        self._board.close()
        self._board = SummaryWriter(self._folder, purge_step=done + 1)

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)

    def picture(self, name: str, step: int, image: Image.Image) -> None:
        self._board.add_image(name, np.asarray(image), step, dataformats="HWC")

    def text(self, name: str, step: int, text: str) -> None:
        self._board.add_text(name, text, step)

    def close(self) -> None:
        self._board.close()


class WandB:
    """Weights & Biases; the run keeps its identity, which lies in its folder, when it goes on.

    Raises:
        RecipeError: the package is not installed, or does not let a run begin.
    """

    def __init__(self, project: str, run: Path) -> None:
        try:
            import wandb
        except ModuleNotFoundError:
            raise RecipeError(
                "train.wandb is set, but wandb is not installed: pip install wandb, or leave it out"
            ) from None
        identity = run / ".wandb-id"
        if not identity.exists():
            identity.write_text(uuid.uuid4().hex, encoding="utf-8")
        self._wandb: Any = wandb
        try:
            self._run: Any = wandb.init(
                project=project,
                name=run.resolve().name,
                id=identity.read_text(encoding="utf-8"),
                resume="allow",
                dir=str(run),
            )
        except wandb.Error as error:  # no login, no network
            reason = " ".join(str(error).split())[:200]
            raise RecipeError(
                f"train.wandb is set, but wandb could not begin ({reason}): log in, set"
                " WANDB_MODE=offline, or leave it out"
            ) from None

    def rewind(self, done: int) -> None:
        """It takes no step twice: the steps that come again are left out there."""

    def figures(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def picture(self, name: str, step: int, image: Image.Image) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def text(self, name: str, step: int, text: str) -> None:
        self._run.log({name: text}, step=step)

    def close(self) -> None:
        self._run.finish()


class Monitor:
    """A context manager around a loop of `total` steps that begins at step `done`.

    Args:
        wandb: a project of Weights & Biases, "" for none.
    """

    def __init__(self, run: Path, title: str, total: int, done: int = 0, wandb: str = "") -> None:
        self.run, self.stopping = run, False
        self._done, self._wandb, self._logs = done, wandb, list[Log]()
        self._console = Console(stderr=True, quiet=not distributed.is_main())
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
        if distributed.is_main():
            # what may be refused comes first: no file is open then
            self._logs += [WandB(self._wandb, self.run)] if self._wandb else []
            self._logs += [JsonLines(self.run / LOG_FILE, self._done)]
            self._logs += [TensorBoard(self.run / "tensorboard", self._done)]
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._stop)
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for log in self._logs:
            log.close()

    def advance(self, step: int) -> None:
        """Moves the bar."""
        self._progress.update(self._task, completed=step)

    def rewind(self, done: int) -> None:
        """Goes back to step `done`: what was logged of later ones will come again."""
        for log in self._logs:
            log.rewind(done)
        self.advance(done)

    def record(self, step: int, figures: Mapping[str, float], shown: Mapping[str, str]) -> None:
        """Logs figures, and shows some of them beside the bar and, off a terminal, as a line."""
        for log in self._logs:
            log.figures(step, figures)
        line = "  ".join(f"{name} {text}" for name, text in shown.items())
        self._progress.update(self._task, completed=step, figures=line)
        if not self._console.is_terminal:
            self.say(f"step {step}  {line}")

    def say(self, line: str) -> None:
        """A line above the bar."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def picture(self, name: str, step: int, image: Image.Image) -> None:
        """Logs an RGB picture."""
        for log in self._logs:
            log.picture(name, step, image)

    def text(self, name: str, step: int, text: str) -> None:
        """Logs a text."""
        for log in self._logs:
            log.text(name, step, text)

    def _stop(self, number: int, _: FrameType | None) -> None:
        self.stopping = True
        launched = is_torchelastic_launched()
        signal.signal(number, signal.SIG_IGN if launched else self._handlers[number])
        self.say("stopping: saving what is done; once more to kill")
        if launched:  # asleep, as only here can what comes be set to kill again
            time.sleep(distributed.SIGNALS_TOGETHER)
            signal.signal(number, self._handlers[number])
