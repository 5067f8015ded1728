"""Counts what operations compute, move and hold, with or without memory behind the tensors."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


class Tally(TorchDispatchMode):
    """Follows the operations below it.

    Attributes:
        flops: of matrix products.
        moved: bytes read and written by all operations but views.
        calls: operations but views.
        multiplied: storages that went into matrix products or came out of them.
        live, peak: bytes of what was made below and still is, now and at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.moved = self.live = self.peak = 0.0
        self.calls = 0
        self.multiplied: set[int] = set()
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (count := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += count(*args, **kwargs, out_val=out)
            operands = [t for t in tree_leaves((args, out)) if isinstance(t, Tensor)]
            self.multiplied |= {t.untyped_storage()._cdata for t in operands}
        if not _is_view(func) and func is not torch.ops.prim.device.default:  # a question only
            self.calls += 1
            given, made = (
                [t for t in tree_leaves(tree) if isinstance(t, Tensor)]
                for tree in ((args, kwargs), out)
            )
            self.moved += sum(t.numel() * t.element_size() for t in given + made)
            there = {t.untyped_storage()._cdata for t in given}
            for tensor in made:
                if (storage := tensor.untyped_storage())._cdata not in there:  # else in place
                    self._follow(storage)
        return out

    def _follow(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def forget(_: object) -> None:
            del self._alive[key]
            self.live -= size

        self._alive[key] = weakref.ref(storage, forget)
        self.live += size
        self.peak = max(self.peak, self.live)


def _is_view(func: Any) -> bool:
    aliases = (result.alias_info for result in func._schema.returns)
    return any(alias is not None and not alias.is_write for alias in aliases)
