"""Speed of drawing and writing against what the machine's arithmetic and memory allow."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from mmrdpm import api, machine
from mmrdpm.api import Model
from mmrdpm.bench.measure import (
    Work,
    growth,
    growth_lines,
    interleaved,
    machine_facts,
    matrix_product,
    memory_read,
    ratio,
)
from mmrdpm.bench.plot import growth_charts, page
from mmrdpm.document import TextSegment, pack
from mmrdpm.errors import UsageError
from mmrdpm.rdpm.autoencoder import AutoencoderConfig
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from mmrdpm.sampling.choose import Choice
from mmrdpm.sampling.image import Guided, Request, sample_images
from mmrdpm.sampling.text import sample_text
from mmrdpm.transformer import Transformer, TransformerConfig
from mmrdpm.vocabulary import Vocabulary

_BATCHES = (1, 8, 64)
_TOKENS = 48  # of one text
_WIDTHS = (256, 512, 1024)  # of the stacks that write
_PROMPT = "A lantern is"


def bench_sample(model: Model, threads: int, rounds: int) -> dict[str, Any]:
    """Drawing at several batch sizes, writing, and how the cost of drawing grows."""
    machine.prepare(threads)
    device = model.transformer.table.weight.device
    return {
        "machine": machine_facts(torch.float32, device),
        "images": images(model, rounds),
        "text": text(model, rounds),
        "growth": {
            name: growth({size: built.drawing() for size, built in sizes.items()}, rounds)
            for name, sizes in GROWTH.items()
        },
    }


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures to read."""
    facts, images, text = figures["machine"], figures["images"], figures["text"]
    made = ", ".join(f"{key} {value}" for key, value in facts.items())
    made += f"; matrix product {images['matrix_flops_per_second'] / 1e9:,.0f} GFLOP/s"
    shown = [made, "images per call   seconds per image   share of the floor's rate"]
    for batch in images["batches"]:
        seconds, share = batch["seconds_per_image"], batch["share"]
        shown.append(f"{batch['images']:15d}   {seconds:17.4f}   {share:8.1%}")
    shown.append(
        f"text, reading weights at {text['bytes_per_second'] / 1e9:.1f} GB/s; a prompt"
        f" {text['seconds_of_prompt'] * 1e3:.1f} ms"
    )
    shown += [
        f"{one['weight_bytes'] / 1e6:10,.1f} MB of weights   {1 / one['seconds_per_token']:6,.0f}"
        f" tokens per second   {one['times_floor']:.2f} times as long as reading them"
        for one in (text, *text["growth"])
    ]
    return shown + growth_lines(figures["growth"])


def plot(figures: dict[str, Any]) -> str:
    """Growth of time and memory, as SVG."""
    return page(growth_charts(figures["growth"]))


def images(model: Model, rounds: int) -> dict[str, Any]:
    """Seconds per image beside the floor, `2 * weights * tokens / matrix rate`."""
    device = model.transformer.table.weight.device
    product, operations = matrix_product(torch.float32, device)
    caption = tuple(model.texts.encode("red paper lantern"))
    works: dict[str, Work] = {"product": product}
    for batch in _BATCHES:
        works[str(batch)] = _drawing(
            model.transformer, model.images, model.vocabulary, caption, batch, model.sampling
        )
    seconds = interleaved(works, rounds)
    needed = image_operations(model.transformer, model.images, model.sampling)
    floors = [needed * s / operations for s in seconds["product"]]
    batches = []
    for batch in _BATCHES:
        each = [s / batch for s in seconds[str(batch)]]
        batches.append(
            {
                "images": batch,
                "seconds_per_image": statistics.median(each),
                "all_rounds": each,
                "share": ratio(floors, each),
            }
        )
    rate = operations / statistics.median(seconds["product"])
    return {"matrix_flops_per_second": rate, "operations_per_image": needed, "batches": batches}


def image_operations(model: Transformer, tokenizer: ImageTokenizer, how: Guided) -> int:
    """Floating point operations in the matrix products of one image's steps.

    Two per weight and position (Kaplan et al. 2020, arXiv 2001.08361, table 1), once more with
    guidance; of the unembedding the codes' rows only; prompts and attention scores not at all.
    """
    weights = stack_weights(model) + tokenizer.codebook_size * model.config.width
    positions = tokenizer.num_timesteps * tokenizer.grid[0] * tokenizer.grid[1]
    return 2 * weights * positions * (1 if how.guidance_scale == 1 else 2)


