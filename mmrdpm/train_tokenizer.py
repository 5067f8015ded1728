"""Trains tokenisers: of text in one go, of images in one resumable loop.

An image tokeniser learns in three phases after each other: first the autoencoder, then the
codebook, then the decoder again; one on top of another's autoencoder leaves out the first. A run
can stop anywhere and go on as if it had not, and under torchrun all ranks train one tokeniser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from mmrdpm import checkpoint, distributed, machine, text_tokenizer
from mmrdpm.checkpoint import CheckpointPolicy
from mmrdpm.data.images import ImagePlan, check_batches, open_images
from mmrdpm.data.texts import TextPlan, read_texts
from mmrdpm.errors import CheckpointError, DataError
from mmrdpm.monitor import Monitor
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.rdpm.image_tokenizer import ImageTokenizerConfig
from mmrdpm.text_tokenizer import TextTokenizer
from mmrdpm.tokenizer_plan import ImageTokenizerTraining
from mmrdpm.tokenizer_trainer import TokenizerTrainer

MAY_CHANGE = checkpoint.MAY_CHANGE | {  # when a run goes on
    *("data.max_broken_share", "data.workers", "train.timeout", "train.wandb"),
    "train.lr",  # the way on from a loss that is no number
}


@dataclass(frozen=True)
class ImageTokenizerRecipe:
    """A recipe of kind `image`."""

    tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    train: ImageTokenizerTraining = field(default_factory=ImageTokenizerTraining)
    checkpoint: CheckpointPolicy = field(default_factory=CheckpointPolicy)
    data: ImagePlan = field(default_factory=ImagePlan)
    kind: Literal["image"] = "image"


@dataclass(frozen=True)
class TextTokenizerRecipe:
    """A recipe of kind `text`."""

    model: Literal["bpe", "sentencepiece"] = "bpe"
    vocab_size: int = field(default=4096, metadata={"min": 257, "max": 1_000_000})
    data: TextPlan = field(default_factory=TextPlan)
    kind: Literal["text"] = "text"


def train_text(recipe: TextTokenizerRecipe, folder: Path) -> TextTokenizer:
    """Trains a text tokeniser into a folder, in one go: there is nothing to resume.

    Raises:
        CheckpointError: the folder holds a run already.
        DataError: a source cannot be read, or too many of its records are broken.
        RecipeError: there are not ids enough.
    """
    _check_free(folder, (checkpoint.RECIPE_FILE, *text_tokenizer.FILES))
    fit = {"bpe": text_tokenizer.train_bpe, "sentencepiece": text_tokenizer.train_sentencepiece}
    tokenizer = fit[recipe.model](read_texts(recipe.data), recipe.vocab_size)
    tokenizer.save(folder)
    checkpoint.record(folder, recipe, {})
    return tokenizer


def train_image(recipe: ImageTokenizerRecipe, run: Path, resume: bool = False) -> bool:
    """Trains an image tokeniser into a run folder; False if it was stopped before the end.

    Under torchrun every rank calls it. A job that torchrun started again goes on by itself.

    Raises:
        RecipeError: the parts of the tokeniser do not fit together.
        DataError: a source cannot be used or failed, or too many of its records are broken; what
            was done is saved.
        CheckpointError: the folder holds another run, or a checkpoint could not be written.
        DistributedError: another rank was lost.
        TrainingError: the codebook has collapsed.
    """
    plan = recipe.train
    machine.prepare(plan.threads)
    with distributed.joined(plan.timeout):
        check_batches(recipe.data, plan.batch_size, plan.codebook_batch)
        size = recipe.tokenizer.autoencoder.image_size
        skipped_log = run / checkpoint.SKIPPED_FILE
        data = open_images(recipe.data, plan.seed, size, plan.batch_size, skipped_log)
        trainer = TokenizerTrainer(recipe.tokenizer, plan, data)
        again = distributed.restarted()
        resume = resume or (again and (run / checkpoint.RECIPE_FILE).exists())
        distributed.first(lambda: _open(recipe, run, resume))
        with checkpoint.claimed(run) as alone:
            distributed.first(lambda: None if resume else checkpoint.forget(run, alone))
            distributed.first(lambda: checkpoint.record(run, recipe, {}))
            with distributed.Watchdog(plan.timeout) as dog:
                return _loop(recipe, run, trainer, dog)


def _open(recipe: ImageTokenizerRecipe, run: Path, resume: bool) -> None:
    checkpoint.begin(run, recipe, resume, MAY_CHANGE)
    if not resume:
        _check_free(run, image_tokenizer.FILES)


def _check_free(folder: Path, files: Sequence[str]) -> None:
    """A tokeniser may lie there without a recipe, as in every run of a model."""
    for name in files:
        if (folder / name).exists():
            raise CheckpointError(
                f"{folder}: holds a tokeniser already ({name}): name another folder"
            )


def _loop(
    recipe: ImageTokenizerRecipe, run: Path, trainer: TokenizerTrainer, dog: distributed.Watchdog
) -> bool:
    plan, policy = recipe.train, recipe.checkpoint
    checkpoint.resume(run, trainer.restore)
    saved = trainer.step
    with Monitor(run, "image tokeniser", plan.steps, trainer.step, plan.wandb) as monitor:
        monitor.say(f"{trainer.describe()}; {run}")
        updates = trainer.run()
        while trainer.step < plan.steps:
            try:
                phase, losses = next(updates)
            except (DataError, SystemExit):  # of all ranks alike, before the update has begun
                trainer.data.undo()
                write = partial(save, trainer, run, policy)
                monitor.say(checkpoint.save_before_fault(trainer.step, saved, write))
                raise
            step = trainer.step
            dog.doing(f"update {step + 1}")
            stopping = distributed.anyone(monitor.stopping)
            monitor.advance(step)
            if step % policy.log_every == 0:
                figures = {f"loss/{name}": value for name, value in losses.items()}
                figures |= trainer.data.figures() | trainer.fit.usage.check(plan.collapse, run)
                monitor.record(step, figures, trainer.shown(phase, figures))
            # the first codebook update holds the finished autoencoder, for after a collapse
            autoencoder_is_done = step == trainer.phases.autoencoder + 1
            if step == plan.steps or step % policy.every == 0 or autoencoder_is_done or stopping:
                save(trainer, run, policy)
                saved = step
            if stopping:
                break
    finished = trainer.step == plan.steps
    if finished and distributed.is_main():
        trainer.tokenizer.save(run)
    return finished


def save(trainer: TokenizerTrainer, run: Path, policy: CheckpointPolicy) -> None:
    """Writes a checkpoint of the run. All ranks must call it."""
    state = trainer.state()
    if distributed.is_main():
        checkpoint.save(run, trainer.step, trainer.tokenizer.state_dict(), {}, state)
        checkpoint.prune(run, policy)
