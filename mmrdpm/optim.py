"""Optimisers, the learning rate's course and the average of the weights.

Matrices of the stack go to Muon (Jordan 2024; learning rates scaled to AdamW's by Liu et al. 2025,
arXiv 2502.16982, eq. 4), everything else, or all of it, to AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from mmrdpm import distributed

LearningRateSchedule = Literal["cosine", "wsd"]
STACK = ("attentions.", "feed_forwards.")  # beginnings of the names of our layers' parameters

_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # of AdamW and of Muon


@dataclass(frozen=True)
class OptimizerConfig:
    """What `Optimizers` builds; the learning rate itself is set at every step.

    Attributes:
        clip: the norm that gradients are scaled down to; 0 leaves them as they are.
        tuned_width: of the model whose best learning rate the recipe names; that of another width
            follows, see `width_scale`. 0 takes the rate as it is.
    """

    name: Literal["muon", "adamw"] = "muon"
    weight_decay: float = field(default=0.01, metadata={"min": 0.0})
    beta1: float = field(default=0.9, metadata={"min": 0.0, "max": 0.99999})
    beta2: float = field(default=0.98, metadata={"min": 0.0, "max": 0.99999})
    clip: float = field(default=1.0, metadata={"min": 0.0})
    tuned_width: int = field(default=0, metadata={"min": 0})


class Muon(Optimizer):
    """Momentum whose update is made orthogonal, for matrices only (Jordan 2024).

    Of as many matrices as there are ranks each makes one orthogonal, and gives it to the others.

    torch's own class computes in bfloat16 always, which a CPU without it emulates a hundred times
    slower than float32; this one computes in the dtype it is given, and is the same otherwise.
    """

    _MOMENTUM = 0.95
    _COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, Jordan 2024
    _ITERATIONS = 5

    def __init__(self, matrices: list[nn.Parameter], weight_decay: float, dtype: torch.dtype):
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        ranks = distributed.world_size()
        for group in self.param_groups:
            learning = [p for p in group["params"] if p.grad is not None]
            for begin in range(0, len(learning), ranks):
                self._learn(learning[begin : begin + ranks], group["lr"], group["weight_decay"])

    def _learn(self, matrices: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        """Updates at most as many matrices as there are ranks; each needs its own one whole."""
        mine: Tensor | None = None
        for owner, p in enumerate(matrices):
            matrix = distributed.whole(self._direction(p))
            if owner == distributed.rank():
                mine = matrix
        if mine is not None:  # only when all are gathered, which ranks do together
            mine = self.orthogonal(mine)
        for owner, p in enumerate(matrices):
            update = distributed.given_by(owner, mine, p.shape, self.dtype, p.device).to(p.dtype)
            p.mul_(1 - lr * weight_decay)
            p.add_(distributed.shard_like(update, p), alpha=-lr * 0.2 * max(p.shape) ** 0.5)

    def _direction(self, p: nn.Parameter) -> Tensor:
        """Nesterov momentum of a parameter's gradient."""
        assert p.grad is not None
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        momentum = state["momentum_buffer"]
        momentum.lerp_(p.grad, 1 - self._MOMENTUM)
        return p.grad.lerp(momentum, self._MOMENTUM)

    def orthogonal(self, matrix: Tensor) -> Tensor:
        """Newton-Schulz: a whole matrix's singular values brought near 1, its directions kept.

        Any `[m, n]` in, the same shape out, in `self.dtype`.
        """
        x = matrix.to(self.dtype)
        wide = x if x.shape[0] <= x.shape[1] else x.T
        wide = wide / wide.norm().clamp(min=1e-7)
        if self.dtype == torch.float32 and 2 * wide.shape[1] > 3 * len(wide):
            wide = self._by_gram(wide)
        else:
            a, b, c = self._COEFFICIENTS
            for _ in range(self._ITERATIONS):
                gram = wide @ wide.T
                square = torch.addmm(gram, gram, gram, beta=b, alpha=c)
                wide = torch.addmm(wide, square, wide, beta=a)
        return wide if x.shape[0] <= x.shape[1] else wide.T

    def _by_gram(self, wide: Tensor) -> Tensor:
        """The same iterations of the Gram matrix alone, multiplied with the matrix at the end.

        `X <- p(G) X` with `G = X X^T` makes `G <- p(G) G p(G)`, and all of these commute: fewer
        products from `n > 1.5 m` on. bfloat16 would lose the small ones of G's eigenvalues, which
        are squares.
        """
        (a, b, c), gram, product = self._COEFFICIENTS, wide @ wide.T, None
        for left in reversed(range(self._ITERATIONS)):
            polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
            polynomial.diagonal().add_(a)
            product = polynomial if product is None else product @ polynomial
            if left:
                gram = polynomial @ (gram @ polynomial)
        assert product is not None
        return product @ wide


