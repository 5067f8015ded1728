"""Checkpoints of a run: weights for everybody, and the state that an exact resume needs.

    DIR/recipe.yaml                       the resolved recipe
    DIR/step-0000500.safetensors          weights, the newest last by name
    DIR/resume/step-0000500.safetensors   optimiser, data position, random seeds: a tree of tensors
    DIR/resume/step-0000500/              the same of a sharded model: the tree, and in shards/ what
                                          is sharded, a file a rank (`engine.shards`)

The state is written before the weights and removed after them, so that weights without a state do
not exist, whenever the process is killed: the newest weights are the newest checkpoint.
"""

from __future__ import annotations

import fcntl
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from mmrdpm import distributed, hub, recipe, tree, weights
from mmrdpm.errors import CheckpointError, DamagedError

RECIPE_FILE, LOG_FILE, SKIPPED_FILE = "recipe.yaml", "metrics.jsonl", "skipped.jsonl"
_STATE, _SHARDS = "state.safetensors", "shards"  # in the folder of a sharded state
_RESUME, _LOCK = "resume", ".lock"
_NAME = re.compile(r"step-\d{7}\.safetensors")
MOST_STEPS = 9_999_999  # that such a name can hold


@dataclass(frozen=True)
class CheckpointPolicy:
    """When a run saves and logs, in steps, and how many checkpoints it keeps.

    Attributes:
        keep: so many of the newest.
        keep_every: and those of all steps that are a multiple of this one; 0 keeps none of them.
    """

    every: int = field(default=500, metadata={"min": 1})
    keep: int = field(default=2, metadata={"min": 1})
    keep_every: int = field(default=0, metadata={"min": 0})
    log_every: int = field(default=20, metadata={"min": 1})


MAY_CHANGE = frozenset(f"checkpoint.{key.name}" for key in fields(CheckpointPolicy))


def save_before_fault(step: int, saved: int, save: Callable[[], None]) -> str:
    """Saves the updates done before a batch that failed; says so. All ranks must call it.

    Args:
        saved: updates that the last checkpoint holds, 0 where there is none.
    """
    if step > saved:
        save()
    held = "this step is the last saved" if step else "nothing was done yet, nothing is saved"
    return f"step {step}  no next batch: {held}"


def begin(run: Path, resolved: Any, resume: bool, free: Collection[str] = ()) -> None:
    """Looks whether a run may begin in a folder, which is made, or go on in it.

    Nothing is written yet: what is wrong with the recipe's parts should not leave half a run.

    Args:
        free: dotted keys that may differ when a run goes on.

    Raises:
        CheckpointError: `resume` is off and there is a run, or a log, that did something; it is on
            and there is no run, or one of another recipe.
    """
    path, idle = run / RECIPE_FILE, _is_idle(run)
    if not resume:
        if (path.exists() and not idle) or newest(run):
            raise CheckpointError(
                f"{run}: holds a run already: go on with --resume, or name another folder"
            )
        if (log := run / LOG_FILE).exists() and not idle:
            raise CheckpointError(f"{log}: is the log of something else: name another folder")
        run.mkdir(parents=True, exist_ok=True)
        return
    if not path.exists():
        raise CheckpointError(f"{run}: no run to resume: leave --resume out to begin one")
    if newest(run) and not (run / _RESUME).exists():
        raise CheckpointError(
            f"{run}: holds weights but no state of a training, as an export does: begin another"
            f" run with model.init_from={run}"
        )
    saved = recipe.from_dict(type(resolved), recipe.read(path), str(path))
    for key, old, new in recipe.differences(recipe.to_dict(saved), recipe.to_dict(resolved)):
        if key not in free:
            here = idle and not key.startswith("tokenizers.")  # their copies are not taken away
            raise CheckpointError(
                f"{run}: was begun with {key}={old}, not {new}: resume it with the same recipe, or"
                f" begin anew {'without --resume or ' if here else ''}in another folder"
            )


def _is_idle(run: Path) -> bool:
    """Whether a start failed there before it did anything: the empty log shows that it was one."""
    log = run / LOG_FILE
    return log.is_file() and not (log.stat().st_size or newest(run) or (run / _RESUME).exists())


