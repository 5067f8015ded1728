"""The one loss: cross-entropy over the shared vocabulary at text targets and noisy positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from mmrdpm.document import NO_TARGET, Packed
from mmrdpm.rdpm.soft_labels import softened
from mmrdpm.transformer import Transformer

# Positions whose logits are computed at once. On a CPU those of one part stay in the cache, where
# those of all would be the largest tensor; on a GPU every part costs a copy of the table in bf16.
PARTS = {"cpu": 512, "cuda": 4096}


@dataclass(frozen=True)
class Losses:
    """Cross-entropies in nats.

    Attributes:
        total: the weighted mean that training lowers, a scalar with a gradient.
        per_token: float32 `[M]` of the M targets themselves, whatever the labels, detached.
        timesteps: int64 `[M]`, the timestep of each target, `TEXT_TIMESTEP` for text.
    """

    total: Tensor
    per_token: Tensor
    timesteps: Tensor


def summed_weights(packed: Packed, text_weight: float = 1.0) -> Tensor:
    """The weights of all targets of some rows, added up: a float32 scalar."""
    learned = packed.targets != NO_TARGET
    return _weights(packed.timesteps[learned], text_weight).sum()


def loss(
    model: Transformer,
    packed: Packed,
    *,
    divisor: Tensor | None = None,
    text_weight: float = 1.0,
    z_weight: float = 0.0,
    soft_labels: float = 0.0,
    codes_apart: bool = False,
) -> Losses:
    """Cross-entropy at every target; text targets weigh `text_weight`, image targets 1.

    The mean is over the summed weights, so that packing does not change the objective. Only
    positions that have a target are scored.

    Args:
        divisor: float32 scalar, the summed weights of the whole batch where these rows are only a
            part of it.
        z_weight: of the squared log of the softmax's denominator, which keeps logits from drifting
            (PaLM, Chowdhery et al. 2022, arXiv 2204.02311, section 5: 1e-4).
        soft_labels: tau of the codes' labels, see `rdpm.soft_labels`, which say where the
            residual lies and not only to which code it is nearest. 0 is the nearest code alone.
            Needs `code_geometry`.
        codes_apart: whether codes are scored among the codes alone, and text among all that is no
            code, which spares the products with what cannot stand there; else all among all.
    """
    learned = packed.targets.flatten() != NO_TARGET
    kinds = [(learned, slice(0, model.code_ids.stop), soft_labels)]
    if codes_apart:
        code = packed.timesteps.flatten() > 0
        text_ids = slice(0, model.code_ids.start)
        kinds = [(learned & code, model.code_ids, soft_labels), (learned & ~code, text_ids, 0.0)]
    # nonzero waits for what a GPU still does, so before the stack is handed to it
    places = [kind.nonzero()[:, 0] for kind, _, _ in kinds]
    columns = (model(packed), packed.timesteps, packed.targets, packed.residuals)
    flat = [column.flatten(0, 1) for column in columns]
    scored = [
        _scored(model, z_weight, ids, softness, [column.index_select(0, at) for column in flat])
        for at, (_, ids, softness) in zip(places, kinds, strict=True)
    ]
    order = torch.cat(places).argsort()  # of positions
    per_token, wanted, squared_z = (torch.cat(x)[order] for x in zip(*scored, strict=True))
    timesteps = flat[1][learned]
    weights = _weights(timesteps, text_weight)
    if divisor is None:
        divisor = weights.sum()
    raised = wanted + z_weight * squared_z if z_weight else wanted
    total = (raised * weights).sum() / divisor.clamp(min=1e-8)
    return Losses(total, per_token.detach(), timesteps)


def score(
    code_features: Tensor | None,
    soft_labels: float,
    z_weight: float,
    rows: Tensor,
    hidden: Tensor,
    timesteps: Tensor,
    targets: Tensor,
    residuals: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every target: its cross-entropy, that of what is learned, the squared log-partition.

    Args:
        rows: of the ids that each is scored among, see `Transformer.scored`; `targets` count from
            the first of them.
    """
    logits = linear(hidden[:, : rows.shape[1]], rows).float()
    squared_z = logits.logsumexp(-1).square() if z_weight else logits.new_zeros(len(targets))
    if not soft_labels:
        exact = cross_entropy(logits, targets, reduction="none")
        return exact, exact, squared_z
    assert code_features is not None
    codes, log_p = code_features[:, :-1], logits.log_softmax(-1)
    with torch.autocast(hidden.device.type, enabled=False):
        wanted = softened(residuals, codes, soft_labels)
    exact = -log_p.gather(1, targets[:, None])[:, 0]
    soft = -(wanted * log_p[:, -len(codes) :]).sum(-1)
    return exact, torch.where(timesteps > 0, soft, exact), squared_z


def _scored(
    model: Transformer, z_weight: float, ids: slice, soft_labels: float, columns: Sequence[Tensor]
) -> list[Tensor]:
    """What `score` gives of some targets among some ids, part by part.

    Args:
        columns: hidden states, timesteps, targets and residuals.
    """
    hidden, timesteps, targets, residuals = columns
    size = PARTS.get(hidden.device.type, PARTS["cuda"])
    how = (model.code_features, soft_labels, z_weight, model.scored(ids))
    each = (x.split(size) for x in (hidden, timesteps, targets - ids.start, residuals))
    parts = [model.checkpointed(score, *how, *part) for part in zip(*each, strict=True)]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def _weights(timesteps: Tensor, text_weight: float) -> Tensor:
    return torch.where(timesteps < 0, text_weight, 1.0)
