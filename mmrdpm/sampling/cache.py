"""Keys and values of a context that has been read, one prefix for all that follows it."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrdpm.attention import sdpa
from mmrdpm.document import Packed
from mmrdpm.transformer import Transformer


class Cache:
    """The keys and values per layer, each `[1, K, G, D]`; one document, no padding."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    @torch.no_grad()
    def read(self, model: Transformer, context: Packed) -> Tensor:
        """Reads a whole context of one row; gives its hidden states `[1, K, width]`."""
        inside = sdpa.plan(context.layout)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys.append(k)
            self.values.append(v)
            return inside(q, k, v)

        x = model.embed(context.token_ids, context.latents, context.timesteps)
        return model.run(x, context.positions, attend)

    @torch.no_grad()
    def look(self, model: Transformer, x: Tensor, positions: Tensor) -> Tensor:
        """A block that sees the context and, both ways, itself; the cache stays as it is."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys = torch.cat([self.keys[layer], k], dim=1)
            return sdpa.masked(q, keys, torch.cat([self.values[layer], v], dim=1), None)

        return model.run(x, positions, attend)

    @torch.no_grad()
    def extend(self, model: Transformer, x: Tensor, positions: Tensor) -> Tensor:
        """A text token, or a block that sees itself both ways, which the context then holds."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer] = torch.cat([self.keys[layer], k], dim=1)
            self.values[layer] = torch.cat([self.values[layer], v], dim=1)
            return sdpa.masked(q, self.keys[layer], self.values[layer], None)

        return model.run(x, positions, attend)
