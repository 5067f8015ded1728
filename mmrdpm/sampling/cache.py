"""Keys and values of contexts that have been read, and attention of what follows to them."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrdpm.attention import sdpa
from mmrdpm.document import Packed
from mmrdpm.transformer import Transformer


class Cache:
    """The keys and values of `R` contexts of at most `K` tokens, one a row, padded at the end.

    All memory is taken once, with room for the tokens that follow.

    Attributes:
        length: tokens held per row, padding included; what comes next goes behind them. Raise it
            to keep a block that `attend` has seen, leave it to have the next one overwrite it.
        hidden: float `[R, K, ...]`, the hidden states of the contexts, see `Transformer.run`.
    """

    @torch.no_grad()
    def __init__(self, model: Transformer, context: Packed, room: int) -> None:
        config = model.config
        rows, length = context.token_ids.shape
        capacity, self.length = length + room, 0
        shape = (config.layers, rows, capacity, config.kv_heads, config.head_dim)
        self._keys, self._values = (model.table.weight.new_empty(shape) for _ in range(2))
        padding = context.layout.document_ids < 0
        self._bias: Tensor | None = None
        if padding.any():
            self._bias = self._keys.new_zeros(rows, 1, 1, capacity)
            self._bias[:, 0, 0, :length].masked_fill_(padding, -torch.inf)
        inside = sdpa.plan(context.layout)

        def read(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._put(layer, k, v)
            return inside(q, k, v)

        c = context
        self.hidden = model.run(c.token_ids, c.latents, c.timesteps, c.positions, read)
        self.length = length

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A block behind the context sees all of it and, both ways, itself.

        Args:
            q, k, v: `[R, S, H, D]`, `[R, S, G, D]`, as the model gives them.
        """
        end = self._put(layer, k, v)
        bias = None if self._bias is None else self._bias[..., :end]
        return sdpa.masked(q, self._keys[layer, :, :end], self._values[layer, :, :end], bias)

    def kept(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, `[K + room, G, D]`, where there is one row, unpadded.

        Whoever adds some to them raises `length`.
        """
        (keys,), (values,) = self._keys[layer], self._values[layer]
        return keys, values

    def _put(self, layer: int, k: Tensor, v: Tensor) -> int:
        """Keeps what a block brings behind the context; gives the place after it."""
        end = self.length + k.shape[1]
        self._keys[layer, :, self.length : end] = k
        self._values[layer, :, self.length : end] = v
        return end
