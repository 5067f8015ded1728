"""Weights on disk: safetensors only, written atomically, read with errors a user can act on."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from mmrdpm.distributed import shard_like
from mmrdpm.errors import CheckpointError, DamagedError

_METADATA = "mmrdpm"  # the one key of the header under which our metadata lie, as JSON
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SCALE = ".int8_scale"  # behind the name of a matrix that is kept in int8: a factor for each row


def save(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, Any] | None = None
) -> None:
    """Writes the tensors, or leaves what was there untouched.

    The file is complete under another name, and on the disk, before it takes its own.

    Raises:
        CheckpointError: it could not be written, for example because the disk is full.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(contiguous, partial, {_METADATA: json.dumps(metadata or {}, sort_keys=True)})
        os.chmod(partial, 0o666 & ~_umask())  # the library writes for its owner alone
        put(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path}: could not be saved ({error}); what was saved before is untouched:"
            " make room and run the command again (training: with --resume)"
        ) from None


def put(partial: Path, path: Path) -> None:
    """Gives a file that is complete its name, once it is on the disk."""
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def narrowed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same with matrices in int8 and a factor per row, which reading multiplies out again."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and tensor.is_floating_point():
            scale = tensor.float().abs().amax(1).clamp(min=1e-12) / 127
            found[name] = (tensor.float() / scale[:, None]).round().to(torch.int8)
            found[name + _SCALE] = scale
    return found


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors of a file, on the CPU, and the metadata saved with them.

    Raises:
        CheckpointError: the file is missing, truncated, or no safetensors file at all.
    """
    with _opened(path) as file:
        return {name: _read(file, name) for name in _names(file)}, _metadata_of(file)


def metadata(path: Path) -> dict[str, Any]:
    """The metadata alone, see `load`."""
    with _opened(path) as file:
        return _metadata_of(file)


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors, which are not read, see `load`."""
    with _opened(path) as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in _names(file)}


def tensor(path: Path, name: str) -> Tensor:
    """One tensor alone, see `load`."""
    with _opened(path) as file:
        return _read(file, name)


def _names(file: Any) -> list[str]:
    names = set(file.keys())
    for name in sorted(names):
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) not in names:
            raise ValueError(f"{name!r} are factors of no tensor")
    return sorted(name for name in names if not name.endswith(_SCALE))


def _read(file: Any, name: str) -> Tensor:
    tensor = file.get_tensor(name)
    if name + _SCALE not in file.keys():  # noqa: SIM118
        return tensor
    scale = file.get_tensor(name + _SCALE)
    whole = tensor.dtype == torch.int8 and tensor.ndim == 2 and scale.dtype == torch.float32
    if not whole or scale.shape != tensor.shape[:1]:
        raise ValueError(f"tensor {name!r} does not fit its factors")
    return tensor.float() * scale[:, None]


def _metadata_of(file: Any) -> dict[str, Any]:
    found = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
    if not isinstance(found, dict):
        raise ValueError("the metadata in its header are no mapping")
    return found


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such weights file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise DamagedError(
            f"{path}: not a readable safetensors file ({error}); it is truncated or of another"
            " format (pickled weights are never loaded): get a good copy"
        ) from None


def _umask() -> int:
    mask = os.umask(0)  # there is no other way to read it
    os.umask(mask)
    return mask


@contextmanager
def as_large_as(path: Path) -> Iterator[None]:
    """Modules are built inside, with at most as many weights as the file has numbers: a recipe that
    comes with it may ask for more than the machine has memory, before their shapes are compared.
    (Buffers are not counted: they are zeros, which take none before they are filled.)

    Raises:
        CheckpointError: they would have more; or the file is not readable, see `load`.
    """
    held = left = sum(math.prod(shape) for shape in shapes(path).values())
    here = threading.get_ident()

    def count(module: nn.Module, name: str, weight: nn.Parameter | None) -> None:
        nonlocal left
        if weight is not None and threading.get_ident() == here:
            left -= weight.numel()
            if left < 0:
                raise CheckpointError(
                    f"{path}: the recipe beside it asks for more than the {held:,} numbers that it"
                    " holds: it is of another model"
                )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    except RuntimeError as error:  # there is not even room for one
        if not any(sign in str(error) for sign in ("allocate memory", "overflow")):
            raise
        raise CheckpointError(
            f"{path}: the model of the recipe beside it cannot be built here ({error})"
        ) from None
    finally:
        hook.remove()


def load_into(module: nn.Module, path: Path) -> None:
    """Fills a module with the tensors of a file, cast to the module's dtypes.

    Raises:
        CheckpointError: as `load`, or the names, shapes or kinds of numbers differ from the
            module's, or a number is not finite.
    """
    tensors, _ = load(path)
    expected = module.state_dict()
    for name in sorted(expected.keys() ^ tensors.keys()):
        side = "is missing from" if name in expected else "has no place in the model but is in"
        raise CheckpointError(f"{path}: tensor {name!r} {side} the file: it is of another model")
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: tensor {name!r} has shape {list(tensors[name].shape)}, the model needs"
                f" {list(tensor.shape)}: it is of another model"
            )
        check_number(tensors[name], name, path, tensor.dtype)
    fill(module, tensors)


def check_number(tensor: Tensor, name: str, path: Path, dtype: torch.dtype) -> None:
    """Raises CheckpointError unless a tensor's numbers are of a kind that weights have, and finite.

    Args:
        dtype: that it is cast to.
    """
    if tensor.dtype not in _FLOATS and (dtype.is_floating_point or tensor.is_floating_point()):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{path}: tensor {name!r} is of {kind}, which weights are not: get a good copy"
        )
    check_finite({name: tensor.to(dtype)}, path)


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises CheckpointError if weights of the file at `path` hold NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise CheckpointError(
                f"{path}: tensor {name!r} holds numbers that are not finite: the training has"
                " failed; go back to an earlier checkpoint and lower train.lr"
            )


@torch.no_grad()
def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Fills a module with whole tensors that fit it; of a sharded one each rank takes its part."""
    expected = module.state_dict()
    module.load_state_dict({n: shard_like(tensors[n], like) for n, like in expected.items()})
