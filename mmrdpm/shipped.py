"""Where the things that come with the package lie: tokenizers, recipes, suites and models.

In a checkout they are top-level folders; the wheel carries them inside the package.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from mmrdpm.errors import MmrdpmError

Kind = Literal["tokenizers", "recipes", "eval", "models"]

_PACKAGE = Path(__file__).resolve().parent


def folder(kind: Kind) -> Path:
    """The folder of all shipped things of one kind."""
    carried = _PACKAGE / "_shipped" / kind
    return carried if carried.is_dir() else _PACKAGE.parent / kind


def resolve(kind: Kind, name_or_path: str | Path) -> Path:
    """An existing path as it is, else the shipped thing of that name.

    `emoji_cpu`, `emoji_cpu.yaml` and `recipes/emoji_cpu.yaml` all name the shipped recipe.

    Raises:
        MmrdpmError: there is neither; it lists what is shipped.
    """
    path = Path(name_or_path)
    if path.exists():
        return path
    name = str(name_or_path).removeprefix(f"{kind}/").removesuffix(".yaml").rstrip("/")
    known = {
        p.relative_to(folder(kind)).as_posix().removesuffix(".yaml"): p
        for pattern in ("*.yaml", "*/*.yaml")
        for p in sorted(folder(kind).glob(pattern))
    }
    if kind in ("models", "tokenizers"):
        known = {p.name: p for p in sorted(folder(kind).glob("*")) if p.is_dir()}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else f"shipped: {', '.join(known) or 'none'}"
    raise MmrdpmError(f"{name_or_path}: no such path, and none of the shipped {kind}: {hint}")
