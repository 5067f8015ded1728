"""The peers by name; a library is imported only when its peer is made."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

from mmrdpm import hub
from mmrdpm.bench.peers.codes import ResidualCodes, fitted
from mmrdpm.bench.peers.ours import Ours
from mmrdpm.bench.peers.protocol import OurShape, Peer, PeerBench, Scene, Shape
from mmrdpm.errors import RecipeError

TITLES = {
    "ours": "RDPM tokens (ours)",
    "flow": "flow matching (PixArt)",
    "masked": "masked tokens (MaskGIT)",
    "raster": "raster tokens (LlamaGen)",
    "transfusion": "Transfusion (its library)",
    "causal_flow": "Transfusion (Qwen3)",
    "scales": "next scale (VAR)",
}


class NotRunnable(Exception):
    """A peer's library is not installed, or does not load; the message says which and why."""


def make(name: str, recipe: PeerBench, scene: Scene, folder: Path) -> Peer:
    """A fresh peer; codes that it needs are fitted, or read from `folder`.

    Raises:
        NotRunnable: its library is not installed, or does not load.
        RecipeError: its number of parameters is not that of ours, or its steps cannot be chosen.
    """
    shape: Shape = getattr(recipe, name)
    peer = MAKERS[name](shape, scene, folder)
    if not peer.steps:
        raise RecipeError(f"{name}.steps is empty: name at least one number of steps")
    if shape.steps and shape.steps != peer.steps:
        raise RecipeError(f"{name}.steps: the method fixes it at {peer.steps[0]}: leave it out")
    if shape.noise_pool and name != "ours":
        raise RecipeError(f"{name}.noise_pool: it belongs to ours alone: leave it out")
    ours = parameters(peer if name == "ours" else Ours(recipe.ours, scene))
    share = parameters(peer) / ours - 1
    if abs(share) > recipe.equal.tolerance:
        raise RecipeError(
            f"{name} has {parameters(peer):,} parameters, ours {ours:,}: {share:+.1%} is more than"
            f" equal.tolerance allows: change {name}.ffn, {name}.width or {name}.layers"
        )
    return peer


def parameters(peer: Peer) -> int:
    """How many numbers are trained."""
    return sum(p.numel() for p in peer.parameters() if p.requires_grad)


def _module(name: str) -> ModuleType:
    """The module of a peer, whose library is imported now."""
    hub.quieten()
    try:
        return import_module(f"mmrdpm.bench.peers.{name}")
    except ModuleNotFoundError as error:
        raise NotRunnable(f"needs the package {error.name}: pip install 'mmrdpm[peers]'") from None
    except (ImportError, RuntimeError) as error:  # diffusers gives the latter for the former
        reason = str(error).strip().splitlines()[-1]
        raise NotRunnable(f"its libraries do not go together ({reason})") from error


def _ours(shape: Shape, scene: Scene, folder: Path) -> Peer:
    assert isinstance(shape, OurShape)
    return Ours(shape, scene)


def _flow(shape: Shape, scene: Scene, folder: Path) -> Peer:
    return _module("flow").Flow(shape, scene.texts.size, scene.latent_shape)


def _transfusion(shape: Shape, scene: Scene, folder: Path) -> Peer:
    return _module("transfusion").Transfusion(shape, scene.texts.size, scene.latent_shape)


def _causal_flow(shape: Shape, scene: Scene, folder: Path) -> Peer:
    return _module("causal_flow").CausalFlow(shape, scene.texts.size, scene.latent_shape)


def _raster(shape: Shape, scene: Scene, folder: Path) -> Peer:
    return _module("raster").Raster(shape, scene.texts.size, _flat(scene, folder))


def _masked(shape: Shape, scene: Scene, folder: Path) -> Peer:
    return _module("masked").Masked(shape, scene.texts.size, _flat(scene, folder))


def _scales(shape: Shape, scene: Scene, folder: Path) -> Peer:
    side = scene.latent_shape[0]
    sides = (*range(1, side), *[side] * scene.equal.levels)
    return _module("scales").Scales(
        shape, scene.texts.size, _codes(sides, scene, folder / "codes-scales")
    )


def _flat(scene: Scene, folder: Path) -> ResidualCodes:
    sides = [scene.latent_shape[0]] * scene.equal.levels
    return _codes(sides, scene, folder / "codes-flat")


def _codes(sides: tuple[int, ...] | list[int], scene: Scene, path: Path) -> ResidualCodes:
    size = scene.equal.codebook_size or scene.images.codebook_size
    codes = ResidualCodes(sides, scene.images.grid, size, scene.images.latent_channels)
    seed = scene.equal.seed
    return fitted(codes, scene.training_latents, seed, path.with_suffix(".safetensors"))


MAKERS: dict[str, Callable[[Shape, Scene, Path], Peer]] = {
    "ours": _ours,
    "flow": _flow,
    "masked": _masked,
    "raster": _raster,
    "transfusion": _transfusion,
    "causal_flow": _causal_flow,
    "scales": _scales,
}
