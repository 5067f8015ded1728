"""Trains the transformer on packed documents: one visible loop.

A run folder holds all that it needs: the resolved recipe, copies of its tokenizers, checkpoints,
logs and samples. The data, the noise and the timesteps follow from (seed, document), so a run that
was stopped, or killed, goes on as if it had not been.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from mmrdpm import checkpoint, machine, shipped, text_tokenizer, weights
from mmrdpm.api import IMAGE_TOKENIZER, TEXT_TOKENIZER, Model, build
from mmrdpm.attention import backend
from mmrdpm.attention.backend import Name
from mmrdpm.checkpoint import CheckpointPolicy
from mmrdpm.data.emoji import load_emoji
from mmrdpm.data.loader import Loader
from mmrdpm.data.pictures import contact_sheet, to_pictures, to_tensor
from mmrdpm.data.plan import DataPlan
from mmrdpm.errors import CheckpointError
from mmrdpm.machine import Precision
from mmrdpm.monitor import Monitor
from mmrdpm.objective import Losses, loss
from mmrdpm.optim import OptimizerConfig, Optimizers, learning_rate
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.sampling.image import Guided
from mmrdpm.transformer import TransformerConfig
from mmrdpm.vocabulary import Vocabulary


@dataclass(frozen=True)
class Tokenizers:
    """Names of shipped tokenizers, or folders."""

    image: str = "emoji-rdpm-32"
    text: str = "emoji-bpe-4k"


@dataclass(frozen=True)
class Training:
    """How the transformer is trained.

    Attributes:
        steps: updates; the learning rate falls to zero at the last.
        lr: peak learning rate, reached after `warmup` updates.
        text_weight: weight of a text target; an image target weighs 1.
        precision: of matrix products, weights stay float32; auto is bf16 where the machine has
            instructions for it, else fp32.
        attention: backend; auto takes xformers on CUDA where it is installed, else sdpa.
        threads: CPU threads; another number sums in another order, so it is part of the recipe.
    """

    steps: int = field(default=6000, metadata={"min": 1})
    lr: float = field(default=3e-3, metadata={"min": 0.0})
    warmup: int = field(default=100, metadata={"min": 0})
    text_weight: float = field(default=1.0, metadata={"min": 0.0})
    precision: Precision = "auto"
    attention: Name = "auto"
    seed: int = field(default=0, metadata={"min": 0})
    threads: int = field(default=2, metadata={"min": 1})


@dataclass(frozen=True)
class Samples:
    """What is drawn and captioned while the run goes on, every `every` updates.

    Attributes:
        prompts: names of the embedded data; each is drawn, and its own picture captioned.
    """

    every: int = field(default=500, metadata={"min": 1})
    prompts: tuple[str, ...] = ("red heart", "red paper lantern", "dog face", "rainbow", "snowman")


@dataclass(frozen=True)
class ModelRecipe:
    """A recipe of kind `model`."""

    tokenizers: Tokenizers = field(default_factory=Tokenizers)
    model: TransformerConfig = field(default_factory=TransformerConfig)
    data: DataPlan = field(default_factory=DataPlan)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: Training = field(default_factory=Training)
    checkpoint: CheckpointPolicy = field(default_factory=CheckpointPolicy)
    samples: Samples = field(default_factory=Samples)
    sampling: Guided = field(default_factory=Guided)
    kind: Literal["model"] = "model"


def train(recipe: ModelRecipe, run: Path, resume: bool = False) -> bool:
    """Trains a model into a run folder; False if it was stopped before the end.

    Raises:
        CheckpointError: the folder holds another run, or a checkpoint could not be written.
    """
    plan = recipe.train
    machine.prepare(plan.threads)
    checkpoint.begin(run, recipe, resume)
    trainer = Trainer(recipe, run)
    if latest := checkpoint.newest(run):
        trainer.restore(latest)
    meter = Meter(trainer.images.num_timesteps)
    with Monitor(run, run.name, plan.steps, trainer.step) as monitor:
        monitor.say(f"{trainer.describe()}; {run}")
        sample(trainer, monitor, recipe.samples)
        while trainer.step < plan.steps and not monitor.stopping:
            meter.add(*trainer.update())
            step, last = trainer.step, trainer.step == plan.steps
            monitor.advance(step)
            if last or step % recipe.checkpoint.log_every == 0:
                monitor.record(step, *meter.figures())
            if last or step % recipe.checkpoint.every == 0 or monitor.stopping:
                trainer.save(run)
                checkpoint.prune(run, recipe.checkpoint.keep)
            if last or step % recipe.samples.every == 0:
                sample(trainer, monitor, recipe.samples)
    return trainer.step == plan.steps


class Trainer:
    """The state of a run: weights, optimisers, place in the data and the number of updates."""

    def __init__(self, recipe: ModelRecipe, run: Path) -> None:
        self.recipe, self.step = recipe, 0
        self.images = image_tokenizer.load(_adopt(run, IMAGE_TOKENIZER, recipe.tokenizers.image))
        self.texts = text_tokenizer.load(_adopt(run, TEXT_TOKENIZER, recipe.tokenizers.text))
        self.vocabulary = Vocabulary(self.texts.size, self.images.codebook_size)
        self.device = machine.device()
        self.dtype = machine.matrix_dtype(recipe.train.precision, self.device)
        self.attention = backend.resolve(recipe.train.attention, self.device)
        torch.manual_seed(recipe.train.seed)
        transformer = build(recipe.model, self.vocabulary, self.images)
        self.transformer = transformer.to(self.device)
        self.transformer.plan = backend.planner(self.attention)
        self.optimizers = Optimizers(self.transformer, recipe.optimizer, self.dtype)
        self.loader = Loader(
            recipe.data,
            recipe.train.seed,
            self.images,
            self.texts,
            self.vocabulary,
            skipped_log=run / "skipped.jsonl",
        )

    def describe(self) -> str:
        """One line about the size of things."""
        parameters = sum(p.numel() for p in self.transformer.parameters())
        tokens = self.recipe.data.rows * self.recipe.data.seq_len
        return (
            f"{parameters / 1e6:.1f}M parameters, {tokens} tokens an update,"
            f" {self.loader.describe()},"
            f" {self.device.type} {str(self.dtype).removeprefix('torch.')},"
            f" attention {self.attention}"
        )

    def update(self) -> tuple[Losses, dict[str, float]]:
        """One optimiser step on the next batch."""
        plan = self.recipe.train
        packed = self.loader.batch().to(self.device)
        with machine.autocast(self.dtype, self.device):
            losses = loss(self.transformer, packed, plan.text_weight)
        losses.total.backward()
        lr = learning_rate(plan.lr, self.step, plan.steps, plan.warmup)
        norm = self.optimizers.step(lr)
        self.step += 1
        tokens = int((packed.layout.document_ids >= 0).sum())
        figures = {"lr": lr, "gradient_norm": norm, "tokens": tokens}
        return losses, figures | self.loader.figures()

    def save(self, run: Path) -> None:
        """Writes a checkpoint of the run."""
        about = {"vocabulary": self.vocabulary.to_dict(), "step": self.step}
        state = {
            "step": self.step,
            "data": self.loader.state(),
            "optimizers": self.optimizers.state(),
        }
        checkpoint.save(run, self.step, self.transformer.state_dict(), about, state)

    def restore(self, path: Path) -> None:
        """Goes back to where the checkpoint at `path` was taken."""
        weights.load_into(self.transformer, path)
        state = checkpoint.state_of(path)
        self.step = state["step"]
        self.loader.restore(state["data"])
        self.optimizers.restore(state["optimizers"])

    def model(self) -> Model:
        """The model as it stands, to sample from."""
        return Model(
            self.transformer,
            self.images,
            self.texts,
            self.recipe.sampling,
            self.recipe.data.seq_len,
        )


class Meter:
    """Mean losses per modality and timestep, and speed, since they were last read."""

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps
        self._clear()

    def _clear(self) -> None:
        self.sums = torch.zeros(self.num_timesteps + 2, dtype=torch.float64)
        self.counts = torch.zeros_like(self.sums)
        self.tokens, self.begun = 0.0, time.perf_counter()
        self.latest: dict[str, float] = {}

    def add(self, losses: Losses, figures: dict[str, float]) -> None:
        """Takes in one update."""
        row = (losses.timesteps + 1).cpu()  # 0 is text, 1 the clean block, which has no loss
        self.sums.index_add_(0, row, losses.per_token.double().cpu())
        self.counts.index_add_(0, row, torch.ones(len(row), dtype=torch.float64))
        self.tokens += figures["tokens"]
        self.latest = figures

    def figures(self) -> tuple[dict[str, float], dict[str, str]]:
        """All figures for the log, and the few to show; begins anew."""
        speed = self.tokens / (time.perf_counter() - self.begun)
        means = self.sums / self.counts
        image = (self.sums[2:].sum() / self.counts[2:].sum()).item()
        logged = {
            "loss/text": means[0].item(),
            "loss/image": image,
            **{f"loss/timestep_{t:02d}": means[t + 1].item() for t in self._seen()},
            "lr": self.latest["lr"],
            "gradient_norm": self.latest["gradient_norm"],
            "tokens_per_second": speed,
            **{name: value for name, value in self.latest.items() if name.startswith("data/")},
        }
        first, last = means[self.num_timesteps + 1].item(), means[2].item()
        shown = {
            "text": f"{means[0]:.3f}",
            "image": f"{image:.3f}",
            f"(t={self.num_timesteps}": f"{first:.2f}",
            "t=1": f"{last:.2f})",
            "tokens/s": f"{speed:,.0f}",
        }
        kept = {name: value for name, value in logged.items() if value == value}
        self._clear()
        return kept, shown

    def _seen(self) -> list[int]:
        return [t for t in range(1, self.num_timesteps + 1) if self.counts[t + 1]]


def sample(trainer: Trainer, monitor: Monitor, plan: Samples) -> None:
    """Draws and captions the plan's prompts into the log and `DIR/samples/`.

    The sheet has two rows: the true pictures, as far as the data holds them, and the drawn ones.
    """
    model, step = trainer.model(), trainer.step
    data = load_emoji(trainer.images.image_size)
    index = {name: i for i, name in enumerate(data.names)}
    known = [index[p] for p in plan.prompts if p in index]
    true = to_pictures(to_tensor(data.images[known])) if known else []
    drawn = model.generate(plan.prompts)
    sheet = contact_sheet([true, drawn], scale=3)
    folder = monitor.run / "samples"
    folder.mkdir(exist_ok=True)
    sheet.save(folder / f"step-{step:07d}.png")
    monitor.picture("samples", step, sheet)
    pairs = zip((data.names[i] for i in known), model.caption(true), strict=True)
    captions = "; ".join(f"{name} -> {caption or '(nothing)'}" for name, caption in pairs)
    monitor.text("captions", step, captions)
    monitor.say(f"step {step}  captions: {captions}")


def _adopt(run: Path, place: str, name: str) -> Path:
    """The run's own copy of a tokeniser, made when the run begins."""
    own = run / place
    if not own.is_dir():
        source = shipped.resolve("tokenizers", name)
        if not source.is_dir():
            raise CheckpointError(f"{source}: a tokeniser is a folder, not a file")
        partial = own.with_name(own.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        partial.rename(own)
    return own
