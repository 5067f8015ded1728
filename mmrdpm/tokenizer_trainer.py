"""The updates of an image tokeniser's three phases, and all that an exact resume needs.

All randomness is drawn from (seed, step) for the batch of all ranks, of which each computes its
share, and a step's phase follows from its number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrdpm import checkpoint, distributed, machine, weights
from mmrdpm.data.images import Images
from mmrdpm.errors import CheckpointError, RecipeError, TrainingError
from mmrdpm.optim import Average
from mmrdpm.rdpm.autoencoder import Autoencoder
from mmrdpm.rdpm.codebook import CodebookFit
from mmrdpm.rdpm.image_tokenizer import ImageTokenizerConfig
from mmrdpm.rdpm.published import PublishedConfig
from mmrdpm.rdpm.reconstruction import Reconstruction
from mmrdpm.rdpm.trajectory import encode
from mmrdpm.tokenizer_plan import ImageTokenizerTraining, make_tokenizer

_ENCODED_PIXELS, _ENCODED_IMAGES = 2**20, 256  # at once, through an encoder that learns no more


class TokenizerTrainer:
    """The state of a run: tokeniser, optimisers, codebook fit, data and the number of steps done.

    Raises:
        RecipeError: the parts of the tokeniser do not fit together.
        CheckpointError: an autoencoder or a network to judge by cannot be loaded.
    """

    def __init__(
        self, config: ImageTokenizerConfig, training: ImageTokenizerTraining, data: Images
    ) -> None:
        torch.manual_seed(training.seed)
        self.training, self.data, self.step = training, data, 0
        self.device = machine.device()
        self.tokenizer = make_tokenizer(config, training)
        self.phases = training.phases(bool(self._source) or bool(training.autoencoder_from))
        self.tokenizer.to(self.device)
        self.autoencoder = self.tokenizer.autoencoder.to(
            memory_format=torch.channels_last  # type: ignore[call-overload]
        )
        self.fit = CodebookFit(self.tokenizer.codebook)
        self.optimizer = torch.optim.AdamW(
            self.autoencoder.parameters(), lr=training.lr, betas=(0.9, 0.99), weight_decay=1e-4
        )
        size = config.autoencoder.image_size
        self.reconstruction: Reconstruction | None = None
        if training.loss.adversarial and training.loss.adversarial_start >= training.steps:
            raise RecipeError(
                f"train.loss.adversarial_start is {training.loss.adversarial_start}, but there are"
                f" {training.steps} updates: lower it, or set train.loss.adversarial to 0"
            )
        if self.phases.autoencoder or self.phases.decoder:
            self.reconstruction = Reconstruction(training.loss, size, self.device)
        self.average = Average(self.autoencoder, training.ema) if training.ema else None

    @property
    def _source(self) -> str:
        """The hash of a published autoencoder, empty for our own."""
        config = self.tokenizer.config.autoencoder
        return config.sha256 if isinstance(config, PublishedConfig) else ""

    def describe(self) -> str:
        """One line about the size of things."""
        count = sum(p.numel() for p in self.autoencoder.parameters())
        dtype = machine.matrix_dtype(self.training.precision, self.device)
        ranks = distributed.world_size()
        return (
            f"autoencoder of {count / 1e6:.1f}M parameters{', frozen' * bool(self._source)},"
            f" {self.data.describe()}, {self.device.type} {str(dtype).removeprefix('torch.')}"
            + (f", {ranks} ranks" if ranks > 1 else "")
        )

    @staticmethod
    def shown(phase: str, figures: dict[str, float]) -> dict[str, str]:
        """The few figures to show: the loss, and how the codebook is used where it is fitted."""
        usage = [v for name, v in figures.items() if name.startswith("codebook_usage/")]
        shown = {phase: f"{figures[f'loss/{phase}']:.4f}"}
        if usage:
            dead = sum(int(v) for name, v in figures.items() if name.startswith("dead_codes/"))
            shown |= {"usage": f"{min(usage):.0%}..{max(usage):.0%}", "dead": str(dead)}
        return shown

    def state(self) -> dict[str, Any]:
        """What an exact resume needs beside the tokeniser's own weights. All ranks must call it."""
        return {
            "step": self.step,
            "source": self._source,
            "data": self.data.state(),
            "optimizer": self.optimizer.state_dict(),
            "fit": self.fit.state(),
            "loss": self.reconstruction.state() if self.reconstruction else {},
            "average": self.average.tensors if self.average else {},
        }

    def restore(self, path: Path) -> None:
        """Goes back to where the checkpoint at `path` was taken.

        Raises:
            CheckpointError: it is damaged, of another model or of another version.
        """
        needed = ("step", "source", "data", "optimizer", "fit", "loss", "average")
        state = checkpoint.state_of(path, needed)
        checkpoint.check_keys(path, state["fit"], self.fit.state())
        if state["source"] != self._source:
            raise CheckpointError(
                f"{path}: was begun on a published autoencoder with SHA-256"
                f" {state['source'][:12]}..., which is now {self._source[:12]}...: put the old one"
                " back, or begin anew"
            )
        weights.load_into(self.tokenizer, path)
        self.step = state["step"]
        self.data.restore(state["data"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.fit.restore(state["fit"])
        if self.reconstruction:
            self.reconstruction.restore(state["loss"])
        if self.average:
            self.average.restore(state["average"])

    def run(self) -> Iterator[tuple[str, dict[str, float]]]:
        """Makes the remaining updates; yields the phase and the losses of each, of all ranks.

        Raises:
            TrainingError: a loss is no number.
            DataError: a source failed, or too many of its records are broken. `data.undo()` makes
                this the state after the last update, or after settling, which is then done again.
            SystemExit: so on another rank.
        """
        phases, plan = self.phases, self.training
        while self.step < plan.steps:
            self.data.mark()
            generator = torch.Generator().manual_seed(plan.seed * 1_000_003 + self.step)
            if self.step == phases.autoencoder:
                self._settle(generator)
            if self.step < phases.autoencoder:
                phase, losses = "autoencoder", self._train_autoencoder(generator)
            elif self.step < phases.autoencoder + phases.codebook:
                phase, losses = "codebook", self._fit_codebook(generator)
            else:
                phase, losses = "decoder", self._train_decoder(generator)
            self.step += 1
            if not all(map(math.isfinite, losses.values())):
                raise TrainingError(
                    f"step {self.step}: the loss of the {phase} is no number ({losses}): go on from"
                    " the last checkpoint with --resume and a lower train.lr, or begin anew with a"
                    " lower train.loss.adversarial"
                )
            if self.step == plan.steps and phase == "decoder":
                self._take_average()
            yield phase, losses

    def _settle(self, generator: torch.Generator) -> None:
        """Makes the encoder what it stays: averaged weights, and latents of variance 1."""
        learned = self.phases.autoencoder > 0
        if learned:
            self._take_average()
        if (learned and self.average) or (self._source and not self.training.autoencoder_from):
            self.autoencoder.normalise.set(*self._statistics(generator))

    def _take_average(self) -> None:
        if self.average:
            with torch.no_grad():
                for name, parameter in self.autoencoder.named_parameters():
                    parameter.copy_(self.average.tensors[name])

    @torch.no_grad()
    def _statistics(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Mean and variance of the latents per channel, over all ranks: float64 `[C]` each."""
        self.autoencoder.eval()
        sums = torch.zeros(3, self.tokenizer.latent_channels, dtype=torch.float64)
        for _ in range(math.ceil(self.training.statistics_images / self.training.batch_size)):
            images = self._images(self.data.images(self.training.batch_size, generator))
            for part in images.split(self._chunk):
                with self._autocast():
                    x = self.autoencoder.raw_latents(part)
                x = x.double().transpose(0, 1).flatten(1).cpu()
                sums += torch.stack([torch.ones_like(x), x, x.square()]).sum(2)
        count, first, second = distributed.sum_over_ranks(sums.to(self.device))
        return first / count, second / count - (first / count).square()

    def _train_autoencoder(self, generator: torch.Generator) -> dict[str, float]:
        """Reconstruction through noisy latents."""
        images = self._images(self.data.images(self.training.batch_size, generator))
        self.autoencoder.train()
        with self._autocast():
            latents = self.autoencoder.encode(images)
            noise = self.training.latent_noise * self._noise(latents, generator, 1)[0]
            output = self.autoencoder.decode(latents + noise)
        return self._update(output, images, self.step, self.phases.autoencoder)

    @torch.no_grad()
    def _fit_codebook(self, generator: torch.Generator) -> dict[str, float]:
        """One pass over whole trajectories from fresh noise; the loss is the latent error."""
        _, latents = self._encoded(self.training.codebook_batch, generator)
        trajectory = self.tokenizer.trajectory
        noise = self._noise(latents, generator, trajectory.num_noises)
        state = trajectory.start(noise)
        for timestep in range(trajectory.num_timesteps, 0, -1):
            residual = trajectory.residual(latents, noise, state, timestep)
            state = state + self.fit.observe(residual, timestep, generator)
        if self.step - self.phases.autoencoder < self.phases.codebook // 2:
            self.fit.tie()
        return _means({"codebook": (state - latents).square().mean()})

    def _train_decoder(self, generator: torch.Generator) -> dict[str, float]:
        """Reconstruction from the codes, and from the clean latents, by the decoder alone."""
        images, latents = self._encoded(self.training.batch_size, generator)
        images = self._images(images)
        trajectory, codebook = self.tokenizer.trajectory, self.tokenizer.codebook
        noise = self._noise(latents, generator, trajectory.num_noises)
        _, states = encode(trajectory, codebook, latents, noise)
        with self._autocast():
            output = self.autoencoder.decode(torch.cat([states[0], latents]))
        done = self.step - self.phases.autoencoder - self.phases.codebook
        return self._update(output, torch.cat([images, images]), done, self.phases.decoder)

    def _update(self, output: Tensor, images: Tensor, done: int, of: int) -> dict[str, float]:
        """One step of AdamW, when so many of the phase are done; the rate falls as a cosine."""
        assert isinstance(self.autoencoder, Autoencoder) and self.reconstruction
        warmup = min(1.0, (done + 1) / 50)
        lr = self.training.lr * warmup * 0.5 * (1 + math.cos(math.pi * done / of))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        last = self.autoencoder.last_layer
        with self._autocast():
            total, parts = self.reconstruction.loss(output, images, last, self.step)
        self.optimizer.zero_grad()
        total.backward()
        distributed.average_gradients(self.autoencoder.parameters())
        self.optimizer.step()
        if self.average:
            self.average.update(self.step + 1)
        with self._autocast():
            parts |= self.reconstruction.learn(output, images, self.step)
        phase = "autoencoder" if self.step < self.phases.autoencoder else "decoder"
        return _means({phase: total.detach(), **parts})

    def _autocast(self) -> torch.autocast:
        dtype = machine.matrix_dtype(self.training.precision, self.device)
        return machine.autocast(dtype, self.device)

    def _images(self, images: Tensor) -> Tensor:
        return images.to(self.device).contiguous(memory_format=torch.channels_last)

    def _noise(self, latents: Tensor, generator: torch.Generator, num_noises: int) -> Tensor:
        """This rank's share of the noise of all: float32 `[num_noises, B, *grid, C]`."""
        rank, ranks = distributed.rank(), distributed.world_size()
        shape = (num_noises, len(latents) * ranks, *latents.shape[1:])
        return torch.randn(shape, generator=generator)[:, rank::ranks].to(self.device)

    @property
    def _chunk(self) -> int:
        size = self.tokenizer.image_size
        return max(1, min(_ENCODED_IMAGES, _ENCODED_PIXELS // size**2))

    def _encoded(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.data.encoded(count, generator, self._encode)

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        """Latents with the stored statistics, as at inference: float32."""
        self.autoencoder.eval()
        with self._autocast():
            chunks = [
                self.autoencoder.encode(chunk.to(self.device)).float()
                for chunk in images.split(self._chunk)
            ]
        return torch.cat(chunks)


def _means(losses: dict[str, Tensor]) -> dict[str, float]:
    values = distributed.mean_over_ranks(torch.stack([v.float() for v in losses.values()]))
    return dict(zip(losses, values.tolist(), strict=True))
