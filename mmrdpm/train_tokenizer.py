"""Trains tokenisers: of text in one go, of images in one resumable loop.

An image tokeniser learns in three phases after each other: first the autoencoder, then the
codebook, then the decoder again; one on top of another's autoencoder leaves out the first. All
randomness is drawn from (seed, step), and a step's phase follows from its number, so a run can stop
anywhere and go on as if it had not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mmrdpm import checkpoint, machine, shipped, text_tokenizer, weights
from mmrdpm.checkpoint import CheckpointPolicy
from mmrdpm.data.emoji import load_emoji
from mmrdpm.data.glosses import load_glosses
from mmrdpm.data.pictures import to_tensor
from mmrdpm.errors import CheckpointError, RecipeError
from mmrdpm.machine import Precision
from mmrdpm.monitor import Monitor
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.rdpm.autoencoder import reconstruction_loss
from mmrdpm.rdpm.codebook import CodebookFit
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from mmrdpm.rdpm.trajectory import encode
from mmrdpm.text_tokenizer import TextTokenizer


@dataclass(frozen=True)
class ImageTokenizerTraining:
    """How an image tokeniser is trained.

    Attributes:
        steps: updates of all phases together.
        codebook_share, decoder_share: of the steps, those of the two later phases.
        autoencoder_from: name or folder of a tokeniser whose autoencoder is taken as it is; then
            the codebook has all steps but the decoder's.
        latent_noise: standard deviation of the noise on the latents, whose own is 1.
        codebook_batch: images per codebook update; many residuals are needed per code.
        precision: of convolutions; auto is bf16 where the CPU has instructions for it, else fp32.
    """

    steps: int = field(default=5000, metadata={"min": 3})
    codebook_share: float = field(default=0.04, metadata={"min": 0.0, "max": 0.5})
    decoder_share: float = field(default=0.16, metadata={"min": 0.0, "max": 0.5})
    autoencoder_from: str | None = None
    lr: float = field(default=1e-3, metadata={"min": 0.0})
    batch_size: int = field(default=64, metadata={"min": 2})
    codebook_batch: int = field(default=512, metadata={"min": 1})
    latent_noise: float = field(default=0.2, metadata={"min": 0.0})
    precision: Precision = "auto"
    seed: int = field(default=0, metadata={"min": 0, "max": 2**40})
    threads: int = field(default=2, metadata={"min": 1})

    @property
    def codebook_steps(self) -> int:
        if self.autoencoder_from:
            return self.steps - self.decoder_steps
        return max(1, round(self.steps * self.codebook_share))

    @property
    def decoder_steps(self) -> int:
        return round(self.steps * self.decoder_share)

    @property
    def autoencoder_steps(self) -> int:
        if self.autoencoder_from:
            return 0
        return max(1, self.steps - self.codebook_steps - self.decoder_steps)


@dataclass(frozen=True)
class ImageTokenizerRecipe:
    """A recipe of kind `image`, trained on the training pictures of the emoji data."""

    tokenizer: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    train: ImageTokenizerTraining = field(default_factory=ImageTokenizerTraining)
    checkpoint: CheckpointPolicy = field(default_factory=CheckpointPolicy)
    kind: Literal["image"] = "image"


@dataclass(frozen=True)
class TextTokenizerRecipe:
    """A recipe of kind `text`, trained on the names and definitions of the embedded data."""

    model: Literal["bpe", "sentencepiece"] = "bpe"
    vocab_size: int = field(default=4096, metadata={"min": 257, "max": 1_000_000})
    kind: Literal["text"] = "text"


def train_text(recipe: TextTokenizerRecipe, folder: Path) -> TextTokenizer:
    """Trains a text tokeniser into a folder: a matter of seconds, so there is nothing to resume.

    Raises:
        CheckpointError: the folder holds a run already.
    """
    if (folder / checkpoint.RECIPE_FILE).exists():
        raise CheckpointError(f"{folder}: holds a tokeniser already: name another folder")
    data = load_emoji(8)
    names = [data.names[i] for i in data.indices("train")]
    fit = {"bpe": text_tokenizer.train_bpe, "sentencepiece": text_tokenizer.train_sentencepiece}
    tokenizer = fit[recipe.model](names + load_glosses(), recipe.vocab_size)
    tokenizer.save(folder)
    checkpoint.record(folder, recipe, {})
    return tokenizer


def train_image(recipe: ImageTokenizerRecipe, run: Path, resume: bool = False) -> bool:
    """Trains an image tokeniser into a run folder; False if it was stopped before the end.

    Raises:
        RecipeError: the parts of the tokeniser do not fit together.
        CheckpointError: the folder holds another run, or a checkpoint could not be written.
    """
    machine.prepare(recipe.train.threads)
    data = load_emoji(recipe.tokenizer.autoencoder.image_size)
    images = to_tensor(data.images[data.indices("train")])
    trainer = TokenizerTrainer(recipe.tokenizer, recipe.train, images)
    checkpoint.begin(run, recipe, resume)
    checkpoint.record(run, recipe, {})
    if latest := checkpoint.newest(run):
        trainer.restore(latest)
    with Monitor(run, "image tokeniser", recipe.train.steps, trainer.step) as monitor:
        for step, phase, loss in trainer.run():
            monitor.advance(step)
            if step % recipe.checkpoint.log_every == 0:
                monitor.record(step, {f"loss/{phase}": loss}, {phase: f"{loss:.4f}"})
            last = step == recipe.train.steps or monitor.stopping
            if last or step % recipe.checkpoint.every == 0:
                tensors = trainer.tokenizer.state_dict()
                checkpoint.save(run, step, tensors, {}, trainer.state())
                checkpoint.prune(run, recipe.checkpoint)
            if last:
                break
    if finished := trainer.step == recipe.train.steps:
        trainer.tokenizer.save(run)
    return finished


class TokenizerTrainer:
    """The state of a run: tokeniser, optimiser, codebook fit and the number of steps done."""

    def __init__(
        self, config: ImageTokenizerConfig, training: ImageTokenizerTraining, images: Tensor
    ) -> None:
        torch.manual_seed(training.seed)
        self.training, self.images, self.step = training, images, 0
        self.tokenizer = ImageTokenizer(config)
        if training.autoencoder_from:
            adopt_autoencoder(self.tokenizer, training.autoencoder_from)
        self.autoencoder = self.tokenizer.autoencoder.to(
            memory_format=torch.channels_last  # type: ignore[call-overload]
        )
        self.latents: Tensor | None = None  # of all images, once the encoder learns no more
        self.fit = CodebookFit(self.tokenizer.codebook)
        self.optimizer = torch.optim.AdamW(
            self.autoencoder.parameters(), lr=training.lr, betas=(0.9, 0.99), weight_decay=1e-4
        )

    def state(self) -> dict[str, Any]:
        """What an exact resume needs beside the tokeniser's own weights."""
        return {
            "step": self.step,
            "optimizer": self.optimizer.state_dict(),
            "fit": {"counts": self.fit.counts, "sums": self.fit.sums},
        }

    def restore(self, path: Path) -> None:
        """Goes back to where the checkpoint at `path` was taken."""
        weights.load_into(self.tokenizer, path)
        state = checkpoint.state_of(path)
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.fit.counts, self.fit.sums = state["fit"]["counts"], state["fit"]["sums"]

    def run(self) -> Iterator[tuple[int, str, float]]:
        """Makes the remaining updates; yields the step's number, its phase and its loss."""
        plan = self.training
        while self.step < plan.steps:
            generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + self.step)
            if self.step < plan.autoencoder_steps:
                phase, loss = "autoencoder", self._train_autoencoder(generator)
            elif self.step < plan.autoencoder_steps + plan.codebook_steps:
                phase, loss = "codebook", self._fit_codebook(generator)
            else:
                phase, loss = "decoder", self._train_decoder(generator)
            self.step += 1
            yield self.step, phase, loss

    def _train_autoencoder(self, generator: torch.Generator) -> float:
        """Reconstruction through noisy latents."""
        images = self._images(self._draw(self.training.batch_size, generator))
        self.autoencoder.train()
        with self._autocast():
            latents = self.autoencoder.encode(images)
            noise = self.training.latent_noise * torch.randn(latents.shape, generator=generator)
            output = self.autoencoder.decode(latents + noise)
        progress = self.step / self.training.autoencoder_steps
        return self._update(reconstruction_loss(output, images), progress)

    @torch.no_grad()
    def _fit_codebook(self, generator: torch.Generator) -> float:
        """One pass over whole trajectories from fresh noise; the loss is the latent error."""
        latents = self._latents(self._draw(self.training.codebook_batch, generator))
        trajectory = self.tokenizer.trajectory
        noise = torch.randn((trajectory.num_noises, *latents.shape), generator=generator)
        state = trajectory.start(noise)
        for timestep in range(trajectory.num_timesteps, 0, -1):
            residual = trajectory.residual(latents, noise, state, timestep)
            state = state + self.fit.observe(residual, timestep, generator)
        if self.step - self.training.autoencoder_steps < self.training.codebook_steps // 2:
            self.fit.tie()
        return (state - latents).square().mean().item()

    def _train_decoder(self, generator: torch.Generator) -> float:
        """Reconstruction from the codes, and from the clean latents, by the decoder alone."""
        chosen = self._draw(self.training.batch_size, generator)
        images, latents = self._images(chosen), self._latents(chosen)
        trajectory, codebook = self.tokenizer.trajectory, self.tokenizer.codebook
        noise = torch.randn((trajectory.num_noises, *latents.shape), generator=generator)
        _, states = encode(trajectory, codebook, latents, noise)
        with self._autocast():
            output = self.autoencoder.decode(torch.cat([states[0], latents]))
        done = self.step - self.training.autoencoder_steps - self.training.codebook_steps
        loss = reconstruction_loss(output, torch.cat([images, images]))
        return self._update(loss, done / self.training.decoder_steps)

    def _autocast(self) -> torch.autocast:
        device = torch.device("cpu")
        return machine.autocast(machine.matrix_dtype(self.training.precision, device), device)

    def _draw(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(self.images), (count,), generator=generator)

    def _images(self, chosen: Tensor) -> Tensor:
        return self.images[chosen].contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def _latents(self, chosen: Tensor) -> Tensor:
        """Latents with the stored statistics, as at inference."""
        if self.latents is None:
            self.autoencoder.eval()
            with self._autocast():
                chunks = [self.autoencoder.encode(chunk) for chunk in self.images.split(256)]
            self.latents = torch.cat(chunks).float()
        return self.latents[chosen]

    def _update(self, loss: Tensor, progress: float) -> float:
        """One step of AdamW; the learning rate falls as a cosine over the phase's progress."""
        warmup = min(1.0, (progress * self.training.steps + 1) / 50)
        lr = self.training.lr * warmup * 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def adopt_autoencoder(tokenizer: ImageTokenizer, source: str) -> None:
    """Copies the autoencoder of the tokeniser of that name or folder.

    Raises:
        RecipeError: it has another shape.
        MmrdpmError: there is no such tokeniser, or it is damaged.
    """
    theirs = image_tokenizer.load(shipped.resolve("tokenizers", source))
    wanted, found = tokenizer.config.autoencoder, theirs.config.autoencoder
    if wanted != found:
        raise RecipeError(
            f"train.autoencoder_from: {source} has {found}, but tokenizer.autoencoder is {wanted}:"
            " make them equal"
        )
    tokenizer.autoencoder.load_state_dict(theirs.autoencoder.state_dict())
