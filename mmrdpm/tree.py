"""Nested dicts and lists of tensors, numbers and texts as one safetensors file, without pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mmrdpm import weights
from mmrdpm.errors import DamagedError


def save(tree: Any, path: Path) -> None:
    """Writes nested dicts and lists of tensors, numbers and texts as one safetensors file.

    Raises:
        CheckpointError: it could not be written; what was there is untouched.
    """
    tensors: dict[str, Tensor] = {}
    weights.save(tensors, path, {"tree": _encode(tree, tensors)})


def load(path: Path) -> Any:
    """What `save` wrote.

    Raises:
        CheckpointError: the file is missing.
        DamagedError: it is damaged.
    """
    tensors, metadata = weights.load(path)
    try:
        tree = _decode(metadata["tree"], tensors)
    except (KeyError, TypeError, ValueError):
        tree = None
    if not isinstance(tree, dict):
        raise DamagedError(f"{path}: not a resume state of this project: get a good copy")
    return tree


def _encode(node: Any, tensors: dict[str, Tensor]) -> Any:
    """A tree as JSON; tensors go aside, dicts become lists of pairs, as keys may be integers."""
    if isinstance(node, Tensor):
        name = f"{len(tensors):05d}"
        tensors[name] = node.clone()  # two names for one tensor would not be saved
        return {"tensor": name}
    if isinstance(node, Mapping):
        return {"pairs": [[key, _encode(value, tensors)] for key, value in node.items()]}
    if isinstance(node, (list, tuple)):
        return [_encode(value, tensors) for value in node]
    return node


def _decode(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, dict):
        if "tensor" in node:
            return tensors[node["tensor"]]
        return {key: _decode(value, tensors) for key, value in node["pairs"]}
    return [_decode(value, tensors) for value in node] if isinstance(node, list) else node