def forget(run: Path, alone: bool) -> None:
    """Makes a run that `begin` lets begin anew one that has not begun; its folder is claimed.

    Args:
        alone: whether it is known that no other process trains in it, see `claimed`.

    Raises:
        CheckpointError: there is something to forget, and that is not known.
    """
    if (run / RECIPE_FILE).exists():
        if not alone:
            raise CheckpointError(
                f"{run}: holds a start that has done nothing yet, perhaps of a process still at"
                f" work, as files cannot be locked here: name another folder, or take {RECIPE_FILE}"
                " away if there is none"
            )
        (run / SKIPPED_FILE).unlink(missing_ok=True)
        (run / RECIPE_FILE).unlink()  # last, as it says that there is something to forget


@contextmanager
def claimed(run: Path) -> Iterator[bool]:
    """Keeps other jobs out of a run's folder while the block runs.

    Gives whether it can, which on a file system without locks is not so; only rank 0 knows.

    Raises:
        CheckpointError: another process trains in it.
    """
    alone = False
    with open(run / _LOCK, "w", encoding="utf-8") as file:

        def lock() -> None:
            nonlocal alone
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except BlockingIOError:
                raise CheckpointError(
                    f"{run}: another process is training in this folder: wait for its end, or stop"
                    " it"
                ) from None
            except OSError:
                pass  # a file system without locks

        distributed.first(lock)
        yield alone


def record(run: Path, resolved: Any, tokenizers: Mapping[str, tuple[Path, Sequence[str]]]) -> None:
    """Makes a run begin: copies its tokenizers, then writes its recipe, which is what says so.

    Of a run that goes on only the recipe is written, where it has changed.

    Args:
        tokenizers: places in the run's folder, and the folders of which files are copied there.

    Raises:
        CheckpointError: something could not be written, or the folder holds other tokenizers.
    """
    path = run / RECIPE_FILE
    begun = path.exists()
    if begun and recipe.read(path) == recipe.to_dict(resolved):
        return
    try:
        for place, (source, files) in () if begun else tokenizers.items():
            _bring(source, run / place, files)
        partial = path.with_name(path.name + ".partial")
        recipe.dump(resolved, partial)
        weights.put(partial, path)
    except OSError as error:
        raise CheckpointError(
            f"{run}: its recipe could not be written: {error}: make room"
        ) from None


def _bring(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copies a tokeniser whole or not at all; one that is there must be the same, byte by byte."""
    if target.exists():
        for name in names:
            here, there = target / name, source / name
            if here.is_file() != there.is_file() or (
                here.is_file() and here.read_bytes() != there.read_bytes()
            ):
                raise CheckpointError(
                    f"{here}: is not that of {source}, which the run would begin with: name"
                    " another folder, or take it away"
                )
        return
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed start has left
    copy_files(source, partial, names)
    partial.rename(target)


def copy_files(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copies those files of a folder that are there into another, which is made."""
    target.mkdir(parents=True)
    for name in names:
        if (source / name).is_file():
            shutil.copy2(source / name, target / name)


def tokenizer(run: Path, place: str, name: str, files: Sequence[str]) -> Path:
    """The folder of a tokeniser: the run's own copy once it has begun, else the one of that name.

    Args:
        files: those to fetch where the name is a hub id.

    Raises:
        CheckpointError: it is no folder, or the hub cannot be reached.
    """
    own = (run / RECIPE_FILE).exists() and (run / place).is_dir()
    source = run / place if own else hub.resolve("tokenizers", name, files)
    if not source.is_dir():
        raise CheckpointError(f"{source}: a tokeniser is a folder, not a file")
    return source


def save(
    run: Path,
    step: int,
    parameters: Mapping[str, Tensor],
    about: Any,
    state: Any,
    sharded: bool = False,
) -> Path:
    """Writes one checkpoint; `about` lies readable in the weights' header.

    Args:
        sharded: whether a part of the state lies in `shards_to_write` already.

    Raises:
        CheckpointError: it could not be written; earlier ones are untouched.
    """
    path = run / f"step-{step:07d}.safetensors"
    weights.check_finite(parameters, path)
    whole = run / _RESUME / path.name
    folder = whole.with_suffix("")
    if folder.exists():  # of weights that were taken away
        aside = folder.with_suffix(".old.partial")
        shutil.rmtree(aside, ignore_errors=True)
        _move(folder, aside)
    if sharded:
        partial = shards_to_write(run, step).parent
        tree.save(state, partial / _STATE)
        _move(partial, folder)
        whole.unlink(missing_ok=True)
    else:
        tree.save(state, whole)
    weights.save(parameters, path, about)
    return path


def _move(folder: Path, to: Path) -> None:
    try:
        folder.rename(to)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot become {to.name}: {error.strerror}: look at the disk"
        ) from None


