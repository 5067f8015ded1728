"""How an image tokeniser is trained, and with what it begins: anew, or on another's autoencoder."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from mmrdpm import checkpoint, recipe, shipped, weights
from mmrdpm.checkpoint import MOST_STEPS
from mmrdpm.errors import RecipeError
from mmrdpm.machine import Precision
from mmrdpm.rdpm import image_tokenizer, published
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from mmrdpm.rdpm.published import PublishedAutoencoder, PublishedConfig
from mmrdpm.rdpm.reconstruction import LossConfig
from mmrdpm.rdpm.usage import CollapseConfig


@dataclass(frozen=True)
class Phases:
    """Updates of each phase, in their order."""

    autoencoder: int
    codebook: int
    decoder: int


@dataclass(frozen=True)
class ImageTokenizerTraining:
    """How an image tokeniser is trained.

    Attributes:
        steps: updates of all phases together.
        codebook_share, decoder_share: of the steps, those of the two later phases.
        autoencoder_from: name or folder of a tokeniser, or of a run of one that was stopped, whose
            autoencoder is taken as it is; then the codebook has all steps but the decoder's, as it
            has on a published autoencoder.
        batch_size: images per update of all ranks together.
        latent_noise: standard deviation of the noise on the latents, whose own is 1.
        codebook_batch: images per codebook update; many residuals are needed per code.
        loss: of the reconstruction.
        ema: decay of the moving average of the autoencoder's weights, which each phase leaves in
            their place; 0 is off.
        statistics_images: images on which the latents' mean and variance are measured, for a
            published autoencoder and for averaged weights.
        collapse: when the codebook is given up.
        precision: of convolutions; auto is bf16 where the machine has instructions for it, else
            fp32.
        timeout: seconds after which a rank that does nothing ends the job.
        wandb: project of Weights & Biases to log to, "" for none.
    """

    steps: int = field(default=5000, metadata={"min": 3, "max": MOST_STEPS})
    codebook_share: float = field(default=0.04, metadata={"min": 0.0, "max": 0.5})
    decoder_share: float = field(default=0.16, metadata={"min": 0.0, "max": 0.5})
    autoencoder_from: str | None = None
    lr: float = field(default=1e-3, metadata={"min": 0.0, "max": 1e30})
    batch_size: int = field(default=64, metadata={"min": 2})
    codebook_batch: int = field(default=512, metadata={"min": 1})
    latent_noise: float = field(default=0.2, metadata={"min": 0.0})
    loss: LossConfig = field(default_factory=LossConfig)
    ema: float = field(default=0.0, metadata={"min": 0.0, "max": 0.999999})
    statistics_images: int = field(default=8192, metadata={"min": 1})
    collapse: CollapseConfig = field(default_factory=CollapseConfig)
    precision: Precision = "auto"
    seed: int = field(default=0, metadata={"min": 0, "max": 2**40})
    threads: int = field(default=2, metadata={"min": 1, "max": 1024})
    timeout: float = field(default=600.0, metadata={"min": 1.0})
    wandb: str = ""

    def phases(self, frozen: bool) -> Phases:
        """The phases, the first left out where the autoencoder is another's.

        Raises:
            RecipeError: no update is left for one that has to learn.
        """
        decoder = round(self.steps * self.decoder_share)
        if frozen:
            return Phases(0, self.steps - decoder, decoder)
        codebook = max(1, round(self.steps * self.codebook_share))
        if self.steps <= codebook + decoder:
            raise RecipeError(
                f"train.steps {self.steps}: codebook_share and decoder_share leave no update for"
                " the autoencoder: lower the shares, or raise the steps"
            )
        return Phases(self.steps - codebook - decoder, codebook, decoder)


def make_tokenizer(
    config: ImageTokenizerConfig, training: ImageTokenizerTraining
) -> ImageTokenizer:
    """A new tokeniser, on the autoencoder that the recipe names if it names one.

    Raises:
        RecipeError: that one is of another shape, or is to learn although it is published.
        CheckpointError: it cannot be loaded.
    """
    if isinstance(config.autoencoder, PublishedConfig):
        if training.decoder_share:
            raise RecipeError(
                f"train.decoder_share is {training.decoder_share}, but a published autoencoder"
                " stays as it is: set it to 0"
            )
        if training.ema or training.loss != LossConfig():
            raise RecipeError(
                "train.ema and train.loss are for an autoencoder that learns, and a published one"
                " stays as it is: leave them out"
            )
        autoencoder, tensors = published.fetch(config.autoencoder)
        tokenizer = ImageTokenizer(replace(config, autoencoder=autoencoder))
        assert isinstance(tokenizer.autoencoder, PublishedAutoencoder)
        tokenizer.autoencoder.model.load_state_dict(tensors)
        tokenizer.autoencoder.check()
    else:
        tokenizer = ImageTokenizer(config)
    if training.autoencoder_from:
        adopt_autoencoder(tokenizer, training.autoencoder_from)
    return tokenizer


def adopt_autoencoder(tokenizer: ImageTokenizer, source: str) -> None:
    """Copies the autoencoder of the tokeniser of that name or folder.

    Raises:
        RecipeError: it has another shape.
        MmrdpmError: there is no such tokeniser, or it is damaged.
    """
    theirs = _finished_or_stopped(shipped.resolve("tokenizers", source))
    wanted, found = tokenizer.config.autoencoder, theirs.config.autoencoder
    if wanted != found:
        raise RecipeError(
            f"train.autoencoder_from: {source} has {found}, but tokenizer.autoencoder is {wanted}:"
            " make them equal"
        )
    tokenizer.autoencoder.load_state_dict(theirs.autoencoder.state_dict())


def _finished_or_stopped(folder: Path) -> ImageTokenizer:
    """The tokeniser in a folder; that of the newest checkpoint while its run has not ended."""
    latest = checkpoint.newest(folder)
    if latest is None or (folder / image_tokenizer.WEIGHTS_FILE).is_file():
        return image_tokenizer.load(folder)
    path = folder / checkpoint.RECIPE_FILE
    section = recipe.read(path).get("tokenizer") or {}
    tokenizer = ImageTokenizer(recipe.from_dict(ImageTokenizerConfig, section, str(path)))
    weights.load_into(tokenizer, latest)
    return tokenizer