def stack_weights(model: Transformer) -> int:
    """The weights that every token is multiplied with."""
    parts = (model.attentions, model.feed_forwards)
    return sum(p.numel() for part in parts for p in part.parameters())


def text(model: Model, rounds: int) -> dict[str, Any]:
    """`writing` with the model, behind a prompt, and with random stacks that grow."""
    prompt = (model.vocabulary.bos, *model.texts.encode(_PROMPT))
    sizes = [Size(width=width, vocabulary=4096).built() for width in _WIDTHS]
    return {
        **writing(model.transformer, model.images, model.vocabulary, prompt, rounds),
        "growth": [writing(*built, (built[2].bos, 1, 2, 3), rounds) for built in sizes],
    }


def writing(
    model: Transformer,
    images: ImageTokenizer,
    vocabulary: Vocabulary,
    prompt: tuple[int, ...],
    rounds: int,
) -> dict[str, Any]:
    """Seconds per token, reading the prompt left out, beside those that reading weights takes."""
    device = model.table.weight.device
    read, size = memory_read(device)
    row = pack([[[TextSegment(prompt)]]], len(prompt), vocabulary, images.latent_channels)
    context = row.to(device)
    warm, counts = Choice(temperature=1.0), []

    def write(most: int) -> None:
        texts = [sample_text(model, vocabulary, context, most, seed, warm) for seed in range(4)]
        counts.append(sum(min(len(ids), most - 1) for ids in texts))  # tokens that were read

    works: dict[str, Work] = {
        "read": read,
        "begin": lambda: write(1),
        "write": lambda: write(_TOKENS),
    }
    seconds = interleaved(works, rounds)
    if not max(counts):
        raise UsageError(f"the model ends every text right after {_PROMPT!r}: train it longer")
    pairs = zip(seconds["begin"], seconds["write"], strict=True)
    per_token = [(written - begun) / max(counts) for begun, written in pairs]
    scored = (vocabulary.image_start + 1) * model.config.width
    weights = (stack_weights(model) + scored) * model.table.weight.element_size()
    floors = [weights * s / size for s in seconds["read"]]
    return {
        "bytes_per_second": size / statistics.median(seconds["read"]),
        "weight_bytes": weights,
        "seconds_of_prompt": statistics.median(seconds["begin"]) / 4,
        "seconds_per_token": statistics.median(per_token),
        "all_rounds": per_token,
        "times_floor": ratio(per_token, floors),
    }


@dataclass(frozen=True)
class Size:
    """A randomly initialised model and a batch, one of whose sizes grows."""

    timesteps: int = 6
    images: int = 4
    side: int = 8  # positions are its square
    width: int = 128
    vocabulary: int = 256  # text ids

    def drawing(self) -> Work:
        """Drawing with it."""
        model, tokenizer, vocabulary = self.built()
        return _drawing(model, tokenizer, vocabulary, (1, 2, 3), self.images, Guided())

    def built(self) -> tuple[Transformer, ImageTokenizer, Vocabulary]:
        """The model and what goes with it."""
        shape = AutoencoderConfig(4 * self.side, 16, widths=(16,), blocks=1)
        config = ImageTokenizerConfig(shape, self.timesteps, codebook_size=256)
        tokenizer, vocabulary = ImageTokenizer(config).eval(), Vocabulary(self.vocabulary, 256)
        stack = TransformerConfig(4, self.width, self.width // 32, self.width // 32, 3 * self.width)
        model = api.build(stack, vocabulary, tokenizer).to(machine.device())
        return model, tokenizer.to(machine.device()), vocabulary


GROWTH: dict[str, dict[int, Size]] = {
    "timesteps T": {t: Size(timesteps=t) for t in (4, 8, 16, 32)},
    "images in a batch": {n: Size(images=n) for n in (2, 4, 8, 16)},
    "positions of an image": {side**2: Size(side=side) for side in (4, 8, 16, 24)},
    "weights of the stack": {4 * 13 * width**2: Size(width=width) for width in (64, 128, 256, 512)},
}
"""Sizes by what grows; of a stack of width D, `4 layers * (4 + 9) D^2` weights."""


def _drawing(
    model: Transformer,
    tokenizer: ImageTokenizer,
    vocabulary: Vocabulary,
    caption: tuple[int, ...],
    count: int,
    how: Guided,
) -> Work:
    requests = [Request(caption, seed) for seed in range(count)]
    return lambda: sample_images(model, tokenizer, vocabulary, requests, how)
