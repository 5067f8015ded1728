"""The stack that most peers share: transformers' Qwen3 over a caption and image positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen3Config, Qwen3Model

from mmrdpm.bench.peers.codes import ResidualCodes
from mmrdpm.bench.peers.protocol import Caption, How, Peer, Shape, left_padded
from mmrdpm.sampling.choose import Choice, choose


class QwenPeer(Peer):
    """A table of text ids, a special one and `inputs` of the image; places of the image; the stack.

    Captions stand on the left, padded there: rotary positions are relative, so padding changes
    nothing. It begins from embeddings of variance 1 and blocks that add nothing, as ours does: the
    library's 0.02 everywhere learns a fixed set of pictures markedly later.

    Args:
        inputs: how many ids of the image the table has; `code_offset` is the first.
        positions: of the image in the stack, each with a learned embedding of its place.
    """

    stack = ("decoder.layers.",)

    def __init__(self, shape: Shape, text_size: int, inputs: int, positions: int) -> None:
        super().__init__()
        self.first, self.code_offset = text_size, text_size + 1
        config = Qwen3Config(
            vocab_size=self.code_offset + inputs,
            hidden_size=shape.width,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            head_dim=shape.width // shape.heads,
            max_position_embeddings=1024,
            pad_token_id=None,
        )
        self.decoder = Qwen3Model(config)
        self.places = nn.Embedding(positions, shape.width)
        nn.init.normal_(self.decoder.embed_tokens.weight)
        blocks: Any = self.decoder.layers
        for block in blocks:
            nn.init.zeros_(block.self_attn.o_proj.weight)
            nn.init.zeros_(block.mlp.down_proj.weight)

    def table(self, ids: Tensor) -> Tensor:
        """Embeddings of token ids."""
        return self.decoder.get_input_embeddings()(ids)

    def prompt(self, captions: Sequence[Caption]) -> tuple[Tensor, Tensor]:
        """Embedded captions `[B, L, width]` and bool `[B, L]`, False at padding."""
        ids, real = left_padded(captions, self.first, self.device)
        return self.table(ids), real

    def run(self, inputs: Tensor, mask: Tensor, cache: DynamicCache | None = None) -> Tensor:
        """The stack on embedded positions `[B, S, width]`.

        Args:
            mask: bool, `[B, keys]` for causal attention to real keys, or `[B, 1, S, keys]`.
            cache: of what came before; the positions are added to it.
        """
        output = self.decoder(
            inputs_embeds=inputs,
            attention_mask=mask,
            cache=cache,
            use_cache=cache is not None,
        )
        return output.last_hidden_state


class CodePeer(QwenPeer):
    """A peer that draws codes, with a head that scores them.

    Args:
        inputs: see `QwenPeer`.
        positions: of the image in the stack, where they are not one for each code.
    """

    def __init__(
        self,
        shape: Shape,
        text_size: int,
        codes: ResidualCodes,
        inputs: int,
        positions: int | None = None,
    ) -> None:
        total = sum(codes.lengths)
        super().__init__(shape, text_size, inputs, total if positions is None else positions)
        self.codes, self.tokens = codes, total
        self.head = nn.Linear(shape.width, codes.codebook.size, bias=False)

    def reconstruct(self, latents: Tensor) -> Tensor:
        return self.codes.partial(self.codes.encode(latents))


def drawn(logits: Tensor, how: How) -> Tensor:
    """Codes `[B, ...]` from logits `[B, ..., K]`, by torch's global generator."""
    return choose(logits, Choice(how.warmth), [torch.default_generator] * len(logits))


def both_ways(real: Tensor, positions: int, queries: int) -> Tensor:
    """Every query sees real text and the whole image: bool `[B, 1, queries, L + positions]`.

    Args:
        real: bool `[B, L]`, False at the padding of captions.
    """
    seen = torch.cat([real, real.new_ones(len(real), positions)], dim=1)
    return seen[:, None, None].expand(-1, 1, queries, -1)


def prefix_mask(real: Tensor, blocks: Tensor) -> Tensor:
    """Who sees whom: bool `[B, 1, S, S]`, text causally, image positions by their block.

    Args:
        real: bool `[B, L]`, False at the padding of captions, which is seen by itself alone.
        blocks: int64 `[N]`, not falling; an image position sees all of its and of lower blocks.
    """
    length, total = real.shape[1], real.shape[1] + len(blocks)
    text = torch.arange(length, device=real.device) - length  # below every block
    order = torch.cat([text, blocks.to(real.device)])
    seen = order[:, None] >= order[None, :]
    image = torch.ones(len(real), len(blocks), dtype=torch.bool, device=real.device)
    keys = torch.cat([real, image], dim=1)
    itself = torch.eye(total, dtype=torch.bool, device=real.device)
    return ((seen & keys[:, None, :]) | itself)[:, None]
