"""Runs the peers one by one: count, search where there are several rates, train and judge, time.

All of it can be resumed.

OUT/recipe.yaml, tokenizers  the resolved recipe, and the tokenizers that it named at the beginning
OUT/NAME/plan.json           FLOPs per update and the learning rates tried
OUT/NAME/run                 checkpoints, logs and sheets of drawn pictures of the judged run
OUT/NAME/curve.json          the points at which it was judged, as they come
OUT/NAME/results.json        all about a peer, once it is done
OUT/timing.json              how long all that are done take to learn and to draw, in turns
OUT/table.md, OUT/*.svg      of the peers done so far
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mmrdpm import checkpoint, machine
from mmrdpm import recipe as recipe_file
from mmrdpm.api import IMAGE_TOKENIZER, TEXT_TOKENIZER, TOKENIZER_FILES
from mmrdpm.bench.peers import measure, report
from mmrdpm.bench.peers.peers import MAKERS, NotRunnable, make, parameters
from mmrdpm.bench.peers.protocol import How, PeerBench, Scene
from mmrdpm.bench.peers.quality import Quality
from mmrdpm.bench.peers.trainer import Diverged, NotTrained, Trainer, fit
from mmrdpm.data.pictures import contact_sheet, to_tensor
from mmrdpm.errors import CheckpointError, UsageError
from mmrdpm.evaluation.drawn import emoji_judge
from mmrdpm.metrics.reconstruction import psnr
from mmrdpm.model_recipe import Tokenizers
from mmrdpm.monitor import Monitor

RESULTS_FILE, TIMING_FILE = "results.json", "timing.json"
_AT_ONCE = 50  # pictures drawn together when they are judged
_SHEET = (10, 4)  # columns and rows of a sheet of drawn pictures


def bench(recipe: PeerBench, out: Path, names: Sequence[str], say: Callable[[str], None]) -> bool:
    """Runs the named peers, all if none is named; False if it was stopped before the end.

    Called again with the same folder and recipe it goes on where it was.

    Raises:
        UsageError: there is no peer of a name.
        CheckpointError: the folder holds a run of another recipe.
        DataError: a package that judging or plotting needs is not installed.
    """
    for name in names:
        if name not in MAKERS:
            raise UsageError(f"--only {name}: no such peer: choose among {', '.join(MAKERS)}")
    report.check()
    machine.prepare(recipe.equal.threads)
    checkpoint.begin(out, recipe, resume=(out / checkpoint.RECIPE_FILE).exists())
    sources = {
        place: (
            checkpoint.tokenizer(out, place, named, TOKENIZER_FILES[place]),
            TOKENIZER_FILES[place],
        )
        for place, named in (
            (IMAGE_TOKENIZER, recipe.tokenizers.image),
            (TEXT_TOKENIZER, recipe.tokenizers.text),
        )
    }
    checkpoint.record(out, recipe, sources)
    wanted = [name for name in MAKERS if name in (names or MAKERS)]
    todo = [name for name in wanted if not _is_done(out, name)]
    done = {name for name in MAKERS if name not in todo and _is_done(out, name)}
    if todo or done - _timed(out):
        say("reading the emoji and their features")
        scene = Scene(_with_its_own(recipe, out))
        quality = Quality(scene, recipe.judging, emoji_judge())
    for name in todo:  # a shape that does not do should show before hours are spent
        with suppress(NotRunnable):
            make(name, recipe, scene, out)
    finished = True
    for name in todo:
        try:
            finished = Run(name, recipe, scene, quality, out).finish()
        except NotRunnable as error:
            say(f"{name}: {error}")
            write(out / name / RESULTS_FILE, {"peer": name, "not_runnable": str(error)})
        if not finished:
            break
    if finished and {name for name in MAKERS if _is_done(out, name)} - _timed(out):
        say("timing how the peers learn and draw, in turns")
        for name, reason in _time(recipe, scene, quality, out).items():
            again = f": once it can be, remove {out / TIMING_FILE}" if name in _timed(out) else ""
            say(f"{name} was not timed ({reason}){again}")
    report.write(out, _results(out))
    return finished


def recipe_of(out: Path, overrides: Sequence[str] = ()) -> PeerBench:
    """The recipe of a folder that `bench` has begun, with the tokenizers that it keeps."""
    return _with_its_own(recipe_file.load(PeerBench, out / checkpoint.RECIPE_FILE, overrides), out)


def _with_its_own(recipe: PeerBench, out: Path) -> PeerBench:
    own = Tokenizers(str(out / IMAGE_TOKENIZER), str(out / TEXT_TOKENIZER))
    return replace(recipe, tokenizers=own)


def _is_done(out: Path, name: str) -> bool:
    return "curve" in read(out / name / RESULTS_FILE)


def _timed(out: Path) -> set[str]:
    timing = read(out / TIMING_FILE)
    return {entry["peer"] for entry in timing.get("sampling", [])} | set(timing.get("missing", {}))


def _time(recipe: PeerBench, scene: Scene, quality: Quality, out: Path) -> dict[str, str]:
    """Writes `timing.json`, of all peers that are done and whose library and weights are there.

    Drawing is timed as it was judged best, as guidance costs as much as the drawing itself. Gives
    the reasons of those that could not be timed.
    """
    trainers, missing = {}, {}
    for name in (name for name in MAKERS if _is_done(out, name)):
        try:
            trainers[name] = Trainer.trained(name, recipe, scene, out)
        except (NotRunnable, NotTrained) as error:
            missing[name] = str(error)
    if not trainers:
        return missing
    judging, captions = recipe.judging, [scene.captions[i] for i in quality.group.indices]
    peers = {name: trainer.peer for name, trainer in trainers.items()}
    ways = [(name, _best(out, name, steps)) for name in peers for steps in peers[name].steps]
    flops = {name: read(out / name / RESULTS_FILE)["flops_per_update"] for name in trainers}
    timing = {
        "sampling": measure.sampling(peers, ways, scene, captions, judging),
        "training": measure.training(trainers, flops, judging.repeats),
        "machine": measure.machine_class(next(iter(trainers.values())).dtype),
        "missing": missing,
    }
    write(out / TIMING_FILE, timing)
    return missing


def _best(out: Path, name: str, steps: int) -> How:
    last = read(out / name / RESULTS_FILE)["curve"][-1]
    drawn = report.best(last, steps)
    return How(steps, drawn["guidance_scale"], drawn["temperature"])


class Run:
    """One peer, from the first update to its results."""

    def __init__(
        self, name: str, recipe: PeerBench, scene: Scene, quality: Quality, out: Path
    ) -> None:
        self.name, self.recipe, self.scene, self.quality = name, recipe, scene, quality
        self.out, self.folder = out, out / name
        self.plan: dict[str, Any] = read(self.folder / "plan.json")
        self.points: list[dict[str, Any]] = read(self.folder / "curve.json").get("points", [])

    def finish(self) -> bool:
        """All stages that are not done yet; False if it was stopped before the end."""
        if "flops_per_update" not in self.plan:
            flops = self._trainer(0.0, 1).flops_per_update()
            self._note(flops_per_update=flops)
        if not self._search():
            return False
        flops, budget = self.plan["flops_per_update"], self.recipe.budget
        steps = max(1, round(budget.flops / flops))
        trainer = self._trainer(self.plan["lr"], steps)
        shares = range(1, budget.points + 1)
        stops = sorted({max(1, round(steps * i / budget.points)) for i in shares})
        whole, memory = checkpoint.newest(self.folder / "run") is None, measure.Peak()
        done = fit(trainer, self.folder / "run", stops, lambda m: self._judge(trainer, m))
        if done:  # a part of a training does not tell what the whole took
            self._write_results(trainer, memory.megabytes() if whole else None)
        return done

    def _trainer(self, lr: float, steps: int) -> Trainer:
        return Trainer(self.name, self.recipe, self.scene, self.out, lr, steps)

    def _note(self, **what: Any) -> None:
        self.plan.update(what)
        write(self.folder / "plan.json", self.plan)

    def _search(self) -> bool:
        """A short run, down to a learning rate of zero, for each rate; the lowest loss wins.

        A rate at which the loss diverges is noted as null.
        """
        rates = getattr(self.recipe, self.name).lrs
        flops, found = self.plan["flops_per_update"], dict(self.plan.get("search", {}))
        for lr in rates:
            if f"{lr:g}" in found or len(rates) == 1:
                continue
            run = self.folder / "search" / f"lr-{lr:g}"
            steps = max(1, round(self.recipe.budget.search_flops / flops))
            trainer = self._trainer(lr, steps)
            try:
                if not fit(trainer, run, [steps], lambda monitor: None):
                    return False
                last = trainer.last_losses
                found[f"{lr:g}"] = sum(last) / len(last) if last else None
            except Diverged:
                found[f"{lr:g}"] = None
            self._note(search=found)
            _drop_checkpoints(run)
        stable = [lr for lr in rates if found.get(f"{lr:g}", 0.0) is not None]
        if not stable:
            raise UsageError(
                f"{self.name}: the loss diverges with every rate of {self.name}.lrs: begin anew in"
                " another folder with lower ones"
            )
        self._note(lr=min(stable, key=lambda lr: found.get(f"{lr:g}", 0.0)))
        return True

    def _judge(self, trainer: Trainer, monitor: Monitor) -> None:
        """Adds a point to the curve, unless it is there already."""
        if any(point["step"] == trainer.step for point in self.points):
            return
        drawn = []
        for how in trainer.peer.ways(self.recipe.judging):
            figures = self._figures(trainer, how)
            drawn.append({**asdict(how), **figures})
            monitor.say(
                f"{self.name} update {trainer.step}: {how}: top 10 {figures['top10']:.1%},"
                f" top 1 {figures['top1']:.1%}, KID {figures['kid']:.4f}"
            )
        self.points.append(
            {
                "step": trainer.step,
                "flops": trainer.step * self.plan["flops_per_update"],
                "seconds": trainer.seconds,
                "drawn": drawn,
            }
        )
        write(self.folder / "curve.json", {"points": self.points})

    @torch.no_grad()
    def _figures(self, trainer: Trainer, how: How) -> dict[str, float]:
        torch.manual_seed(self.recipe.judging.seed)
        captions = [self.scene.captions[i] for i in self.quality.group.indices]
        pictures = []
        for start in range(0, len(captions), _AT_ONCE):
            latents = trainer.peer.draw(captions[start : start + _AT_ONCE], how)
            pictures += self.scene.decode(latents)
        columns, rows = _SHEET
        shown = [pictures[i * columns : (i + 1) * columns] for i in range(rows)]
        name = str(how).replace(",", "").replace(" ", "-")
        path = self.folder / "run" / "samples" / f"step-{trainer.step:07d}-{name}.png"
        path.parent.mkdir(exist_ok=True)
        contact_sheet([row for row in shown if row], scale=2).save(path)
        return asdict(self.quality(pictures))

    @torch.no_grad()
    def _psnr(self, trainer: Trainer) -> float:
        """Mean over the judged pictures of what the peer's tokens, or latents, leave of them."""
        chosen = self.quality.group.indices
        images = to_tensor(self.scene.data.images[chosen])
        latents = self.scene.latents[chosen].to(trainer.device)
        again = self.scene.images.decode_latents(trainer.peer.reconstruct(latents))
        return psnr(again.cpu(), images).mean().item()

    def _write_results(self, trainer: Trainer, megabytes: float | None) -> None:
        results = {
            "peer": self.name,
            "parameters": parameters(trainer.peer),
            "tokens_per_image": trainer.peer.tokens,
            "psnr": self._psnr(trainer),
            "batch_size": trainer.shape.batch_size,
            "updates": trainer.step,
            "skipped": trainer.skipped,
            **self.plan,
            "seconds": trainer.seconds,
            "training_megabytes": megabytes,
            "curve": self.points,
            "concepts": len(self.quality.group.indices),
            "protocol": self.quality.protocol,
            "machine": measure.machine_class(trainer.dtype),
        }
        write(self.folder / RESULTS_FILE, results)


def _results(out: Path) -> list[dict[str, Any]]:
    """Of all peers that have any, in their order, each with its entries of `timing.json`."""
    timing = read(out / TIMING_FILE)
    found = [result for name in MAKERS if (result := read(out / name / RESULTS_FILE))]
    return [report.with_timing(result, timing) for result in found]


def read(path: Path) -> dict[str, Any]:
    """A JSON file of ours, empty where there is none.

    Raises:
        CheckpointError: it is damaged.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{path}: damaged ({error}): remove it, to do its part again"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: damaged: remove it, to do its part again")
    return content


def write(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file whole, or leaves what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(partial, path)


def _drop_checkpoints(run: Path) -> None:
    """A finished search run needs its logs only."""
    for path in run.glob("step-*.safetensors"):
        path.unlink()
    shutil.rmtree(run / "resume", ignore_errors=True)
