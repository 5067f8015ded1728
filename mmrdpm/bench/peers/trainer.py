"""Trains one peer for a number of updates: exact to resume, its FLOPs counted by torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mmrdpm import checkpoint, machine, weights
from mmrdpm.bench.peers.peers import make
from mmrdpm.bench.peers.protocol import Peer, PeerBench, Scene, Shape
from mmrdpm.errors import UsageError
from mmrdpm.monitor import Monitor
from mmrdpm.optim import Optimizers, learning_rate

_COUNTED = 4  # updates whose FLOPs are averaged: captions differ in length
_PATIENCE = 5  # updates in a row that are not finite
_LAST = 0.2  # share of the updates whose mean loss a learning rate is judged by


class Diverged(UsageError):
    """A learning rate was too high."""


class NotTrained(UsageError):
    """A folder holds no weights of a peer."""


class Trainer:
    """The state of a run.

    Attributes:
        seconds: wall-clock spent on updates.
        skipped: updates that changed nothing, as their loss or gradient was not finite.
        last_losses: of the last fifth of the updates.
    """

    def __init__(
        self, name: str, recipe: PeerBench, scene: Scene, codes: Path, lr: float, steps: int
    ) -> None:
        self.name, self.recipe, self.scene = name, recipe, scene
        self.lr, self.steps, self.step, self.seconds = lr, steps, 0, 0.0
        self.skipped, self._bad = 0, 0
        self.last_losses: list[float] = []
        self.device = machine.device()
        self.dtype = machine.matrix_dtype(recipe.equal.precision, self.device)
        torch.manual_seed(recipe.equal.seed)
        self.peer: Peer = make(name, recipe, scene, codes).to(self.device)
        self.optimizers = Optimizers(self.peer, recipe.optimizer, self.dtype, self.peer.stack)

    @classmethod
    def trained(cls, name: str, recipe: PeerBench, scene: Scene, out: Path) -> Trainer:
        """A peer with the newest weights of a folder of `mmrdpm bench peers`, to draw or be timed.

        Raises:
            NotTrained: the folder has none.
            NotRunnable: the peer's library is not installed, or does not load.
        """
        latest = checkpoint.newest(out / name / "run")
        if latest is None:
            raise NotTrained(f"{out / name / 'run'}: {name} has no weights here")
        trainer = cls(name, recipe, scene, out, lr=0.0, steps=1)
        weights.load_into(trainer.peer, latest)
        return trainer

    @property
    def shape(self) -> Shape:
        return getattr(self.recipe, self.name)

    def backward(self, step: int) -> float:
        """The loss of one update, whose gradients are added to the weights'."""
        seed = self.recipe.equal.seed
        batch = self.scene.batch(seed, step, self.shape.batch_size)
        torch.manual_seed(seed * 1_000_003 + step)
        with machine.autocast(self.dtype, self.device):
            loss = self.peer.loss(batch)
        loss.backward()
        return loss.item()

    def update(self) -> float:
        """One optimiser step; gives the loss.

        An update whose loss or gradient is not finite leaves the weights as they are, as in
        `mmrdpm train`.

        Raises:
            Diverged: it is the fifth such update in a row.
        """
        begun = time.perf_counter()
        loss = self.backward(self.step)
        if math.isfinite(loss) and math.isfinite(self.optimizers.clip()):
            warmup = round(self.recipe.equal.warmup * self.steps)
            self.optimizers.step(learning_rate(self.lr, self.step, self.steps, warmup))
            self._bad = 0
        else:
            self.skipped, self._bad = self.skipped + 1, self._bad + 1
        if self._bad == _PATIENCE:
            raise Diverged(
                f"{self.name}: the loss or its gradient is not finite, {_PATIENCE} updates up to"
                f" {self.step + 1}, with the learning rate {self.lr:g}: begin anew in another"
                f" folder without it in {self.name}.lrs"
            )
        self.optimizers.clear()
        self.step += 1
        self.seconds += time.perf_counter() - begun
        if self.step > self.steps * (1 - _LAST) and math.isfinite(loss):
            self.last_losses.append(loss)
        return loss

    def flops_per_update(self) -> float:
        """Forward and backward of real updates, the mean of a few; weights stay as they are.

        On the CPU, so that it is the same number on every machine: ours attends otherwise on a GPU.
        torch does not count its fused attention there, so attention runs unfused meanwhile.
        """
        device, dtype = self.device, self.dtype
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self._move_to(self.device)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            for step in range(_COUNTED):
                self.backward(step)
        self.peer.zero_grad()
        self.device, self.dtype = device, dtype
        self._move_to(device)
        return counter.get_total_flops() / _COUNTED

    def _move_to(self, device: torch.device) -> None:
        self.peer.to(device)
        self.scene.images.to(device)

    def save(self, run: Path) -> None:
        """Writes a checkpoint of the run."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "last_losses": self.last_losses,
            "optimizers": self.optimizers.state(),
        }
        about = {"peer": self.name, "step": self.step}
        checkpoint.save(run, self.step, self.peer.state_dict(), about, state)
        checkpoint.prune(run, self.recipe.checkpoint)

    def restore(self, path: Path) -> None:
        """Goes back to where the checkpoint at `path` was taken."""
        weights.load_into(self.peer, path)
        state = checkpoint.state_of(path)
        self.step, self.seconds = state["step"], state["seconds"]
        self.skipped = state.get("skipped", 0)  # runs of earlier versions ended at the first
        self.last_losses = state["last_losses"]
        self.optimizers.restore(state["optimizers"])


def fit(
    trainer: Trainer, run: Path, stops: Sequence[int], at_stop: Callable[[Monitor], None]
) -> bool:
    """Trains up to each stop in turn and calls `at_stop` there; False if it was stopped before.

    At a stop the checkpoint is written before `at_stop` is called, and a run that goes on calls
    it again for every stop that it has reached.
    """
    policy = trainer.recipe.checkpoint
    run.mkdir(parents=True, exist_ok=True)
    if latest := checkpoint.newest(run):
        trainer.restore(latest)
    stops = [stop for stop in stops if stop >= trainer.step]
    title = f"{trainer.name} lr {trainer.lr:g}"
    with Monitor(run, title, trainer.steps, trainer.step) as monitor:
        for stop in stops:
            while trainer.step < stop and not monitor.stopping:
                loss = trainer.update()
                monitor.advance(trainer.step)
                if trainer.step % policy.log_every == 0:
                    monitor.record(trainer.step, {"loss": loss}, {title: f"{loss:.3f}"})
                if trainer.step % policy.every == 0 or trainer.step == stop or monitor.stopping:
                    trainer.save(run)
            if trainer.step < stop:
                return False
            at_stop(monitor)
    return True
