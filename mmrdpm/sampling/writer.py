"""Text on a CPU, a token at a time, in as few operations as that takes.

A product with one vector reads every weight once and computes next to nothing: what counts is how
fast weights are read, and how many operations lie between. So matrices are read in parts, by up to
sixteen cores side by side: torch divides a batch of products among them, but no product of one
vector. A norm is a number by which the product that follows it is scaled, and what a layer adds to
the residual stream is added by the product that makes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from mmrdpm.sampling.cache import Cache
from mmrdpm.transformer import Attention, FeedForward, Norm, Transformer

_PARTS = 16  # that a matrix is read in


def suits(model: Transformer) -> bool:
    """Whether a writer is for this model, here and now: under autocast products cast matrices."""
    return model.table.weight.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


class Writer:
    """Continues a row: scores as of `Transformer.run` and `logits`, up to rounding.

    Args:
        cache: of one unpadded row, with room for `room` tokens.
        position: int64 `[1, 1, A]`, of the row's last token.
        scored: how many ids, from the first, have scores.
    """

    def __init__(
        self, model: Transformer, cache: Cache, position: Tensor, room: int, scored: int
    ) -> None:
        self._model, self._cache, self._scored = model, cache, scored
        positions = position.repeat(1, room, 1)
        positions[..., 0] += torch.arange(1, room + 1)
        self._rotations = iter(model.rotation(positions).split(1, dim=1))
        self._attentions = cast(Sequence[Attention], model.attentions)
        self._norms = cast(Sequence[Norm], model.norms)
        feed_forwards = cast(Sequence[FeedForward], model.feed_forwards)
        self._layers = [
            [_Matrix(each.weight) for each in (a.qkv, a.out, f.gate_up, f.down)]
            for a, f in zip(self._attentions, feed_forwards, strict=True)
        ]
        scores = model.table if model.config.tied else model.unembedding
        self._scores = _Matrix(scores.weight[: math.ceil(scored / _PARTS) * _PARTS])

    def follow(self, token: int) -> Tensor:
        """The scores of what follows `token`, which is written behind the row: `[1, scored]`."""
        model, norms = self._model, self._norms
        x, rotation = model.table.weight[token], next(self._rotations)
        if model.config.norm_inputs:
            x = rms_norm(x, x.shape)
        for index, (qkv, out, gate_up, down) in enumerate(self._layers):
            made = qkv.times(*_normed(norms[2 * index], x))[None, None]
            q, k, v = self._attentions[index].turned(made, rotation)
            x = out.times(self._cache.attend(index, q, k, v), onto=x)
            gate, up = gate_up.times(*_normed(norms[2 * index + 1], x)).chunk(2)
            x = down.times(silu(gate).mul_(up), onto=x)
        self._cache.length += 1
        return self._scores.times(*_normed(norms[-1], x))[None, : self._scored]


class _Matrix:
    """Weights `[N, K]`, in equal parts of their rows where N allows it."""

    def __init__(self, weight: Tensor) -> None:
        rows, self.width = weight.shape
        self.parts = math.gcd(rows, _PARTS)
        self._transposed = weight.view(self.parts, -1, self.width).transpose(1, 2)
        self._nothing = weight.new_zeros(self.parts, 1, 1)

    def times(self, x: Tensor, factor: float = 1.0, onto: Tensor | None = None) -> Tensor:
        """`onto + factor * W x`, K values in and `[N]` out."""
        each = x.reshape(1, 1, self.width).expand(self.parts, 1, self.width)
        if onto is None:
            made = torch.baddbmm(self._nothing, each, self._transposed, beta=0, alpha=factor)
        else:
            onto = onto.view(self.parts, 1, -1)
            made = torch.baddbmm(onto, each, self._transposed, alpha=factor)
        return made.view(-1)


def _normed(norm: Norm, x: Tensor) -> tuple[Tensor, float]:
    """A vector and a number whose product is `norm(x)`."""
    eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
    factor = (float(x.dot(x)) / len(x) + eps) ** -0.5
    return x if norm.weight is None else x * norm.weight, factor
