"""Continues a context with text, token by token."""

from __future__ import annotations

import torch

from mmrdpm.document import TEXT_TIMESTEP, Packed
from mmrdpm.sampling.cache import Cache
from mmrdpm.sampling.choose import Choice, choose
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
    """Text ids that follow one unpadded row; ends at `<|eos|>` or after `max_tokens`."""
    choice = choice or Choice(temperature=0)
    generator = torch.Generator().manual_seed(seed)
    cache, ids = Cache(model, context, max_tokens), list[int]()
    hidden, position = cache.hidden[:, -1:], context.positions[:, -1:].clone()
    latents = torch.zeros_like(context.latents[:, -1:])
    timesteps = torch.full_like(context.timesteps[:, -1:], TEXT_TIMESTEP)
    possible = slice(vocabulary.eos + 1)  # neither other specials nor image codes are scored
    while len(ids) < max_tokens:
        logits = model.logits(hidden, possible)[0]
        logits[:, vocabulary.bos] = -torch.inf
        token = choose(logits, choice, [generator])
        if token == vocabulary.eos:
            break
        ids.append(int(token))
        position[..., 0] += 1
        hidden = model.run(token.view(1, 1), latents, timesteps, position, cache.attend)
        cache.length += 1
    return ids


@torch.inference_mode()
def text_log_likelihood(model: Transformer, packed: Packed, count: int) -> float:
    """`log p` in nats of the last `count` tokens of one unpadded row, given all before them."""
    hidden = model(packed)[0, -count - 1 : -1]
    log_p = model.logits(hidden).double().log_softmax(-1)
    return log_p.gather(-1, packed.token_ids[0, -count:, None]).sum().item()