def width_scale(name: str, ratio: float) -> float:
    """What AdamW's rate of a parameter is multiplied with in a model `1 / ratio` times as wide.

    An update of a matrix should have a spectral norm that does not depend on the width (Yang,
    Simon & Bernstein 2023, arXiv 2310.17813, condition 1, at fixed aspect ratios). AdamW's grows as
    the width, Muon's, scaled to AdamW's size, as its root: Muon's rate is multiplied with the root
    of the ratio. The tables that score tokens fall under the same rule (their sums run over the
    width); whatever only enters the stack
    is normalised there, and keeps its rate.

    Args:
        name: of the parameter.
        ratio: of the width that the rate was tuned at to the width of the model.
    """
    outside = name.startswith(("from_latents", "timesteps", "precisions", "norms"))
    return 1.0 if outside or name.endswith(("q_norm", "k_norm")) else ratio


class Optimizers:
    """One or two optimisers that step as one.

    Args:
        dtype: of their matrix products.
        stack: beginnings of the names of the parameters whose matrices Muon takes.
        width: of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        dtype: torch.dtype = torch.float32,
        stack: tuple[str, ...] = STACK,
        width: int = 0,
    ) -> None:
        self.config, self.parameters = config, list(model.parameters())
        ratio = config.tuned_width / width if config.tuned_width and width else 1.0
        matrices: list[nn.Parameter] = []
        rest: dict[float, list[nn.Parameter]] = {}
        for name, p in model.named_parameters():
            inside = p.ndim == 2 and name.startswith(stack) and name.endswith("weight")
            if inside and config.name == "muon":
                matrices.append(p)
            else:
                rest.setdefault(width_scale(name, ratio), []).append(p)
        groups = [{"params": members, "scale": scale} for scale, members in rest.items()]
        betas, decay = (config.beta1, config.beta2), config.weight_decay
        self.parts: list[Optimizer] = [AdamW(groups, betas=betas, weight_decay=decay, fused=True)]
        if matrices:
            self.parts.append(Muon(matrices, decay, dtype))
            self.parts[-1].param_groups[0]["scale"] = ratio**0.5  # see `width_scale`

    def clip(self) -> float:
        """Clips the gradients; gives their norm before, of all ranks where they are sharded."""
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip or math.inf)
        return distributed.whole(norm).item()

    def step(self, lr: float) -> None:
        """One update by the gradients."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr * group.get("scale", 1.0)
            part.step()

    def clear(self) -> None:
        """Forgets the gradients."""
        for part in self.parts:
            part.zero_grad()

    def state(self, moments: bool = True) -> list[dict[str, Any]]:
        """What `restore` takes, whole, on rank 0: all ranks must call it.

        Args:
            moments: whether those are in it, or are saved apart, see `moments`.
        """
        states = [part.state_dict() for part in self.parts]
        if not moments:
            states = [{**s, "state": {i: _rest(v) for i, v in s["state"].items()}} for s in states]
        return distributed.gather(states)

    def moments(self, wanted: Collection[str] = ()) -> dict[str, Tensor]:
        """Moving averages of gradients by name, each cut as its parameter is.

        Args:
            wanted: names of what is to be there even if no update has made it yet.
        """
        found = {}
        for number, part in enumerate(self.parts):
            for index, p in enumerate(p for group in part.param_groups for p in group["params"]):
                for key in _MOMENTS:
                    name = f"{number}.{index}.{key}"
                    if name in wanted:
                        part.state[p].setdefault(key, torch.zeros_like(p))
                    if key in part.state.get(p, {}):
                        found[name] = part.state[p][key]
        return found

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Goes back to a saved state, whatever the number of ranks that saved it."""
        for part, saved in zip(self.parts, state, strict=True):
            parameters = [p for group in part.param_groups for p in group["params"]]
            shards = {
                index: {
                    name: distributed.shard_like(value, parameters[index])
                    if value.shape == parameters[index].shape
                    else value
                    for name, value in values.items()
                }
                for index, values in saved["state"].items()
            }
            part.load_state_dict({**saved, "state": shards})


def _rest(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in _MOMENTS}


def learning_rate(
    peak: float,
    step: int,
    steps: int,
    warmup: int,
    schedule: LearningRateSchedule = "cosine",
    decay: float = 0.2,
) -> float:
    """Linear rise over `warmup` steps, then down to zero at `steps`; `step` is 0..steps - 1.

    cosine falls as a half cosine; wsd (warmup, stable, decay) stays at the peak and falls in the
    last `decay` share of the steps only, as `1 - sqrt(progress)` (Hägele et al. 2024, arXiv
    2405.18392), so that a run can be prolonged from before the fall, see `before_fall`.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    fall = _fall(steps, decay)
    return peak * (1 - math.sqrt(max(0.0, 1 - (steps - step) / fall)))


def before_fall(steps: int, decay: float) -> int:
    """The updates of wsd whose learning rate does not hang on `steps` and `decay`: its first."""
    return steps - _fall(steps, decay) + 1


def _fall(steps: int, decay: float) -> int:
    return max(1, round(steps * decay))


class Average:
    """The exponential moving average of a model's parameters, shard by shard.

    Its first steps forget faster, `(1 + n) / (10 + n)` of the average kept at step n, so that
    the random start does not linger (as in TensorFlow's ExponentialMovingAverage).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.model = decay, model
        self.tensors = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the parameters after step `step`."""
        kept = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.model.named_parameters():
            self.tensors[name].lerp_(parameter, 1 - kept)

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes back to a saved average of whole tensors."""
        for name, tensor in self.tensors.items():
            tensor.copy_(distributed.shard_like(tensors[name], tensor))
