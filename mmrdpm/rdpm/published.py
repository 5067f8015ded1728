"""Autoencoders published for diffusers, frozen: their latents, normalised per channel.

A trained tokeniser holds a copy of the weights (float16, in its one weights file) and of the
architecture (in its spec), so it needs neither the hub nor the folder that they came from; the
hash of the original weights says which they were.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrdpm import hub, weights
from mmrdpm.errors import CheckpointError, MmrdpmError, RecipeError
from mmrdpm.rdpm.autoencoder import LatentNorm

_CLASSES = ("AutoencoderKL", "AutoencoderDC")
_WEIGHTS = "diffusion_pytorch_model"
_FILES = (
    *("config.json", f"{_WEIGHTS}.safetensors", f"{_WEIGHTS}.safetensors.index.json"),
    f"{_WEIGHTS}-*-of-*.safetensors",
)
"""What is fetched from a hub: not the halves and the pickles beside them."""


@dataclass(frozen=True)
class PublishedConfig:
    """An `AutoencoderKL` or `AutoencoderDC` of diffusers.

    Attributes:
        diffusers: hub id or folder.
        subfolder: where it lies inside, as `vae` in a whole pipeline.
        architecture: its `config.json` as a text, filled in when training begins.
        sha256: of its tensors, names and float32 values, filled in too.
    """

    diffusers: str
    subfolder: str = ""
    image_size: int = field(default=256, metadata={"min": 1})
    architecture: str = ""
    sha256: str = ""

    @property
    def details(self) -> dict[str, Any]:
        """What `config.json` says.

        Raises:
            RecipeError: it is not filled in, or is no architecture that is known.
        """
        return _details(self.architecture, self.diffusers)

    @property
    def latent_channels(self) -> int:
        return self.details["latent_channels"]

    @property
    def factor(self) -> int:
        return 2 ** (len(_widths(self.details)) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image_size // self.factor
        return side, side


class PublishedAutoencoder(nn.Module):
    """The model of diffusers between pixels and normalised latents; it never learns."""

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__()
        self.config = config
        if config.image_size % config.factor:
            raise RecipeError(
                f"tokenizer.autoencoder.image_size is {config.image_size}: it must be a multiple of"
                f" {config.factor}, which {config.diffusers} shrinks it by"
            )
        self.model: Any = _build(config)
        self.normalise = LatentNorm(config.latent_channels)
        self.requires_grad_(False)

    @torch.no_grad()
    def check(self) -> None:
        """Raises RecipeError unless pictures become latents of its shape, and pictures again."""
        config, cells, source = self.config, 2, self.config.diffusers
        images = torch.zeros(1, 3, cells * config.factor, cells * config.factor)
        try:
            latents = self.raw_latents(images)
            output = self.decode(latents.permute(0, 2, 3, 1))
        except (RuntimeError, ValueError, TypeError) as error:
            raise RecipeError(
                f"{source}: does not work on RGB pictures ({' '.join(str(error).split())[:160]}):"
                " its config.json does not make sense"
            ) from None
        wanted = (1, config.latent_channels, cells, cells)
        if latents.shape != wanted or output.shape != images.shape:
            raise RecipeError(
                f"{source}: makes latents {list(latents.shape)} and pictures {list(output.shape)}"
                f" of pictures {list(images.shape)}, not {list(wanted)} and as they were: its"
                " config.json does not make sense"
            )

    def raw_latents(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> latents `[B, C, h, w]`, not yet normalised."""
        encoded = self.model.encode(images)
        return encoded.latent_dist.mode() if "latent_dist" in encoded else encoded.latent

    def encode(self, images: Tensor) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] -> latents `z_0` `[B, h, w, C]`, mean 0, variance 1."""
        return self.normalise(self.raw_latents(images)).permute(0, 2, 3, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, h, w, C]` -> images `[B, 3, H, W]`, about [-1, 1], not clamped."""
        return self.model.decode(self.normalise.undo(latents.permute(0, 3, 1, 2))).sample


