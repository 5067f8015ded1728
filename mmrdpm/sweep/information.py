"""Information per step, and what is lost by drawing the positions of a step independently.

The information of step t is `H(q_t | x_t, eps, text)` as far as the model knows: its cross-entropy
per code, an upper bound. The model draws all N codes of a step at once, as if they were independent
given what it sees; the truth is a joint distribution, whose entropy is lower by the total
correlation. A small head on the frozen model estimates that entropy: it sees some of the step's
codes and predicts the others, in every order (order-agnostic autoregression, Hoogeboom et al. 2021,
arXiv 2110.02037, eq. 2), so that over 0..N-1 codes seen

    H(q_t | ...) <= N E_m E_order [ cross-entropy of an unseen code, m codes seen ]

Two figures follow, in nats per code:

- `divergence`, the model's cross-entropy minus this: a lower bound, up to sampling noise, of the
  Kullback-Leibler divergence from the true joint distribution to the model's independent one;
- `independence`, the head's own cross-entropy with nothing seen minus this: the part of it that no
  better marginals could win back. A difference of two upper bounds, so an estimate, no bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mmrdpm.api import Model
from mmrdpm.data.loader import Loader
from mmrdpm.data.plan import DataPlan
from mmrdpm.document import NO_TARGET, TEXT_TIMESTEP, Packed

_ROWS = 8  # pictures or texts at once, about
_ROOM = 96  # tokens beside the noisy blocks of a picture
_NOTHING_SEEN = 0.25  # share of the head's lessons without any code to see
_ORDERS = 4  # random orders per block when the head is measured


@dataclass(frozen=True)
class Information:
    """Means in nats per code and step, in the order of drawing, T first.

    Attributes:
        loss: the model's own.
        marginal: the head's that sees no code of the step.
        joint: the head's over all numbers of codes seen.
    """

    loss: list[float]
    marginal: list[float]
    joint: list[float]


@dataclass(frozen=True)
class _Blocks:
    """Noisy blocks: hidden states `[B, N, D]`, logits `[B, N, K]`, codes and timestep `[B, N]`."""

    hidden: Tensor
    logits: Tensor
    codes: Tensor
    timesteps: Tensor


class JointHead(nn.Module):
    """Predicts the codes of a block from the model's hidden states and the codes it is shown."""

    def __init__(self, width: int, positions: int, codes: int) -> None:
        super().__init__()
        self.shown = nn.Embedding(codes + 1, width)  # the last row: not shown
        self.places = nn.Parameter(torch.zeros(positions, width))
        heads = next(h for h in (8, 4, 2, 1) if width % h == 0)
        self.layers = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
                )
                for _ in range(2)
            )
        )
        self.out = nn.Linear(width, codes)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, blocks: _Blocks, seen: Tensor) -> Tensor:
        """Cross-entropy `[B, N]` of every code; those in the bool mask `seen` are given away."""
        codes = blocks.codes.masked_fill(~seen, self.shown.num_embeddings - 1)
        x = self.layers(blocks.hidden + self.shown(codes) + self.places)
        logits = blocks.logits + self.out(x)  # at first the model's own
        return cross_entropy(logits.transpose(1, 2), blocks.codes, reduction="none")


def text_loss(model: Model, batches: int, seed: int) -> float:
    """Nats per token of the embedded texts, among all ids that are no code."""
    plan = DataPlan(image_share=0.0, caption_share=0.0, steps_per_image=1, rows=_ROWS)
    total = count = 0.0
    transformer, texts = model.transformer, slice(model.transformer.code_ids.start)
    for packed in _stream(model, plan, batches, seed):
        learned = packed.targets != NO_TARGET
        with torch.no_grad():
            logits = transformer.logits(transformer(packed)[learned], texts).float()
        total += cross_entropy(logits, packed.targets[learned], reduction="sum").item()
        count += len(logits)
    return total / count


