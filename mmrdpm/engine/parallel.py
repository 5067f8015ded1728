"""One model on many ranks: copied (DDP), sharded (FSDP2), or sharded inside each node (hybrid).

Whatever the mode, a parameter starts with the same values and an update has the same gradient: a
global batch on one rank and its shares on many are one objective.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from mmrdpm import distributed, machine
from mmrdpm.document import Packed
from mmrdpm.errors import RecipeError
from mmrdpm.objective import Losses, loss
from mmrdpm.transformer import Transformer, initialise

Mode = Literal["single", "ddp", "fsdp", "hybrid"]
Wanted = Literal["auto", "ddp", "fsdp", "hybrid"]

BYTES_PER_PARAMETER = 16  # float32: weight, gradient, two moments
DDP_SHARE = 1 / 3  # of a GPU's memory that those may take before auto shards them


def resolve(wanted: Wanted, parameters: int, device: torch.device) -> Mode:
    """What `train.parallel` means here.

    auto copies the model where its weights, gradients and moments take at most a third of a GPU,
    or where there is no GPU, and shards it otherwise.

    Raises:
        RecipeError: hybrid is asked for on nodes with different numbers of ranks.
    """
    ranks, node = distributed.world_size(), distributed.node_size()
    if ranks == 1:
        return "single"
    if wanted == "hybrid" and len(sizes := set(distributed.gather_objects(node))) > 1:
        raise RecipeError(
            f"train.parallel is hybrid, but nodes have {' or '.join(map(str, sorted(sizes)))}"
            " ranks: start the same number on each, or use fsdp"
        )
    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return "ddp"
    memory = torch.cuda.get_device_properties(device).total_memory
    room = min(distributed.gather_objects(memory)) * DDP_SHARE  # cards may differ, modes may not
    return "ddp" if parameters * BYTES_PER_PARAMETER <= room else "fsdp"


class Objective(nn.Module):
    """The loss as a module, so that the hooks of DDP and FSDP see all of the computation.

    Args:
        how: keywords of `objective.loss`.
    """

    def __init__(self, transformer: Transformer, **how: Any) -> None:
        super().__init__()
        self.transformer, self.how = transformer, how

    def forward(self, packed: Packed, divisor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        made = loss(self.transformer, packed, divisor=divisor, **self.how)
        return made.total, made.per_token, made.timesteps


class Parallel:
    """A model as this rank trains it.

    Args:
        transformer: on the meta device: it is sharded first, then gets memory, then values drawn
            from torch's global generator, one parameter after the other, so that no rank ever
            holds more than one whole.
        dtype: of matrix products; sharded layers are gathered in it.
    """

    def __init__(
        self, objective: Objective, mode: Mode, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.mode, self.device, self.dtype = mode, device, dtype
        self.module: nn.Module = objective
        if mode in ("fsdp", "hybrid"):
            _shard(objective, _mesh(mode, device), dtype)
        objective.to_empty(device=device)
        _initialise(objective.transformer)
        if mode == "ddp":
            self.module = DistributedDataParallel(objective, gradient_as_bucket_view=True)

    @property
    def sharded(self) -> bool:
        """Whether this rank holds only a part of the parameters."""
        return self.mode in ("fsdp", "hybrid")

    def backward(self, parts: Sequence[Packed], divisor: Tensor) -> list[Losses]:
        """Adds up the gradients of all parts of all ranks; gives the losses of this rank's.

        Args:
            parts: this rank's rows, as many parts on every rank.
            divisor: the summed weights of the targets of all parts of all ranks.
        """
        ranks, made = distributed.world_size(), []
        for index, part in enumerate(parts):
            with self._reducing(index == len(parts) - 1):
                with machine.autocast(self.dtype, self.device):
                    losses = Losses(*self.module(part, divisor))
                # both DDP and FSDP divide the sum of the gradients by the number of ranks
                (losses.total * ranks if ranks > 1 else losses.total).backward()
            made.append(losses)
        return made

    @contextmanager
    def _reducing(self, last: bool) -> Iterator[None]:
        """DDP exchanges gradients once per update, in the backward pass of its last part.

        Sharded ones are exchanged in every part: to add them up first, each rank would have to hold
        those of the whole model.
        """
        if isinstance(self.module, DistributedDataParallel) and not last:
            with self.module.no_sync():
                yield
        else:
            yield


def _mesh(mode: Mode, device: torch.device) -> DeviceMesh:
    ranks, node = distributed.world_size(), distributed.node_size()
    if mode == "fsdp":
        return init_device_mesh(device.type, (ranks,))
    return init_device_mesh(device.type, (ranks // node, node), mesh_dim_names=("copy", "shard"))


def _shard(objective: Objective, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Layers are gathered one at a time; the embeddings stay float32, as the residual stream."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    narrow = dtype if dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(
        param_dtype=narrow,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # autocast narrows what products take; RoPE's turns stay exact
    )
    transformer = objective.transformer
    for layer in zip(transformer.attentions, transformer.feed_forwards, strict=True):
        fully_shard([*layer], mesh=mesh, mp_policy=policy)  # type: ignore[arg-type]
    fully_shard(objective, mesh=mesh)


@torch.no_grad()
def _initialise(transformer: Transformer) -> None:
    for name, parameter in transformer.named_parameters():
        values = torch.empty(parameter.shape)
        initialise(name, values)
        parameter.copy_(distributed.shard_like(values, parameter))
