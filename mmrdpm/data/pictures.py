"""Pictures from anywhere to square RGB arrays and tensors, within safe limits."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mmrdpm.errors import DataError, UsageError

# no PostScript, whose reader runs programs; no ICO and ICNS, which get round the limit on pixels
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
MAX_PIXELS = 64_000_000  # what one picture may hold once decoded: 64 megapixels, 256 MB as RGBA
_TOO_LARGE = f"more pixels than the limit of {MAX_PIXELS // 10**6} megapixels"


class PictureError(DataError):
    """A picture that cannot be used.

    Attributes:
        cause: the kind of fault, to count by.
        detail: what is special: by default `more`, else what a record's key may not say.
    """

    def __init__(self, where: str, cause: str, more: str = "", detail: str = "") -> None:
        super().__init__(f"{where}: {cause}{more}")
        self.cause, self.detail = cause, detail or more.strip(" :")


@cache
def _formats() -> tuple[str, ...]:
    """Those of `_FORMATS` that this Pillow reads."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def open_picture(source: Path | IO[bytes], name: str | None = None) -> Image.Image:
    """Reads one picture as RGB, turned upright, transparent parts on white.

    Raises:
        PictureError: it is missing, no picture, damaged, of floating point pixels, or larger
            than `MAX_PIXELS`.
    """
    with _opened(source, name or str(source)) as picture:
        return to_rgb(ImageOps.exif_transpose(picture))


def stored_size(path: Path) -> tuple[int, int]:
    """Width and height by the file's header, before it is turned upright; no pixel is decoded.

    Raises:
        PictureError: as `open_picture`, as far as the header tells.
    """
    with _opened(path, str(path)) as picture:
        return picture.size


@contextmanager
def _opened(source: Path | IO[bytes], where: str) -> Iterator[Image.Image]:
    """The picture, its header read; whatever fails within is a PictureError."""
    try:
        if isinstance(source, Path) and source.exists() and not source.is_file():
            why = ": it is no file"  # a pipe would be waited for
            raise PictureError(where, "the picture could not be read", why)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about the file: what counts it raises
            with Image.open(source, formats=_formats()) as picture:
                if picture.width * picture.height > MAX_PIXELS:
                    size = f"{picture.width}x{picture.height}"
                    raise PictureError(where, _TOO_LARGE, f": {size}, make it smaller first")
                if picture.mode == "F":  # nothing says which values are black and white
                    raise PictureError(
                        where, "floating point pixels", ": save it with 8 bits a channel"
                    )
                yield picture
    except FileNotFoundError:
        raise PictureError(where, "no such file", detail=where) from None
    except Image.DecompressionBombError:  # of twice Pillow's own limit, before it tells the size
        raise PictureError(where, _TOO_LARGE, ": make it smaller first") from None
    except UnidentifiedImageError:
        cause = "not a picture that can be read"
        raise PictureError(where, cause, ": PNG, JPEG, WebP and the like can") from None
    except PictureError:
        raise
    except Exception as error:  # readers of many formats and of EXIF: they raise all kinds
        raise PictureError(where, "the picture could not be read", f": {error}") from None


def picture_of(content: Path | bytes | np.ndarray) -> Image.Image:
    """A file, its bytes or uint8 pixels `[H, W, 3]` as RGB.

    Raises:
        PictureError: as `open_picture`.
    """
    if isinstance(content, np.ndarray):
        return Image.fromarray(content)
    if isinstance(content, bytes):
        return open_picture(io.BytesIO(content), "image")
    return open_picture(content)


def save_picture(picture: Image.Image, path: Path, **how: Any) -> None:
    """Writes a PNG or GIF, or leaves what was there untouched; makes its folder if missing.

    Args:
        how: as `Image.save` takes it.

    Raises:
        UsageError: the file's name ends with neither.
    """
    if path.suffix.lower() not in (".png", ".gif"):
        raise UsageError(f"{path}: pictures are written as PNG: name the file so")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        picture.save(partial, path.suffix[1:], **how)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any mode to RGB; transparent parts become white, 16-bit greys keep their range."""
    if picture.mode.startswith("I"):
        grey = np.asarray(picture, dtype=np.float64) / 257
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode == "La":
        picture = picture.convert("LA")
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    rgba = picture.convert("RGBA")
    white = Image.new("RGBA", rgba.size, "white")
    return Image.alpha_composite(white, rgba).convert("RGB")


def to_square(picture: Image.Image, size: int) -> np.ndarray:
    """The whole picture, upright, centred on a white square: uint8 `[size, size, 3]`.

    Raises:
        PictureError: it is damaged, or so oblong that its short side would have no pixel.
    """
    try:
        rgb = to_rgb(ImageOps.exif_transpose(picture))
    except Exception as error:  # as in `_opened`
        why = f": {error}"
        raise PictureError("a picture", "the picture could not be read", why) from None
    if not round(size * min(rgb.size) / max(1, *rgb.size)):  # nothing of it would be left
        shape = f"{rgb.width}x{rgb.height}"
        raise PictureError("a picture", "too oblong", f": {shape}, crop it first", shape)
    if rgb.size != (size, size):
        rgb = ImageOps.pad(rgb, (size, size), Image.Resampling.LANCZOS, color="white")
    return np.asarray(rgb)


def to_tensor(squares: np.ndarray) -> Tensor:
    """uint8 `[B, size, size, 3]` -> float32 `[B, 3, size, size]` in [-1, 1]."""
    return torch.from_numpy(squares.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pictures(images: Tensor) -> list[Image.Image]:
    """float32 `[B, 3, H, W]` in [-1, 1] -> RGB pictures."""
    squares = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(square.permute(1, 2, 0).cpu().numpy()) for square in squares]


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]], scale: int = 1, gap: int = 4
) -> Image.Image:
    """Pictures of one size in rows on white, enlarged `scale` times without smoothing."""
    width, height = next(picture.size for row in rows for picture in row)
    cell = (width * scale + gap, height * scale + gap)
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * cell[0] + gap, len(rows) * cell[1] + gap), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            large = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            sheet.paste(large, (gap + x * cell[0], gap + y * cell[1]))
    return sheet
