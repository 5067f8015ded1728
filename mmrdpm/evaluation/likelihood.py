"""Figures that need the model's own probabilities: retrieval, bits per byte, loss per timestep."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmrdpm.api import Model
from mmrdpm.data.pictures import to_square, to_tensor
from mmrdpm.document import Document, ImageSegment, TextSegment, length, pack
from mmrdpm.errors import DataError
from mmrdpm.evaluation.figure import Figure, digest, digest_of_pictures
from mmrdpm.identity import codes_sha256, steps_of
from mmrdpm.metrics.interval import AT_LEAST_0, bootstrap
from mmrdpm.objective import Losses, loss

_TOKENS = 4096  # scored at once

Pictures = Sequence[Image.Image]


def retrieval(model: Model, pictures: Pictures, texts: Sequence[str]) -> tuple[Figure, Figure]:
    """Image to text and text to image: is the right one the likeliest by `log p(text | image)`?

    Others that are as likely, as where two names share a picture, do not make it a miss.
    The second needs no other score: with every picture as likely as any other beforehand, Bayes'
    rule makes the likeliest picture the one under which the text is likeliest.

    Raises:
        DataError: there are no pictures.
    """
    _need(len(pictures), "retrieval by score")
    scores = score_matrix(model, pictures, texts)
    right = scores.diagonal()
    protocol = {
        "evaluator": "log p(text | image) of the model itself, codes left out",
        "data_sha256": digest_of_pictures(pictures, texts),
        "count": len(pictures),
        "codes_seed": 0,
    }
    return (
        Figure.share("image to text, top 1", (right >= scores.amax(1)).tolist(), protocol),
        Figure.share("text to image, top 1", (right >= scores.amax(0)).tolist(), protocol),
    )


def score_matrix(model: Model, pictures: Pictures, texts: Sequence[str]) -> Tensor:
    """`log p(text | image)` in nats, as `Model.score`, of all pairs: float64 `[images, texts]`."""
    before = TextSegment(model.vocabulary.prompt())
    captions = [TextSegment(model.vocabulary.caption(model.texts.encode(t))) for t in texts]
    code_indices, states = _tokenise(model, pictures, [0] * len(pictures))
    documents: list[Document] = [
        [before, ImageSegment(codes, path, clean=True), caption]
        for codes, path in zip(code_indices, states, strict=True)
        for caption in captions
    ]
    # the text before the picture has a target too, which is no part of the score
    scores = [-row[1:].sum().item() for row in _per_document(model, documents)]
    return torch.tensor(scores, dtype=torch.float64).reshape(len(pictures), len(texts))


def bits_per_byte(model: Model, texts: Sequence[str], data: str) -> Figure:
    """`-log2 p` of texts, their ends included, over their UTF-8 bytes.

    Args:
        data: what the texts are, for the protocol.

    Raises:
        DataError: there are no texts, or one is longer than the model's context.
    """
    documents = text_documents(model, texts)
    bits = np.array([row.sum().item() for row in _per_document(model, documents)]) / math.log(2)
    size = np.array([len(text.encode()) for text in texts])

    def ratio(chosen: np.ndarray) -> float:
        return float(bits[chosen].sum() / size[chosen].sum())

    value = ratio(np.arange(len(texts)))
    protocol = {
        "evaluator": "log p(text) of the model itself, codes left out",
        "data": data,
        "data_sha256": digest(list(texts)),
        "count": len(texts),
    }
    interval = bootstrap(ratio, value, len(texts), limits=AT_LEAST_0)
    return Figure("bits per byte", value, interval, "bits/byte", len(texts), protocol)


def text_documents(model: Model, texts: Sequence[str]) -> list[Document]:
    """A document of each text alone, between its begin and end.

    Raises:
        DataError: there are no texts, or one is longer than the model's context.
    """
    _need(len(texts), "bits per byte")
    documents: list[Document] = []
    for text in texts:
        tokens = (model.vocabulary.bos, *model.texts.encode(text), model.vocabulary.eos)
        if len(tokens) > model.context:
            raise DataError(
                f"text {text[:30]!r} takes {len(tokens)} tokens, more than the model's context of"
                f" {model.context}: shorten it"
            )
        documents.append([TextSegment(tokens)])
    return documents


def loss_per_timestep(
    model: Model, pictures: Pictures, texts: Sequence[str], seed: int
) -> list[Figure]:
    """Mean cross-entropy per code at each timestep, T first, of pictures given their texts.

    Picture i takes its noise from seed `seed + i`.

    Raises:
        DataError: there are no pictures.
    """
    _need(len(pictures), "loss per timestep")
    steps = tuple(range(model.images.num_timesteps, 0, -1))
    seeds = [seed + i for i in range(len(pictures))]
    code_indices, states = _tokenise(model, pictures, seeds)
    documents: list[Document] = [
        [
            TextSegment(model.vocabulary.prompt(model.texts.encode(text))),
            ImageSegment(codes, path, timesteps=steps),
        ]
        for codes, path, text in zip(code_indices, states, texts, strict=True)
    ]
    positions = code_indices[0, 0].numel()
    losses = torch.stack(
        [row[-len(steps) * positions :] for row in _per_document(model, documents)]
    ).reshape(len(pictures), len(steps), positions)
    protocol = {
        "evaluator": "cross-entropy of the model itself, among the codes",
        "data_sha256": digest_of_pictures(pictures, texts),
        "count": len(pictures),
        "seed": seed,
        "codes_sha256": codes_sha256(model.images),
        **steps_of(model.images),
        "noise_pool": model.images.noise_pool,
        "positions": positions,
    }
    return [
        Figure.mean(
            f"loss at timestep {t}", means.tolist(), "nats/code", protocol | {"t": t}, AT_LEAST_0
        )
        for t, means in zip(steps, losses.mean(2).unbind(1), strict=True)
    ]


@torch.no_grad()
def _tokenise(model: Model, pictures: Pictures, seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Code indices `[B, T, *grid]` and states `[B, T + 1, *grid, C]`, on the CPU."""
    device = model.transformer.table.weight.device
    squares = np.stack([to_square(picture, model.images.image_size) for picture in pictures])
    # one at a time, as `Model.caption` does: rounding depends on the batch
    latents = torch.cat(
        [model.images.autoencoder.encode(x[None].to(device)) for x in to_tensor(squares)]
    )
    code_indices, states = model.images.encode_latents(latents, seeds)
    return code_indices.transpose(0, 1).cpu(), states.transpose(0, 1).cpu()


