"""Text on a CPU, a token at a time, in as few operations as that takes.

A product with one vector reads every weight once and computes next to nothing: what counts is how
fast weights are read, and how many operations lie between. So matrices are read in parts, by up to
sixteen cores side by side: torch divides a batch of products among them, but no product of one
vector. A norm is a number by which the product that follows it is scaled, what a layer adds to the
residual stream is added by the product that makes it, and every value has its place in memory, seen
from all sides before the first token comes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import silu

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
        config, table = model.config, model.table.weight
        self._cache, self._table, self._norm_inputs = cache, table, config.norm_inputs
        positions = position.repeat(1, room, 1)
        positions[..., 0] += torch.arange(1, room + 1)
        self._rotations = iter(torch.view_as_complex(model.rotation(positions))[0])
        heads = config.heads + 2 * config.kv_heads
        x, gate_up = table.new_empty(config.width), table.new_empty(2 * config.ffn)
        qkv = table.new_empty(heads, config.head_dim)
        seen = table.new_empty(config.heads * config.head_dim)
        self._x, (self._gate, self._up) = x, gate_up.chunk(2)
        norms = iter(cast(Sequence[Norm], model.norms))
        feed_forwards = cast(Sequence[FeedForward], model.feed_forwards)
        self._layers = [
            (
                _FromNorm(next(norms), attention.qkv.weight, x, qkv),
                _Attend(attention, qkv, *cache.kept(layer), seen),
                _Onto(x, attention.out.weight, seen),
                _FromNorm(next(norms), feed_forward.gate_up.weight, x, gate_up),
                _Onto(x, feed_forward.down.weight, self._gate),
            )
            for layer, (attention, feed_forward) in enumerate(
                zip(cast(Sequence[Attention], model.attentions), feed_forwards, strict=True)
            )
        ]
        unembedding = table if config.tied else model.unembedding.weight
        by = unembedding[: math.ceil(scored / _PARTS) * _PARTS]
        self._scores = table.new_empty(len(by))
        self._score = _FromNorm(next(norms), by, x, self._scores)
        self._scored = scored

    def follow(self, token: int) -> Tensor:
        """The scores of what follows `token`, which is written behind the row.

        Returns:
            `[1, scored]`, until the next call.
        """
        x, rotation, place = self._x, next(self._rotations), self._cache.length
        x.copy_(self._table[token])
        if self._norm_inputs:
            x.mul_(_norm_factor(x, None))
        for to_qkv, attend, add_seen, to_gate_up, add_made in self._layers:
            to_qkv()
            attend(rotation, place)
            add_seen()
            to_gate_up()
            silu(self._gate, inplace=True).mul_(self._up)
            add_made()
        self._cache.length += 1
        self._score()
        return self._scores[None, : self._scored]


class _FromNorm:
    """`into = W norm(x)`: `x` `[K]`, `W` `[N, K]`, N values `into`."""

    def __init__(self, norm: Norm, weight: Tensor, x: Tensor, into: Tensor) -> None:
        self._x, self._eps, self._weight = x, norm.eps, norm.weight
        self._weighted = x if norm.weight is None else torch.empty_like(x)
        self._product = _in_parts(weight, self._weighted, into)

    def __call__(self) -> None:
        if self._weight is not None:
            torch.mul(self._x, self._weight, out=self._weighted)
        into, x, weight = self._product
        into.baddbmm_(x, weight, beta=0, alpha=_norm_factor(self._x, self._eps))


class _Onto:
    """`x += W made`."""

    def __init__(self, x: Tensor, weight: Tensor, made: Tensor) -> None:
        self._product = _in_parts(weight, made, x)

    def __call__(self) -> None:
        x, made, weight = self._product
        x.baddbmm_(made, weight)


def _in_parts(weight: Tensor, x: Tensor, into: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of `into`, `x` and `W`, as many parts of its rows as there may be, for one product."""
    rows, width = weight.shape
    parts = math.gcd(rows, _PARTS)
    each = x.view(1, 1, width).expand(parts, 1, width)
    return into.view(parts, 1, -1), each, weight.view(parts, -1, width).transpose(1, 2)


def _norm_factor(x: Tensor, eps: float | None) -> float:
    """The number by which RMSNorm scales a vector."""
    return (float(x.dot(x)) / len(x) + _epsilon(x, eps)) ** -0.5


def _epsilon(x: Tensor, eps: float | None) -> float:
    return torch.finfo(x.dtype).eps if eps is None else eps


class _Attend:
    """What the heads of a layer see from one place: `Attention.project` behind its first
    matrix, and attention to all places so far.

    Args:
        qkv: `[H + 2 G, D]`, overwritten.
        keys, values: `[K, G, D]`, to which the place's own are added.
        seen: gets `[H D]`.
    """

    def __init__(
        self, attention: Attention, qkv: Tensor, keys: Tensor, values: Tensor, seen: Tensor
    ) -> None:
        heads, groups, width = attention.heads, attention.kv_heads, attention.head_dim
        self._qk, self._v = qkv.split((heads + groups, groups))
        self._pairs = torch.view_as_complex(self._qk.unflatten(1, (-1, 2)))
        q, self._k = self._qk.split((heads, groups))
        self._q, self._seen = q.view(groups, -1, width), seen.view(groups, -1, width)
        self._keys, self._values = keys, values
        self._across, self._along = keys.permute(1, 2, 0), values.transpose(0, 1)
        self._weights = attention.norm_weights()
        self._eps = qkv.new_full((heads + groups,), _epsilon(qkv, attention.eps))
        self._nothing, self._width = qkv.new_zeros(1, 1, 1), width

    def __call__(self, rotation: Tensor, place: int) -> None:
        squares = torch.linalg.vecdot(self._qk, self._qk)
        factors = torch.add(self._eps, squares, alpha=1 / self._width).rsqrt_()
        if self._weights is not None:
            self._qk.mul_(self._weights)
        self._pairs.mul_(rotation * factors[:, None])  # turning keeps lengths
        self._keys[place], self._values[place] = self._k, self._v
        keys, values = self._across[..., : place + 1], self._along[:, : place + 1]
        scale = self._width**-0.5
        scores = torch.baddbmm(self._nothing, self._q, keys, beta=0, alpha=scale)
        torch.bmm(scores.softmax(-1), values, out=self._seen)