def information(model: Model, batches: int, joint_steps: int, seed: int) -> Information:
    """Figures over training pictures under fresh noise; the head has `joint_steps` updates.

    With `joint_steps` 0, `marginal` and `joint` are empty.
    """
    num_timesteps, positions = model.images.num_timesteps, model.images.noise([0])[0, 0, ..., 0]
    plan = DataPlan(
        image_share=1.0,
        caption_share=0.0,
        caption_dropout=0.0,
        steps_per_image=num_timesteps,
        rows=_ROWS,
        seq_len=num_timesteps * positions.numel() + _ROOM,
    )
    stream = _stream(model, plan, joint_steps + batches, seed)
    blocks = (_blocks(model, packed, positions.numel()) for packed in stream)
    head = _fit(model, blocks, positions.numel(), joint_steps, seed) if joint_steps else None
    return _measure(head, blocks, num_timesteps, seed)


def _stream(model: Model, plan: DataPlan, batches: int, seed: int) -> Iterator[Packed]:
    """Batches of documents that no training with a small seed has drawn."""
    loader = Loader(plan, 10**9 + seed, model.images, model.texts, model.vocabulary)
    device = model.transformer.table.weight.device
    for _ in range(batches):
        yield loader.batch().to(device)


@torch.no_grad()
def _blocks(model: Model, packed: Packed, positions: int) -> _Blocks:
    noisy = packed.timesteps > TEXT_TIMESTEP + 1
    offset = model.vocabulary.code_offset
    hidden = model.transformer(packed)[noisy].float()
    logits = model.transformer.logits(hidden)[:, offset:].float()
    timesteps = packed.timesteps[noisy]
    sizes = torch.tensor(model.images.codebook.sizes, device=timesteps.device)
    beyond = torch.arange(logits.shape[1], device=sizes.device) >= sizes[timesteps - 1, None]
    parts = (
        hidden[:, : model.transformer.config.width],  # without what preconditioning adds
        logits.masked_fill(beyond, -1e4),
        packed.targets[noisy] - offset,
        timesteps,
    )
    return _Blocks(*(part.unflatten(0, (-1, positions)) for part in parts))


def _fit(
    model: Model, blocks: Iterator[_Blocks], positions: int, steps: int, seed: int
) -> JointHead:
    width, codes = model.transformer.config.width, model.images.codebook_size
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = JointHead(width, positions, codes)
    head = head.to(model.transformer.table.weight.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps + 1)
    for _ in range(steps):
        lesson = next(blocks)
        seen = _orders(lesson.codes.shape, generator, _NOTHING_SEEN).to(lesson.codes.device)
        loss = _unseen_mean(head(lesson, seen), seen).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return head.eval().requires_grad_(False)


def _orders(shape: torch.Size, generator: torch.Generator, nothing: float = 0.0) -> Tensor:
    """Which codes are seen, bool `[B, N]`: the first m, 0..N-1, of a random order."""
    place = torch.rand(shape, generator=generator).argsort(-1)
    seen = torch.randint(shape[1], (shape[0], 1), generator=generator)
    some = torch.rand((shape[0], 1), generator=generator) >= nothing
    return place < seen * some


def _unseen_mean(losses: Tensor, seen: Tensor) -> Tensor:
    """Mean over the unseen codes of each block: `[B]`."""
    return (losses * ~seen).sum(1) / (~seen).sum(1)


@torch.no_grad()
def _measure(
    head: JointHead | None, blocks: Iterator[_Blocks], num_timesteps: int, seed: int
) -> Information:
    generator = torch.Generator().manual_seed(seed + 1)
    rows, timesteps = [], []
    for b in blocks:
        own = cross_entropy(b.logits.transpose(1, 2), b.codes, reduction="none").mean(1)
        columns = [own]
        if head is not None:
            nothing = torch.zeros_like(b.codes, dtype=torch.bool)
            columns.append(head(b, nothing).mean(1))
            orders = [_orders(b.codes.shape, generator).to(own.device) for _ in range(_ORDERS)]
            columns.append(torch.stack([_unseen_mean(head(b, s), s) for s in orders]).mean(0))
        rows.append(torch.stack(columns, dim=1))
        timesteps.append(b.timesteps[:, 0])
    figures, steps = torch.cat(rows), torch.cat(timesteps)
    means = torch.stack([figures[steps == t].mean(0) for t in range(num_timesteps, 0, -1)])
    empty = Information([], [], [])
    names = ("loss", "marginal", "joint")[: means.shape[1]]
    return replace(empty, **{n: means[:, i].tolist() for i, n in enumerate(names)})
