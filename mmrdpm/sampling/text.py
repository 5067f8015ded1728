"""Continues a context with text, token by token."""

from __future__ import annotations

import torch

from mmrdpm.document import TEXT_TIMESTEP, Packed
from mmrdpm.sampling.cache import Cache
from mmrdpm.sampling.choose import Choice, choose
from mmrdpm.transformer import Transformer
from mmrdpm.vocabulary import Vocabulary


@torch.no_grad()
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
    cache, ids = Cache(), list[int]()
    hidden = cache.read(model, context)[:, -1:]
    position = context.positions[:, -1:].clone()
    while len(ids) < max_tokens:
        logits = model.logits(hidden)[0, 0].clone()
        logits[vocabulary.eos + 1 :] = -torch.inf  # neither other specials nor image codes
        logits[vocabulary.bos] = -torch.inf
        token = choose(logits, choice, generator)
        if token == vocabulary.eos:
            break
        ids.append(int(token))
        position[..., 0] += 1
        timesteps = torch.full((1, 1), TEXT_TIMESTEP, device=token.device)
        latents = context.latents.new_zeros(1, 1, context.latents.shape[-1])
        hidden = cache.extend(model, model.embed(token.view(1, 1), latents, timesteps), position)
    return ids


@torch.no_grad()
def text_log_likelihood(model: Transformer, packed: Packed, count: int) -> float:
    """`log p` in nats of the last `count` tokens of one unpadded row, given all before them."""
    hidden = model(packed)[0, -count - 1 : -1]
    log_p = model.logits(hidden).double().log_softmax(-1)
    return log_p.gather(-1, packed.token_ids[0, -count:, None]).sum().item()
