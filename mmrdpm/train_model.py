"""Trains the transformer on packed documents: one visible loop.

A run folder holds all that it needs: the resolved recipe, copies of its tokenizers, checkpoints,
logs and samples. The data, the noise and the timesteps follow from (seed, document), so a run that
was stopped, or killed, goes on as if it had not been.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrdpm import checkpoint, distributed, machine, pretrained, text_tokenizer, weights
from mmrdpm.api import IMAGE_TOKENIZER, TEXT_TOKENIZER, TOKENIZER_FILES, Model, build
from mmrdpm.attention import backend
from mmrdpm.data.loader import Loader, merge_states
from mmrdpm.engine import parallel, shards
from mmrdpm.engine.guard import Guard
from mmrdpm.engine.meter import Meter
from mmrdpm.engine.parallel import Objective, Parallel
from mmrdpm.engine.shards import ShardWriter
from mmrdpm.errors import DataError, RecipeError, TrainingError
from mmrdpm.identity import check_identity, identity
from mmrdpm.model_recipe import ModelRecipe, may_change
from mmrdpm.monitor import Monitor
from mmrdpm.objective import summed_weights
from mmrdpm.optim import Average, Optimizers, learning_rate
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.samples import sample
from mmrdpm.transformer import Transformer
from mmrdpm.vocabulary import Vocabulary


def train(recipe: ModelRecipe, run: Path, resume: bool = False) -> bool:
    """Trains a model into a run folder; False if it was stopped before the end.

    Under torchrun every rank calls it. A job that torchrun started again goes on by itself.

    Raises:
        CheckpointError: the folder holds another run, or a checkpoint could not be written.
        DataError: a source failed or too many of its records are broken; what was done is saved.
        DistributedError: another rank was lost.
        TrainingError: the loss is no number, again and again.
    """
    machine.prepare(recipe.train.threads)
    with distributed.joined(recipe.train.timeout):
        again = distributed.restarted()
        resume = resume or (again and (run / checkpoint.RECIPE_FILE).exists())
        if not resume:
            recipe.data.check_outside(run)
        distributed.first(
            lambda: checkpoint.begin(
                run,
                pretrained.complete(recipe, run if resume else None),
                resume,
                may_change(run, recipe) if resume else (),
            )
        )
        with checkpoint.claimed(run) as alone:
            distributed.first(lambda: None if resume else checkpoint.forget(run, alone))
            trainer = Trainer(recipe, run)
            trainer.check_prompts()  # a faulty one should not leave half a run
            distributed.first(lambda: checkpoint.record(run, trainer.recipe, trainer.tokenizers))
            with distributed.Watchdog(recipe.train.timeout) as dog:
                return _loop(trainer.recipe, run, trainer, dog)


def _loop(recipe: ModelRecipe, run: Path, trainer: Trainer, dog: distributed.Watchdog) -> bool:
    plan, policy = recipe.train, recipe.checkpoint
    checkpoint.resume(run, trainer.restore)
    with Monitor(run, run.name, plan.steps, trainer.step, plan.wandb) as monitor:
        monitor.say(f"{trainer.describe()}; {run}")
        if trainer.parallel.sharded and recipe.samples.prompts:
            monitor.say("samples.prompts: a sharded model is not drawn from while it is trained")
        dog.doing("drawing the first samples")
        trainer.sample(monitor)
        stopping = False
        while trainer.step < plan.steps and not stopping:
            dog.doing(f"update {trainer.step + 1}")
            try:
                accepted = trainer.update()
            except (DataError, SystemExit):  # of all ranks alike, before the update has begun
                monitor.say(trainer.save_before_fault(run))
                raise
            if not accepted:
                monitor.say(f"step {trainer.step}  {trainer.guard.report()}")
            if trainer.guard.lost_patience:
                monitor.say(trainer.roll_back(run))
                monitor.rewind(trainer.step)
                continue
            step, last = trainer.step, trainer.step == plan.steps
            stopping = distributed.anyone(monitor.stopping)
            monitor.advance(step)
            if last or step % policy.log_every == 0:
                monitor.record(step, *trainer.figures())
            good = not trainer.guard.bad_in_a_row  # else the last checkpoint is the better one
            if last or stopping or (good and step % policy.every == 0):
                dog.doing(f"saving step {step}")
                trainer.save(run)
            if last or step % recipe.samples.every == 0:
                dog.doing(f"drawing samples of step {step}")
                trainer.sample(monitor)
        trainer.finish_writing()
    return trainer.step == plan.steps


class Trainer:
    """The state of a run: weights, optimisers, place in the data and the number of updates.

    Attributes:
        step, saved: updates done, and those that the last checkpoint holds.
    """

    def __init__(self, recipe: ModelRecipe, run: Path) -> None:
        recipe = pretrained.complete(recipe, run)
        self.recipe, plan, model = recipe, recipe.train, recipe.model
        self.step = self.saved = 0
        if recipe.data.rows % distributed.world_size():
            raise RecipeError(
                f"data.rows is {recipe.data.rows}, no multiple of {distributed.world_size()} ranks:"
                " change one of them"
            )
        names = (recipe.tokenizers.image, recipe.tokenizers.text)
        self.tokenizers = {
            place: (checkpoint.tokenizer(run, place, name, files), files)
            for name, (place, files) in zip(names, TOKENIZER_FILES.items(), strict=True)
        }
        self.device = machine.device()
        self.images = image_tokenizer.load(self.tokenizers[IMAGE_TOKENIZER][0]).to(self.device)
        self.texts = text_tokenizer.load(self.tokenizers[TEXT_TOKENIZER][0])
        self.vocabulary = Vocabulary(self.texts.size, self.images.codebook_size)
        self.dtype = machine.matrix_dtype(plan.precision, self.device)
        head_dim, length = model.head_dim, recipe.data.seq_len
        self.attention = backend.resolve(plan.attention, self.device, head_dim, length)
        with torch.device("meta"):
            self.transformer = self._built()
        self.transformer.plan = backend.planner(self.attention)
        self.transformer.recompute = plan.recompute
        self.parameters = sum(p.numel() for p in self.transformer.parameters())
        torch.manual_seed(plan.seed)
        mode = parallel.resolve(plan.parallel, self.parameters, self.device)
        self.parallel = Parallel(self._objective(), mode, self.device, self.dtype)
        guesses = self.images.estimates(recipe.model.sees_start_noise)
        self.transformer.know_codes(self.images.codebook.codes, guesses)
        self.origin = ""
        if (name := recipe.model.init_from) and checkpoint.agreed(run) is None:
            self.origin = pretrained.begin(self.transformer, name, self.vocabulary, self.texts)
        self.compiled = plan.compile and self.device.type == "cuda"
        if self.compiled:
            # kernels are kept by function, not by model, and only the first eight shapes of each
            torch.compiler.reset()
            self.transformer.compile_layers()
        self.optimizers = Optimizers(
            self.transformer, recipe.optimizer, self.dtype, width=model.width
        )
        self.average = Average(self.transformer, plan.ema) if plan.ema else None
        self.guard, self.meter = Guard(plan.guard), self._meter()
        background = self.device.type == "cuda"
        self.writer = checkpoint.Writer(background)
        self.shards = ShardWriter(background) if self.parallel.sharded else None
        self.loader = Loader(
            recipe.data,
            plan.seed,
            self.images,
            self.texts,
            self.vocabulary,
            distributed.rank(),
            distributed.world_size(),
            run / checkpoint.SKIPPED_FILE,
        )
        self.latest: dict[str, float] = {}

    def _objective(self) -> Objective:
        plan = self.recipe.train
        return Objective(
            self.transformer,
            text_weight=plan.text_weight,
            z_weight=plan.z_loss,
            soft_labels=plan.soft_labels,
            codes_apart=plan.codes_apart,
        )

    def _meter(self) -> Meter:
        model = self.transformer
        stack = sum(
            p.numel() for part in (model.attentions, model.feed_forwards) for p in part.parameters()
        )
        ids, width = model.table.weight.shape
        of_text, of_code = ids, ids
        if self.recipe.train.codes_apart:
            of_text, of_code = model.code_ids.start, ids - model.code_ids.start
        rate = machine.peak_rate(self.device, self.dtype)
        weights = (stack, of_text * width, of_code * width)
        return Meter(self.images.num_timesteps, self.device, rate, weights)

    def describe(self) -> str:
        """One line about the size of things."""
        tokens = self.recipe.data.rows * self.recipe.data.seq_len
        ranks = distributed.world_size()
        return (
            f"{self.parameters / 1e6:.1f}M parameters, {tokens} tokens an update,"
            f" {self.loader.describe()},"
            f" {self.device.type} {str(self.dtype).removeprefix('torch.')},"
            f" attention {self.attention}"
            + (f", {ranks} ranks ({self.parallel.mode})" if ranks > 1 else "")
            + (f", {self.origin}" if self.origin else "")
        )

    def update(self) -> bool:
        """One optimiser step on the next batch; False if the guard skipped it.

        Raises:
            DataError: there is no next batch; nothing was done but to read.
            SystemExit: so on another rank.
        """
        plan, begun = self.recipe.train, self.meter.start()
        rows = distributed.on_all(self.loader.batch).to(self.device)
        waited = time.perf_counter() - begun
        divisor = distributed.sum_over_ranks(summed_weights(rows, plan.text_weight))
        size = plan.micro_batch_size or len(rows.targets)
        parts = [rows.rows(slice(i, i + size)) for i in range(0, len(rows.targets), size)]
        losses = self.parallel.backward(parts, divisor)
        lr = learning_rate(plan.lr, self.step, plan.steps, plan.warmup, plan.schedule, plan.decay)
        norm = self.optimizers.clip()
        self.step += 1
        if good := self.guard.accepts(norm):
            self.optimizers.step(lr)
            self.meter.add(losses, rows.layout.document_ids, waited)
            if self.average:
                self.average.update(self.step)
        self.optimizers.clear()
        self.latest = {"lr": lr, "gradient_norm": norm}
        return good

    def figures(self) -> tuple[dict[str, float], dict[str, str]]:
        """For the log, and the few to show, since the last call. All ranks must call it."""
        logged, shown = self.meter.figures()
        guard = {"skipped_updates": self.guard.skipped, "rollbacks": self.guard.rollbacks}
        latest = {n: v for n, v in self.latest.items() if math.isfinite(v)}  # JSON knows no others
        return {**logged, **latest, **guard, **self.loader.figures()}, shown

    def _place(self) -> dict[str, Any]:
        """The place in the data of all ranks together. All ranks must call it."""
        return merge_states(distributed.gather_objects(self.loader.state()))

    def save(self, run: Path) -> None:
        """Writes a checkpoint of the run. All ranks must call it."""
        self.finish_writing()
        step, policy, sharded = self.step, self.recipe.checkpoint, self.shards is not None
        raw = dict(self.transformer.named_parameters())
        used = distributed.gather(self.average.tensors if self.average else raw)
        about = {**identity(self.images, self.texts), "step": step}
        state = {
            "step": step,
            "data": self._place(),
            "optimizers": self.optimizers.state(moments=not sharded),
            "guard": self.guard.state(),
            "meter": self.meter.state(),
            "raw": distributed.gather(raw) if self.average and not sharded else None,
            "moments": list(self.optimizers.moments()) if sharded else None,
        }
        written = None
        if self.shards:
            written = self.shards.begin(self._sharded(), checkpoint.shards_to_write(run, step))

        def write() -> None:
            if written:
                written()
            if distributed.is_main():
                checkpoint.save(run, step, used, about, state, sharded)
                checkpoint.prune(run, policy)

        self.writer.write(write)
        self.saved = step

    def save_before_fault(self, run: Path) -> str:
        """See `checkpoint.save_before_fault`; what is still being written is waited for."""
        self.loader.undo()
        said = checkpoint.save_before_fault(self.step, self.saved, lambda: self.save(run))
        self.finish_writing()
        return said

    def finish_writing(self) -> None:
        """Waits for the last checkpoint; where it failed on a rank, all end. All call it."""
        failed = None
        try:
            self.writer.finish()
        except Exception as error:
            failed = error
        if distributed.anyone(failed is not None):
            raise failed or SystemExit(1)

    def _sharded(self, moments: Collection[str] = ()) -> dict[str, Tensor]:
        """What is cut over the ranks of a sharded model, by name; see `Optimizers.moments`."""
        parts: dict[str, dict[str, Tensor]] = {
            "weights": dict(self.transformer.named_parameters()),
            "average": self.average.tensors if self.average else {},
            "moments": self.optimizers.moments(moments),
        }
        return {
            f"{part}.{n}": tensor for part, named in parts.items() for n, tensor in named.items()
        }

    def restore(self, path: Path) -> None:
        """Goes back to where the checkpoint at `path` was taken.

        Raises:
            CheckpointError: it is damaged, of another model or of another version.
        """
        needed = ("step", "data", "optimizers", "guard", "meter", "raw")
        state = checkpoint.state_of(path, needed)
        check_identity(path, self.images, self.texts)
        self.optimizers.restore(state["optimizers"])
        if folder := checkpoint.shards_of(path):
            shards.load(self._sharded(state["moments"]), folder)
        else:
            weights.load_into(self.transformer, path)
            if self.average:
                self.average.restore(weights.load(path)[0])
                weights.fill(self.transformer, state["raw"])
        self.step = self.saved = state["step"]
        self.loader.restore(state["data"])
        self.guard.restore(state["guard"])
        self.meter.restore(state["meter"])

    def roll_back(self, run: Path) -> str:
        """Goes back to the last checkpoint, but not in the data; says so.

        Raises:
            TrainingError: there is no checkpoint, or it has happened too often.
        """
        self.finish_writing()
        guard, latest = self.guard, checkpoint.agreed(run)
        if latest is None or guard.rollbacks >= guard.config.rollbacks:
            way = "go on with --resume and" if latest else "begin anew with"
            raise TrainingError(
                f"{run}: step {self.step}: {guard.report()}, after {guard.rollbacks} returns to a"
                f" checkpoint: {way} a lower train.lr, or look at the data"
            )
        place, counts = self._place(), guard.state()
        self.restore(latest)
        self.loader.restore(place)
        guard.restore(counts)
        guard.bad_in_a_row, guard.rollbacks = 0, guard.rollbacks + 1
        return f"back to {latest.name}, the data goes on"

    def model(self, averaged: bool = True) -> Model:
        """The model as it stands, its weights averaged if they are, to sample from."""
        transformer, recipe = self.transformer, self.recipe
        if averaged and self.average:
            transformer = self._built().to(self.device)
            weights.fill(transformer, self.average.tensors)
        return Model(transformer, self.images, self.texts, recipe.sampling, recipe.data.seq_len)

    def _built(self) -> Transformer:
        """A fresh transformer of the recipe."""
        recipe = self.recipe
        return build(recipe.model, self.vocabulary, self.images, recipe.train.soft_labels)

    def check_prompts(self) -> None:
        """Raises UsageError where a prompt to sample is empty or too long."""
        asked = self.model(averaged=False)
        for prompt in () if self.parallel.sharded else self.recipe.samples.prompts:
            asked.prompt_ids(prompt)

    def sample(self, monitor: Monitor) -> None:
        """Draws and captions into the log, on rank 0.

        A model that is sharded is not gathered for it: `mmrdpm generate --model RUN` draws from
        its checkpoints.
        """
        if self.recipe.samples.prompts and distributed.is_main() and not self.parallel.sharded:
            # the few shapes that a layer is compiled for are those of training
            stance = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
            with stance:
                sample(self.model(), self.recipe.samples, self.step, monitor)
