"""The training stream: documents packed into rows, their images tokenised with fresh noise.

Of the global batch's rows, rank r of W takes r, r + W, r + 2W, ...; the batch at a step is the
same whatever the number of ranks and worker processes, so its place can be saved by one number of
them and restored by another. docs/data.md says precisely what is promised.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrdpm import distributed
from mmrdpm.data.cache import fingerprint
from mmrdpm.data.documents import Draft, Drafter
from mmrdpm.data.emoji_stream import EmojiStream
from mmrdpm.data.faults import SkippedLog
from mmrdpm.data.mixture import Mixture
from mmrdpm.data.pictures import to_tensor
from mmrdpm.data.plan import DataPlan
from mmrdpm.data.rows import InOrder, Lanes, Stream
from mmrdpm.data.sources import open_source
from mmrdpm.data.sources.cached import CachedLatents
from mmrdpm.document import Document, Packed, pack
from mmrdpm.errors import DataError
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer
from mmrdpm.text_tokenizer import TextTokenizer
from mmrdpm.vocabulary import Vocabulary

_AT_ONCE = 64  # images through the autoencoder


class Loader:
    """Batches of packed rows for one rank.

    Args:
        skipped_log: file to which every record that is left out is added, as a JSON line.

    Raises:
        RecipeError, DataError: the plan or a source cannot be used, or `plan.rows` cannot be
            dealt evenly to the ranks.
    """

    def __init__(
        self,
        plan: DataPlan,
        seed: int,
        image_tokenizer: ImageTokenizer,
        text_tokenizer: TextTokenizer,
        vocabulary: Vocabulary,
        rank: int = 0,
        world_size: int = 1,
        skipped_log: Path | None = None,
    ) -> None:
        if plan.rows % world_size:
            raise DataError(
                f"data.rows is {plan.rows}, which {world_size} ranks cannot share evenly: make it a"
                f" multiple of {world_size}"
            )
        self.plan, self.vocabulary, self.image_tokenizer = plan, vocabulary, image_tokenizer
        self.stream = open_stream(plan, seed, image_tokenizer, text_tokenizer, vocabulary)
        grid, log = image_tokenizer.grid, SkippedLog(skipped_log)
        self.rows: InOrder | Lanes
        if not plan.sources and plan.look_ahead is None:
            self.rows = InOrder(self.stream, plan, grid, rank, world_size)
        else:
            self.rows = Lanes(self.stream, plan, grid, rank, world_size, log)
        self._before = self.rows.state()

    def describe(self) -> str:
        """One line about the size of things."""
        return self.stream.describe()

    def state(self) -> dict[str, Any]:
        """This rank's place in the data, after the last batch; see `merge_states`."""
        return {"data": self.stream.fingerprints(), **self.rows.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes to a place saved by any number of ranks, merged.

        Raises:
            DataError: the data are not those that the place was saved for.
        """
        check_unchanged(self.stream.fingerprints(), state["data"])
        self.rows.restore(state)

    def undo(self) -> None:
        """Goes back to before the last batch, or the one that failed."""
        self.rows.restore(self._before)

    @torch.no_grad()
    def batch(self) -> Packed:
        """The next rows of this rank.

        Raises:
            DataError: a source failed, too many records are broken, or one is longer than a row.
        """
        self._before = self.rows.state()
        rows = self.rows.next()
        grid = self.image_tokenizer.grid
        channels = self.image_tokenizer.latent_channels
        return pack(self._tokenise(rows), self.plan.seq_len, self.vocabulary, channels, len(grid))

    def figures(self) -> dict[str, float]:
        """For the log: records left out since the run began, of all ranks, in all and by cause.

        All ranks must call it.
        """
        parts = distributed.gather_objects(self.rows.broken())
        broken = sum(parts, Counter[str]())
        causes = {f"data/skipped/{cause}": float(count) for cause, count in broken.items()}
        return {"data/skipped": float(broken.total()), **causes}

    def _tokenise(self, rows: Sequence[Sequence[Draft]]) -> list[list[Document]]:
        """Fresh codes for all images of a batch at once."""
        drafts = [image for row in rows for draft in row for image in draft.images]
        tokenised = self._codes([d.image for d in drafts], [d.noise_seed for d in drafts])
        return [[draft.document(tokenised) for draft in row] for row in rows]

    def _codes(
        self, images: Sequence[np.ndarray], seeds: Sequence[int]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """`(code_indices, states, residuals)` of each image; those of one grid go together."""
        latents = self._latents(images)
        done: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for grid in sorted({latent.shape for latent in latents}):
            places = [i for i, latent in enumerate(latents) if latent.shape == grid]
            alike, of = torch.stack([latents[i] for i in places]), [seeds[i] for i in places]
            code_indices, states = self.image_tokenizer.encode_latents(alike, of)
            residuals = self.image_tokenizer.residuals(alike, of, states)
            made = (code_indices, states, residuals)
            each = zip(*(tensor.cpu().unbind(1) for tensor in made), strict=True)
            done.update(zip(places, each, strict=True))
        return (done[i] for i in range(len(latents)))

    def _latents(self, images: Sequence[np.ndarray]) -> list[Tensor]:
        """Float32 `[*grid, C]` each; images in pixels go through the autoencoder."""
        device = self.image_tokenizer.codebook.codes.device
        latents = {
            i: torch.from_numpy(image).to(device).float()
            for i, image in enumerate(images)
            if image.dtype != np.uint8
        }
        places = [i for i in range(len(images)) if i not in latents]
        for begin in range(0, len(places), _AT_ONCE):
            chosen = places[begin : begin + _AT_ONCE]
            pictures = to_tensor(np.stack([images[i] for i in chosen])).to(device)
            encoded = self.image_tokenizer.autoencoder.encode(pictures)
            latents.update(zip(chosen, encoded, strict=True))
        return [latents[i] for i in range(len(images))]


def open_stream(
    plan: DataPlan,
    seed: int,
    image_tokenizer: ImageTokenizer,
    text_tokenizer: TextTokenizer,
    vocabulary: Vocabulary,
) -> Stream:
    """The mixture that a plan names, or the embedded stream where it names none.

    Raises:
        RecipeError, DataError: the plan or a source cannot be used.
    """
    drafter = Drafter(plan, text_tokenizer, vocabulary, image_tokenizer)
    if not plan.sources:
        return EmojiStream(seed, drafter, image_tokenizer)
    sources = {name: open_source(name, config) for name, config in plan.sources.items()}
    for source in sources.values():
        if isinstance(source, CachedLatents):
            source.check_autoencoder(fingerprint(image_tokenizer))
    if not all(source.texts_only for source in sources.values()):
        drafter.check_fits()
    weights = {name: config.weight for name, config in plan.sources.items()}
    return Mixture(sources, weights, seed, drafter)


def check_unchanged(now: Mapping[str, str], saved: Mapping[str, str]) -> None:
    """Raises DataError unless the fingerprints are those that a place was saved with."""
    changed = [name for name in {**now, **saved} if now.get(name) != saved.get(name)]
    if changed:
        raise DataError(
            f"the data changed since the run was saved ({', '.join(changed)}): its place in"
            " them means nothing now: put them back as they were, or begin a new run"
        )


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The states of all ranks as one, which any number of ranks can restore."""
    merged = dict(states[0])
    if "lanes" in merged:
        merged["lanes"] = {lane: s for state in states for lane, s in state["lanes"].items()}
    return merged
