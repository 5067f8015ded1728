"""Processes that train as one: ranks, sums over all of them, whole tensors and their shards.

torchrun starts the processes and says who they are (`RANK`, `WORLD_SIZE`, ...). Without it there
is one rank, and every function here leaves its argument as it is.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmrdpm.errors import DataError, DistributedError

T = TypeVar("T")

SIGNALS_TOGETHER = 2.0
"""Seconds in which signals are one: SLURM's to every process, and torchrun's to its ranks again."""

_SIGNS = ("gloo", "NCCL", "Connection closed by peer", "Connection reset", "Timed out waiting")


def rank() -> int:
    """The number of this process, 0 for the one that writes and speaks."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """The number of processes."""
    return int(os.environ.get("WORLD_SIZE", 1))


def node_size() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this is the process that writes and speaks."""
    return rank() == 0


def restarted() -> bool:
    """Whether torchrun has started this job again after a rank was lost. All ranks must call it.

    Of several machines only those count it that have lost a rank, or seen one end.
    """
    return anyone(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0)


def take_device() -> None:
    """Makes this process use the GPU of its own number on this machine, if there are any.

    Raises:
        DistributedError: there are GPUs, but fewer than ranks.
    """
    if torch.cuda.is_available():
        local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= count:
            raise DistributedError(
                f"rank {rank()}: this machine has {count} GPU{'s' * (count > 1)}, too few for its"
                f" local rank {local}: lower torchrun's --nproc-per-node to {count}, or set"
                " CUDA_VISIBLE_DEVICES= for ranks on the CPU"
            )
        torch.cuda.set_device(local)


@contextmanager
def joined(timeout: float) -> Iterator[None]:
    """Holds the process group while the block runs: nccl where there is CUDA, else gloo.

    Args:
        timeout: seconds after which a rank that does not answer ends the job.

    Raises:
        DistributedError: another rank was lost or did not answer in time, or this one has no GPU.
    """
    if world_size() == 1:
        yield
        return
    take_device()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    try:
        patience = timedelta(seconds=timeout)
        dist.init_process_group(
            backend,
            store=_store_of_this_start(patience),
            rank=rank(),
            world_size=world_size(),
            timeout=patience,
        )
        yield
        dist.destroy_process_group()
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(s in str(error) for s in _SIGNS):
            raise
        raise DistributedError(
            f"rank {rank()}: another rank was lost or did not answer within {timeout:g} s"
            f" ({str(error).splitlines()[0][:200]}): look for the first message of the others;"
            " torchrun --max-restarts N goes on from the last checkpoint"
        ) from None


def _store_of_this_start(timeout: timedelta) -> dist.Store | None:
    """torchrun's own store where it keeps it over restarts, with keys of this start alone.

    The addresses that an earlier start's ranks left there would be taken for those of this one. Of
    several machines the numbers of starts differ: there torchrun has to be told to keep no store.

    Raises:
        DistributedError: it was not told, though it may start ranks of several machines again.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    if os.environ.get("GROUP_WORLD_SIZE") != "1":
        if os.environ.get("TORCHELASTIC_MAX_RESTARTS") == "0":
            return None
        raise DistributedError(
            f"rank {rank()}: ranks of several machines that start again would look for the"
            " addresses of the dead ones: start every torchrun with"
            " TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and --rdzv-backend c10d, or leave"
            " --max-restarts out"
        )
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, timeout=timeout)
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


class Watchdog:
    """Ends the process, with a line that says where it hung, when nothing was done for too long.

    A collective times out by itself; this also catches a rank that hangs elsewhere, in reading
    data for example, which the other ranks could only wait for. It sleeps where there is one rank,
    and ends with the `with` block that it is held by.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout, self._doing = timeout, "starting"
        self._last = time.monotonic()
        self._done = threading.Event()
        if world_size() > 1:
            threading.Thread(target=self._watch, daemon=True).start()

    def doing(self, what: str) -> None:
        """Says that the process is alive and what it does next."""
        self._last, self._doing = time.monotonic(), what

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self.timeout / 4)):
            if time.monotonic() - self._last > self.timeout:
                print(
                    f"mmrdpm: error: rank {rank()}: nothing was done for {self.timeout:g} s, the"
                    f" last thing begun was {self._doing}: the job ends; raise train.timeout if"
                    " that is how long it takes",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(1)


def first(work: Callable[[], object]) -> None:
    """Lets rank 0 do something, the others wait; where it fails they end silently."""
    if world_size() == 1:
        work()
        return
    done = torch.zeros(1, device=_device())
    try:
        if is_main():
            work()
            done += 1
    finally:
        dist.all_reduce(done)
    if not done:
        raise SystemExit(1)


def on_all(work: Callable[[], T]) -> T:
    """What this rank's work gives, once every rank has done its own: all must call it.

    Raises:
        DataError: of the work.
        SystemExit: another rank's work failed, which says why.
    """
    try:
        done = work()
    except DataError:
        anyone(True)
        raise
    if anyone(False):
        raise SystemExit(1)
    return done


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The sum of every rank's tensor, on every rank, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of every rank's tensor, on every rank, in place."""
    return sum_over_ranks(tensor).div_(world_size()) if world_size() > 1 else tensor


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Makes every rank's gradients their mean over all ranks, as DDP does, in one exchange."""
    gradients = [p.grad for p in parameters if p.grad is not None] if world_size() > 1 else []
    if gradients:
        flat = mean_over_ranks(torch.cat([g.reshape(-1) for g in gradients]))
        for gradient, mean in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(mean.view_as(gradient))


def anyone(flag: bool) -> bool:
    """Whether the flag is set on any rank: all get the same answer."""
    if world_size() == 1:
        return flag
    return bool(sum_over_ranks(torch.tensor(float(flag), device=_device())))


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank: all must call it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def given_by(
    owner: int, tensor: Tensor | None, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The tensor of one rank, on every rank: all must call it, the others' own is not looked at."""
    if world_size() == 1:
        assert tensor is not None
        return tensor
    if tensor is not None and owner == rank():
        given = tensor.contiguous()
    else:
        given = torch.empty(shape, dtype=dtype, device=device)
    dist.broadcast(given, owner)
    return given


def gather(tree: Any) -> Any:
    """A tree of dicts and lists, its tensors whole and on the CPU of rank 0, None elsewhere.

    One tensor after the other: no rank ever holds more than one whole. All ranks must call it.
    """
    if isinstance(tree, Mapping):
        return {key: gather(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [gather(value) for value in tree]
    if not isinstance(tree, Tensor):
        return tree
    tensor = whole(tree.detach())
    return tensor.cpu() if is_main() else None


def gather_objects(thing: Any) -> list[Any]:
    """What every rank gives, by rank, on every rank: all must call it."""
    if world_size() == 1:
        return [thing]
    everyones: list[Any] = [None] * world_size()
    dist.all_gather_object(everyones, thing)
    return everyones


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, known to every rank, cut as `like` is; as it is where `like` is whole."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(like.device), mesh, placements, src_data_rank=None)


def is_sharded(thing: object) -> bool:
    """Whether it is a tensor of which this rank holds only a shard."""
    if world_size() == 1:  # spares everybody else the import
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(thing, DTensor)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