def fetch(config: PublishedConfig) -> tuple[PublishedConfig, dict[str, Tensor]]:
    """The weights from the hub or the folder, and the config with what is known of them.

    Raises:
        RecipeError: diffusers is not installed; it is no autoencoder of a kind that is known, or
            not one of three colours.
        CheckpointError: there is none, it is pickled, damaged or incomplete.
    """
    diffusers, source, folder = _diffusers(), config.diffusers, _folder(config)
    try:
        found = diffusers.AutoencoderKL.load_config(folder)
        details = _details(json.dumps(found, sort_keys=True), source)
        model, report = getattr(diffusers, details["_class_name"]).from_pretrained(
            folder,
            use_safetensors=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
            torch_dtype=torch.float32,
        )
    except MmrdpmError:
        raise
    except Exception as error:  # whatever the parts that diffusers calls raise
        said = " ".join(str(error).split()).replace(f"{folder}/", "")[:240]
        raise CheckpointError(
            f"tokenizer.autoencoder.diffusers: {source}: no autoencoder could be loaded from"
            f" {folder} ({said}): put a good copy there"
        ) from None
    if report["missing_keys"]:
        raise CheckpointError(
            f"{source}: its weights lack {report['missing_keys'][0]!r} and"
            f" {len(report['missing_keys']) - 1} more: they are of another model"
        )
    tensors = model.state_dict()
    weights.check_finite(tensors, Path(source))
    found = {**found, "latent_channels": model.config.latent_channels}  # which a file may leave out
    architecture = json.dumps(found, sort_keys=True)
    digest = _digest(tensors)
    if config.sha256 not in ("", digest):
        raise CheckpointError(
            f"{source}: its weights have the SHA-256 {digest[:12]}..., not {config.sha256[:12]}...:"
            " they changed; correct tokenizer.autoencoder.sha256, or get the others"
        )
    return replace(config, architecture=architecture, sha256=digest), tensors


def _folder(config: PublishedConfig) -> Path:
    """Where it lies: the folder, or what the hub gave of it."""
    folder = Path(os.path.expanduser(config.diffusers))
    if folder.is_dir():
        folder /= config.subfolder
    elif config.diffusers.startswith((".", "~", "/")):
        raise CheckpointError(
            f"tokenizer.autoencoder.diffusers: {folder}: no such folder: correct the path"
        )
    else:
        files = [(Path(config.subfolder) / name).as_posix() for name in _FILES]
        folder = hub.fetch(config.diffusers, files) / config.subfolder
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder}: holds no config.json: give the folder of one autoencoder, or its subfolder"
        )
    if not list(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder}: holds no safetensors: get a whole copy; pickled weights are never loaded:"
            " save a .bin or .ckpt anew (save_pretrained of diffusers does)"
        )
    return folder


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.float().contiguous().numpy().tobytes())
    return digest.hexdigest()


@lru_cache
def _details(architecture: str, source: str) -> dict[str, Any]:
    try:
        details = json.loads(architecture)
    except ValueError:
        raise RecipeError(
            f"tokenizer.autoencoder.architecture of {source} is not filled in: train a tokeniser"
            " first"
        ) from None
    if not isinstance(details, dict):
        raise RecipeError(f"{source}: its config.json is no mapping: give that of an autoencoder")
    kind = details.get("_class_name")
    if kind not in _CLASSES:
        raise RecipeError(
            f"{source}: is of class {kind!r}, not {' or '.join(_CLASSES)}: give one of those"
        )
    for key in ("in_channels", "out_channels"):
        if details.get(key, 3) != 3:
            raise RecipeError(
                f"{source}: has {key} {details[key]}, but pictures have 3: give one for RGB"
            )
    channels, widths = details.get("latent_channels", 1), _widths(details)
    if not _counts([channels]) or not _counts(widths):
        raise RecipeError(
            f"{source}: has latent_channels {channels} and block_out_channels {widths}: its"
            " config.json does not make sense"
        )
    return details


def _widths(details: dict[str, Any]) -> Any:
    return details.get("block_out_channels") or details.get("encoder_block_out_channels")


def _counts(numbers: Any) -> bool:
    """Whether it is a list of whole numbers from 1 on, and not empty."""
    right = isinstance(numbers, list) and all(type(n) is int and n > 0 for n in numbers)
    return right and bool(numbers)


def _build(config: PublishedConfig) -> nn.Module:
    details = config.details
    try:
        return getattr(_diffusers(), details["_class_name"]).from_config(details)
    except Exception as error:  # whatever the parts that diffusers calls raise
        raise RecipeError(
            f"tokenizer.autoencoder.architecture of {config.diffusers} cannot be built: {error}"
        ) from None


def _diffusers() -> Any:
    hub.quieten()
    try:
        import diffusers
    except ModuleNotFoundError:
        raise RecipeError(
            "tokenizer.autoencoder.diffusers needs: pip install 'mmrdpm[autoencoders]'"
        ) from None
    return diffusers
