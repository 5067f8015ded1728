"""A perceptual distance on any vision network of transformers, its weights from a folder or hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmrdpm import hub, weights
from mmrdpm.errors import CheckpointError, RecipeError

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as networks expect


class PerceptualLoss(nn.Module):
    """Distance of two pictures in the layers of a frozen network.

    Zhang et al. 2018 (arXiv 1801.03924), equation 1, with all weights w_l = 1: features are made
    unit vectors per position, squared differences are summed over channels, averaged over
    positions, and averaged over layers.

    Args:
        source: folder or hub id of a network of transformers that gives hidden states, trained on
            ImageNet or with its mean and deviation (ResNet, ConvNeXt, ...).
        image_size: side of the pictures, in pixels, that it is to take.

    Raises:
        RecipeError: transformers is not installed, or the network does not take such pictures.
        CheckpointError: there is none, it is pickled, damaged or incomplete.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, source: str, image_size: int) -> None:
        super().__init__()
        self.network = _load(source).eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(_STD)[:, None, None])
        try:
            with torch.no_grad():
                found = self.features(torch.zeros(1, 3, image_size, image_size))
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise RecipeError(
                f"train.loss.backbone: {source} does not take {image_size}x{image_size} pictures"
                f" ({' '.join(str(error).split())[:160]}): give a network for such pictures"
            ) from None
        if not found:
            raise RecipeError(f"train.loss.backbone: {source} gives no hidden states")

    def features(self, images: Tensor) -> list[Tensor]:
        """Images `[B, 3, H, W]` in [-1, 1] -> unit vectors `[B, positions, C]` of every layer."""
        pixels = ((images + 1) / 2 - self.mean) / self.std
        hidden = self.network(pixels, output_hidden_states=True).hidden_states
        maps = [h.flatten(2).mT if h.ndim == 4 else h for h in hidden or ()]
        return [nn.functional.normalize(m.float(), dim=-1, eps=1e-6) for m in maps]

    def forward(self, output: Tensor, images: Tensor) -> Tensor:
        """The mean distance of `[B, 3, H, W]` in [-1, 1] from `images`; 0 where they are equal."""
        with torch.no_grad():
            wanted = self.features(images)
        pairs = zip(self.features(output), wanted, strict=True)
        return torch.stack([(a - b).square().sum(-1).mean() for a, b in pairs]).mean()


def _load(source: str) -> Any:
    try:
        from transformers import AutoModel
    except ModuleNotFoundError:
        raise RecipeError("train.loss.backbone needs: pip install 'mmrdpm[autoencoders]'") from None
    hub.quieten()
    try:
        network, report = AutoModel.from_pretrained(
            source,
            use_safetensors=True,
            output_loading_info=True,
            trust_remote_code=False,
            dtype=torch.float32,
        )
    except Exception as error:  # whatever the parts that transformers calls raise
        raise CheckpointError(
            f"train.loss.backbone: {source}: no network could be loaded"
            f" ({hub.reason(error)}): give the folder of one with safetensors"
            f" weights{'' if Path(source).is_dir() else ', or its id on a hub that can be reached'}"
        ) from None
    # a classifier has no pooler, and hidden states need none
    if missing := [key for key in report["missing_keys"] if not key.startswith("pooler.")]:
        raise CheckpointError(
            f"train.loss.backbone: {source}: its weights lack {min(missing)!r}: get a good copy"
        )
    weights.check_finite(network.state_dict(), Path(source))
    return network
