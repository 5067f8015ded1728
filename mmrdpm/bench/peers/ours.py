"""Ours, through the same protocol: RDPM tokens, all timesteps of a picture by one transformer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmrdpm.api import build
from mmrdpm.bench.peers.protocol import Batch, Caption, How, OurShape, Peer, Scene
from mmrdpm.data.documents import by_the_way
from mmrdpm.document import NO_TARGET, Document, ImageSegment, TextSegment, length, pack
from mmrdpm.objective import loss
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer
from mmrdpm.sampling.image import Guided, Request, sample_images
from mmrdpm.transformer import TransformerConfig
from mmrdpm.vocabulary import Vocabulary

_A_ROW = 8  # documents, about


class Ours(Peer):
    """The transformer of `mmrdpm train`, some documents a row as there; the text has no loss.

    As in the shipped recipe, codes are scored by their vectors too (`model.code_geometry`) and
    timesteps drawn by the path's way (`data.timesteps`).
    """

    stack = ("transformer.attentions.", "transformer.feed_forwards.")

    def __init__(self, shape: OurShape, scene: Scene) -> None:
        super().__init__()
        config = TransformerConfig(
            shape.layers,
            shape.width,
            shape.heads,
            shape.heads,
            shape.ffn,
            sees_start_noise=shape.sees_start_noise,
            noise_pool=shape.noise_pool,
            code_geometry=True,
            preconditioning=shape.preconditioning,
            places=shape.places,
        )
        self.soft_labels, self.steps_per_image = shape.soft_labels, shape.steps_per_image
        self.expected_steps, self.codes_apart = shape.expected_steps, shape.codes_apart
        self.draws_codes = shape.expected_steps < scene.images.num_timesteps
        self.scene = scene
        self.shares = torch.from_numpy(by_the_way(scene.images.trajectory.schedule))
        self.vocabulary = Vocabulary(scene.texts.size, scene.images.codebook_size)
        self.transformer = build(config, self.vocabulary, scene.images, shape.soft_labels)
        self.steps = (scene.images.num_timesteps,)
        self.tokens = scene.images.num_timesteps * scene.latents[0, ..., 0].numel()

    @property
    def images(self) -> ImageTokenizer:
        """Not a part of what is trained."""
        return self.scene.images

    def loss(self, batch: Batch) -> Tensor:
        latents = batch.latents.to(self.device)
        with self.exact():
            code_indices, states = self.images.encode_latents(latents, batch.noise_seeds)
            residuals = self.images.residuals(latents, batch.noise_seeds, states)
        num_timesteps = self.images.num_timesteps
        documents: list[Document] = []
        for row, caption in enumerate(batch.captions):
            count = min(self.steps_per_image, num_timesteps)
            timesteps = tuple((1 + torch.multinomial(self.shares, count)).tolist())
            codes, path, near = (each[:, row].cpu() for each in (code_indices, states, residuals))
            segment = ImageSegment(codes, path, timesteps, residuals=near)
            prompt = self.vocabulary.prompt(caption)
            documents.append([TextSegment(prompt), segment])
        rows = balanced(documents)
        longest, rank = max(map(_tokens, rows)), len(self.images.grid)
        packed = pack(rows, longest, self.vocabulary, self.images.latent_channels, rank)
        text = packed.timesteps < 0
        packed = replace(packed, targets=packed.targets.masked_fill(text, NO_TARGET))
        return loss(
            *(self.transformer, packed.to(self.device)),
            soft_labels=self.soft_labels,
            codes_apart=self.codes_apart,
        ).total

    def draw(self, captions: Sequence[Caption], how: How) -> Tensor:
        guided = Guided(guidance_scale=how.guidance_scale, expected_steps=self.expected_steps)
        if how.temperature is not None:
            guided = replace(guided, temperature=how.temperature)
        seeds = torch.randint(2**62, (len(captions),)).tolist()
        requests = [Request(*pair) for pair in zip(captions, seeds, strict=True)]
        return sample_images(self.transformer, self.images, self.vocabulary, requests, guided)[0]

    def reconstruct(self, latents: Tensor) -> Tensor:
        _, states = self.images.encode_latents(latents, range(len(latents)))
        return states[0]


def balanced(documents: Sequence[Document]) -> list[list[Document]]:
    """Rows of about as many tokens each: the longest document first, into the emptiest row."""
    rows: list[list[Document]] = [[] for _ in range(-(-len(documents) // _A_ROW))]
    for document in sorted(documents, key=length, reverse=True):
        min(rows, key=_tokens).append(document)
    return rows


def _tokens(row: Sequence[Document]) -> int:
    return sum(map(length, row))
