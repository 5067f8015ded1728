"""Trains an image tokeniser: first the autoencoder, then the codebook, then the decoder again.

One loop, three phases after each other. All randomness is drawn from (seed, step), and a step's
phase follows from its number, so a run can stop anywhere and go on as if it had not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmrdpm.rdpm.autoencoder import reconstruction_loss
from mmrdpm.rdpm.codebook import CodebookFit
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from mmrdpm.rdpm.trajectory import encode


@dataclass(frozen=True)
class ImageTokenizerTraining:
    """How an image tokeniser is trained.

    Attributes:
        autoencoder_steps, codebook_steps, decoder_steps: updates of each phase.
        latent_noise: standard deviation of the noise on the latents, whose own is 1.
        codebook_batch: images per codebook update; many residuals are needed per code.
    """

    autoencoder_steps: int = field(default=4000, metadata={"min": 1})
    codebook_steps: int = field(default=300, metadata={"min": 1})
    decoder_steps: int = field(default=500, metadata={"min": 0})
    lr: float = 1e-3
    batch_size: int = field(default=128, metadata={"min": 2})
    codebook_batch: int = field(default=1024, metadata={"min": 1})
    latent_noise: float = field(default=0.2, metadata={"min": 0.0})
    seed: int = 0
    threads: int = field(default=2, metadata={"min": 1})

    @property
    def total_steps(self) -> int:
        return self.autoencoder_steps + self.codebook_steps + self.decoder_steps


class TokenizerTrainer:
    """The state of a run: tokeniser, optimiser, codebook fit and the number of steps done."""

    def __init__(
        self, config: ImageTokenizerConfig, training: ImageTokenizerTraining, images: Tensor
    ) -> None:
        torch.manual_seed(training.seed)
        self.training, self.images, self.step = training, images, 0
        self.tokenizer = ImageTokenizer(config)
        self.autoencoder = self.tokenizer.autoencoder.to(
            memory_format=torch.channels_last  # type: ignore[call-overload]
        )
        self.fit = CodebookFit(self.tokenizer.codebook)
        self.optimizer = torch.optim.AdamW(
            self.autoencoder.parameters(), lr=training.lr, betas=(0.9, 0.99), weight_decay=1e-4
        )

    def run(self) -> Iterator[tuple[int, str, float]]:
        """Makes the remaining updates; yields the step's number, its phase and its loss."""
        plan = self.training
        while self.step < plan.total_steps:
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
        images = self._draw(self.training.batch_size, generator)
        self.autoencoder.train()
        with torch.autocast("cpu", torch.bfloat16):
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
        images = self._draw(self.training.batch_size, generator)
        latents = self._latents(images)
        trajectory, codebook = self.tokenizer.trajectory, self.tokenizer.codebook
        noise = torch.randn((trajectory.num_noises, *latents.shape), generator=generator)
        _, states = encode(trajectory, codebook, latents, noise)
        with torch.autocast("cpu", torch.bfloat16):
            output = self.autoencoder.decode(torch.cat([states[0], latents]))
        done = self.step - self.training.autoencoder_steps - self.training.codebook_steps
        loss = reconstruction_loss(output, torch.cat([images, images]))
        return self._update(loss, done / self.training.decoder_steps)

    def _draw(self, count: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(self.images), (count,), generator=generator)
        return self.images[chosen].contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def _latents(self, images: Tensor) -> Tensor:
        """Latents with the stored statistics, as at inference."""
        self.autoencoder.eval()
        with torch.autocast("cpu", torch.bfloat16):
            return self.autoencoder.encode(images).float()

    def _update(self, loss: Tensor, progress: float) -> float:
        """One step of AdamW; the learning rate falls as a cosine over the phase's progress."""
        warmup = min(1.0, (progress * self.training.total_steps + 1) / 50)
        lr = self.training.lr * warmup * 0.5 * (1 + math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()