def shards_to_write(run: Path, step: int) -> Path:
    """Where the ranks put their shards of a checkpoint, before `save` makes it one."""
    return run / _RESUME / f"step-{step:07d}.partial" / _SHARDS


def shards_of(path: Path) -> Path | None:
    """The folder of the shards saved with the weights at `path`, None where all is whole."""
    folder = path.parent / _RESUME / path.stem / _SHARDS
    return folder if folder.is_dir() else None


def newest(run: Path) -> Path | None:
    """The weights of the newest checkpoint, None where there is none."""
    return max(_all(run), default=None)


def agreed(run: Path) -> Path | None:
    """The newest checkpoint, the same for all ranks: all must call it.

    Raises:
        CheckpointError: ranks see different ones.
    """
    latest = newest(run)
    seen = {path.name if path else "none" for path in distributed.gather_objects(latest)}
    if len(seen) > 1:
        raise CheckpointError(
            f"{run}: the ranks see different newest checkpoints ({', '.join(sorted(seen))}): put"
            " the folder on a disk that all nodes share"
        )
    return latest


def resume(run: Path, restore: Callable[[Path], None]) -> None:
    """Goes back to the newest checkpoint, where there is one: all ranks must call it.

    Raises:
        CheckpointError: ranks see different ones, or it cannot be restored.
    """
    if latest := agreed(run):
        try:
            restore(latest)
        except DamagedError as error:
            earlier = _all(run)[:-1]
            to = f"go on from {earlier[-1].name}" if earlier else "begin anew"
            raise DamagedError(f"{error}; or take {latest.name} away to {to}") from None


def state_of(path: Path, needed: Collection[str] = ()) -> Any:
    """The resume state saved with the weights at `path`, what lies in shards left out.

    Raises:
        CheckpointError: it is missing or damaged, or lacks something that is needed.
    """
    shards = shards_of(path)
    state = tree.load(shards.parent / _STATE if shards else path.parent / _RESUME / path.name)
    check_keys(path, state, needed)
    return state


def check_keys(path: Path, state: Collection[str], needed: Collection[str]) -> None:
    """Raises CheckpointError if the state saved with the weights at `path` lacks something."""
    if missing := set(needed) - set(state):
        raise CheckpointError(
            f"{path}: its state lacks {', '.join(sorted(missing))}: go on with the version of"
            " mmrdpm that wrote it, or begin anew"
        )


def prune(run: Path, policy: CheckpointPolicy) -> None:
    """Removes the checkpoints that the policy does not keep, and states without weights.

    Weights go first: a kill in between leaves a state too many, never one too few.
    """
    for path in _all(run)[: -policy.keep]:
        if not policy.keep_every or step_of(path) % policy.keep_every:
            path.unlink()
    for state in (run / _RESUME).glob("step-*"):
        if not (run / f"{state.name[:12]}.safetensors").exists():
            _remove(state)
    for folder in (run, run / _RESUME):
        for torn in folder.glob("step-*.partial"):  # of a process that was killed while saving
            _remove(torn)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def step_of(path: Path) -> int:
    """The step whose weights lie at `path`."""
    return int(path.stem.removeprefix("step-"))


class Writer:
    """Writes checkpoints one after the other, beside the training where that is safe.

    In the background only what is a copy may be written, such as tensors fetched from a GPU. What
    went wrong is raised by the next call.
    """

    def __init__(self, background: bool) -> None:
        self._pool = ThreadPoolExecutor(1) if background else None
        self._last: Future[None] | None = None

    def write(self, work: Callable[[], None]) -> None:
        """Does the work, or waits for the last one and begins this one."""
        self.finish()
        if self._pool is None:
            work()
        else:
            self._last = self._pool.submit(work)

    def finish(self) -> None:
        """Waits until all is written."""
        if self._last is not None:
            last, self._last = self._last, None
            last.result()


def _all(run: Path) -> list[Path]:
    return sorted(path for path in run.glob("step-*.safetensors") if _NAME.fullmatch(path.name))
