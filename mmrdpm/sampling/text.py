"""Continues a context with text, token by token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmrdpm.document import TEXT_TIMESTEP, Packed
from mmrdpm.sampling.cache import Cache
from mmrdpm.sampling.choose import Choice, choose
from mmrdpm.sampling.writer import Writer, suits
from mmrdpm.transformer import Transformer
from mmrdpm.vocabulary import Vocabulary


@torch.inference_mode()
def sample_text(
    model: Transformer,
    vocabulary: Vocabulary,
    context: Packed,
    max_tokens: int,
    seed: int = 0,
    choice: Choice | None = None,
) -> list[int]:
    """Text ids that follow one unpadded row, `max_tokens` at most.

    They end at `<|eos|>`, and at `<|image|>`: behind what captions a picture most pictures begin.
    """
    choice = choice or Choice(temperature=0)
    generator = torch.Generator().manual_seed(seed)
    cache, ids = Cache(model, context, max_tokens), list[int]()
    ends = (vocabulary.eos, vocabulary.image_start)
    scored = max(ends) + 1  # neither later specials nor image codes are
    follow: Callable[[int], Tensor]
    if suits(model):
        follow = Writer(model, cache, context.positions[:, -1:], max_tokens, scored).follow
    else:
        follow = by_run(model, cache, context, scored)
    logits = model.logits(cache.hidden[0, -1:], slice(scored))
    while len(ids) < max_tokens:
        if ids:
            logits = follow(ids[-1])
        logits[:, [vocabulary.bos, vocabulary.pad]] = -torch.inf
        token = choose(logits, choice, [generator])
        if token in ends:
            break
        ids.append(int(token))
    return ids


def by_run(
    model: Transformer, cache: Cache, context: Packed, scored: int
) -> Callable[[int], Tensor]:
    """What `Writer.follow` does, by the whole model."""
    last = context.positions[:, -1:].clone()
    latents = torch.zeros_like(context.latents[:, -1:])
    timesteps = torch.full_like(context.timesteps[:, -1:], TEXT_TIMESTEP)

    def follow(token: int) -> Tensor:
        last[..., 0] += 1
        hidden = model.run(
            torch.full_like(timesteps, token), latents, timesteps, last, cache.attend
        )
        cache.length += 1
        return model.logits(hidden[0], slice(scored))

    return follow


@torch.inference_mode()
def text_log_likelihood(model: Transformer, packed: Packed, count: int) -> float:
    """`log p` in nats of the last `count` tokens of one unpadded row, given all before them.

    Among all ids that are no code, of which no text has any.
    """
    hidden = model(packed)[0, -count - 1 : -1]
    log_p = model.logits(hidden, slice(model.code_ids.start)).double().log_softmax(-1)
    return log_p.gather(-1, packed.token_ids[0, -count:, None]).sum().item()