def _per_document(model: Model, documents: Sequence[Document]) -> Iterator[Tensor]:
    """The cross-entropy at every target of each document: float64 `[targets]`."""
    for chunk in _chunks(documents):
        scored = _losses(model, chunk)
        counts = [_targets(document) for document in chunk]
        yield from scored.per_token.double().cpu().split(counts)


@torch.no_grad()
def _losses(model: Model, documents: Sequence[Document]) -> Losses:
    tokenizer = model.images
    packed = pack(
        [[document] for document in documents],
        max(length(document) for document in documents),
        model.vocabulary,
        tokenizer.latent_channels,
        len(tokenizer.grid),
    )
    device = model.transformer.table.weight.device
    return loss(model.transformer, packed.to(device), codes_apart=True)  # as pictures are drawn


def _chunks(documents: Sequence[Document]) -> Iterator[Sequence[Document]]:
    size = max(1, _TOKENS // max(length(document) for document in documents))
    for start in range(0, len(documents), size):
        yield documents[start : start + size]


def _targets(document: Document) -> int:
    """How many positions of a document have a target."""
    return sum(
        len(part.token_ids) - 1
        if isinstance(part, TextSegment)
        else len(part.timesteps) * part.code_indices[0].numel()
        for part in document
    )


def _need(count: int, what: str) -> None:
    if not count:
        raise DataError(f"{what}: there is nothing to measure: the data set is empty")
