"""Documents to packed rows: pure functions from segments to the tensors that the model reads.

A document is a sequence of segments, text or image, in any order. An image segment becomes one
noisy block per timestep to be learned, then, where something later looks at it, a clean block.
The noisy blocks come first, so that "earlier context" never shows them their own clean image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mmrdpm.attention.layout import BlockKind, Layout
from mmrdpm.vocabulary import Vocabulary

NO_TARGET = -100
TEXT_TIMESTEP = -1  # marks a token that is no image position


@dataclass(frozen=True)
class TextSegment:
    """A run of token ids, special ones included; each predicts the next of the run."""

    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class ImageSegment:
    """One tokenised image.

    Attributes:
        code_indices: int64 `[T, *grid]`, row `t - 1` holds the targets of timestep t.
        states: float32 `[T + 1, *grid, C]`, row t holds `x_t`; row T is the start noise.
        timesteps: those that are learned, each 1..T.
        clean: whether a later segment sees the image.
        residuals: float32 `[T, *grid, C]`, row `t - 1` what the codes of timestep t are nearest to,
            where a loss is to know it, see `objective.loss`.
    """

    code_indices: Tensor
    states: Tensor
    timesteps: tuple[int, ...] = ()
    clean: bool = False
    residuals: Tensor | None = None

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(self.code_indices.shape[1:])

    @property
    def blocks(self) -> tuple[int, ...]:
        """The timestep of each block, in order; 0 is the clean one."""
        return self.timesteps + (0,) * self.clean


Document = Sequence[TextSegment | ImageSegment]


@dataclass(frozen=True)
class Packed:
    """`R` rows of `S` tokens, or one document as a single row.

    Attributes:
        token_ids: int64 `[R, S]`; at image positions the padding id, which is not looked at.
        latents: float32 `[R, S, 2 C]`, `(x_t, x_T)` at image positions, zero elsewhere.
        timesteps: int64 `[R, S]`, 0 in clean and t in noisy blocks, `TEXT_TIMESTEP` elsewhere.
        targets: int64 `[R, S]`, token ids over the whole vocabulary, or `NO_TARGET`.
        residuals: float32 `[R, S, C]`, what a target code is nearest to, NaN where its segment does
            not say, zero where no code is wanted.
        positions: int64 `[R, S, 1 + grid rank]`: slot, then place in the grid.
        layout: who sees whom.
    """

    token_ids: Tensor
    latents: Tensor
    timesteps: Tensor
    targets: Tensor
    residuals: Tensor
    positions: Tensor
    layout: Layout

    def to(self, device: torch.device | str) -> Packed:
        """The same rows on another device."""
        return self._each(lambda tensor: tensor.to(device))

    def rows(self, where: slice) -> Packed:
        """Some of the rows."""
        return self._each(lambda tensor: tensor[where])

    def _each(self, change: Callable[[Tensor], Tensor]) -> Packed:
        layout = self.layout
        return Packed(
            change(self.token_ids),
            change(self.latents),
            change(self.timesteps),
            change(self.targets),
            change(self.residuals),
            change(self.positions),
            Layout(*map(change, (layout.document_ids, layout.block_ids, layout.kinds))),
        )


def length(document: Document) -> int:
    """The number of tokens that a document takes in a row."""
    return sum(
        len(s.token_ids)
        if isinstance(s, TextSegment)
        else len(s.blocks) * s.code_indices[0].numel()
        for s in document
    )


def pack(
    rows: Sequence[Sequence[Document]],
    seq_len: int,
    vocabulary: Vocabulary,
    latent_channels: int,
    grid_rank: int = 2,
) -> Packed:
    """Rows of documents, each padded to `seq_len`.

    Raises:
        ValueError: the documents of a row are longer than that.
    """
    empty = _empty(len(rows), seq_len, vocabulary, latent_channels, grid_rank)
    parts: list[_Part] = []
    about: list[tuple[int, ...]] = []  # of each part: where it begins, document and block
    for row, documents in enumerate(rows):
        offset, block = row * seq_len, 0
        for document_id, document in enumerate(documents):
            slot = 0
            for segment in document:
                for part in _parts(segment, slot, vocabulary, grid_rank):
                    parts.append(part)
                    about.append((offset, document_id, block))
                    offset, block = offset + len(part.targets), block + 1
                slot += len(segment.token_ids) if isinstance(segment, TextSegment) else 1
        used = offset - row * seq_len
        if used > seq_len:
            raise ValueError(f"row {row} has {used} tokens, more than {seq_len}")
        empty.layout.block_ids[row, used:] = block
    if parts:
        _place(empty, parts, torch.tensor(about))
    return empty


@dataclass(frozen=True)
class _Part:
    """One block of a document, before it has a place."""

    kind: BlockKind
    timestep: int
    token_ids: Tensor | None
    latents: Tensor | None
    residuals: Tensor | None
    targets: Tensor
    positions: Tensor


def _parts(
    segment: TextSegment | ImageSegment, slot: int, vocabulary: Vocabulary, grid_rank: int
) -> list[_Part]:
    if isinstance(segment, TextSegment):
        token_ids = torch.tensor(segment.token_ids)
        targets = torch.cat([token_ids[1:], torch.tensor([NO_TARGET])])
        positions = torch.zeros(len(token_ids), 1 + grid_rank, dtype=torch.int64)
        positions[:, 0] = slot + torch.arange(len(token_ids))
        return [_Part(BlockKind.TEXT, TEXT_TIMESTEP, token_ids, None, None, targets, positions)]
    positions = grid_positions(segment.grid, slot)
    start = segment.states[-1].flatten(0, -2)
    parts: list[_Part] = []
    for timestep in segment.blocks:
        residuals = torch.zeros_like(start)
        latents = torch.cat([segment.states[timestep].flatten(0, -2), start], dim=-1)
        if timestep:
            targets = vocabulary.code_token_ids(segment.code_indices[timestep - 1].flatten())
            if segment.residuals is None:
                residuals = torch.full_like(start, torch.nan)
            else:
                residuals = segment.residuals[timestep - 1].flatten(0, -2)
        else:
            # what later segments see is the image, whatever noise it was drawn from
            latents[:, latents.shape[1] // 2 :] = 0
            targets = torch.full((len(latents),), NO_TARGET)
        noisy = BlockKind.FOLLOWING if parts else BlockKind.NOISY
        kind = noisy if timestep else BlockKind.CLEAN
        parts.append(_Part(kind, timestep, None, latents, residuals, targets, positions))
    return parts


def grid_positions(grid: tuple[int, ...], slot: int) -> Tensor:
    """Positions of one image block: int64 `[N, 1 + rank]`, all in one slot."""
    positions = _places(grid).clone()
    positions[:, 0] = slot
    return positions


@cache
def _places(grid: tuple[int, ...]) -> Tensor:
    axes = torch.meshgrid(torch.arange(1), *(torch.arange(n) for n in grid), indexing="ij")
    return torch.stack([axis.flatten() for axis in axes], dim=-1)


def _empty(
    rows: int, seq_len: int, vocabulary: Vocabulary, latent_channels: int, grid_rank: int
) -> Packed:
    shape = (rows, seq_len)
    return Packed(
        token_ids=torch.full(shape, vocabulary.pad),
        latents=torch.zeros(*shape, 2 * latent_channels),
        timesteps=torch.full(shape, TEXT_TIMESTEP),
        targets=torch.full(shape, NO_TARGET),
        residuals=torch.zeros(*shape, latent_channels),
        positions=torch.zeros(*shape, 1 + grid_rank, dtype=torch.int64),
        layout=Layout(
            torch.full(shape, -1),
            torch.zeros(shape, dtype=torch.int64),
            torch.full(shape, int(BlockKind.TEXT)),
        ),
    )


def _place(packed: Packed, parts: Sequence[_Part], about: Tensor) -> None:
    """Writes all parts into the rows at once.

    Args:
        about: int64 `[parts, 3]`: place in the flattened rows, document and block.
    """
    lengths = torch.tensor([len(part.targets) for part in parts])
    kinds = torch.tensor([(int(part.kind), part.timestep) for part in parts])
    before = lengths.cumsum(0) - lengths
    about[:, 0] -= before
    each = torch.cat([about, kinds], dim=1).repeat_interleave(lengths, dim=0)
    shift, document_ids, block_ids, kind, timesteps = each.unbind(1)
    where = shift + torch.arange(len(each))
    layout = packed.layout
    for field, values in (
        (packed.targets, torch.cat([part.targets for part in parts])),
        (packed.positions, torch.cat([part.positions for part in parts])),
        (packed.timesteps, timesteps),
        (layout.document_ids, document_ids),
        (layout.block_ids, block_ids),
        (layout.kinds, kind),
    ):
        field.flatten(0, 1)[where] = values
    text = kind == BlockKind.TEXT
    for field, part_values, mask in (
        (packed.token_ids, [part.token_ids for part in parts], text),
        (packed.latents, [part.latents for part in parts], ~text),
        (packed.residuals, [part.residuals for part in parts], ~text),
    ):
        if there := [values for values in part_values if values is not None]:
            field.flatten(0, 1)[where[mask]] = torch.cat(there)
