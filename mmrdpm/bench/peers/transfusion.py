"""Transfusion (Zhou et al. 2024, arXiv 2408.11039), by the library `transfusion-pytorch`.

One stack reads the caption causally and the latents both ways, and predicts the flow at them. The
sampler here is our own loop over the library's stack: its own one leaves out the embedding of
places that its training adds, and hides the tokens around a picture where guidance drops the text.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from mmrdpm.bench.peers.protocol import Batch, Caption, How, Peer, Shape, guided, with_and_without

with warnings.catch_warnings():  # its type checker deprecates annotations that the library uses
    warnings.simplefilter("ignore")
    from transfusion_pytorch import Transfusion as Library


class Transfusion(Peer):
    """Predicts the velocity `z_0 - eps` at `t z_0 + (1 - t) eps`; the text has no loss."""

    stack = ("library.transformer.layers.",)
    draws_codes = False

    def __init__(self, shape: Shape, text_size: int, grid: tuple[int, int, int]) -> None:
        super().__init__()
        self.grid, self.tokens, self.steps = grid, grid[0] * grid[1], shape.steps
        stack = {
            "dim": shape.width,
            "depth": shape.layers,
            "heads": shape.heads,
            "dim_head": shape.width // shape.heads,
            # the library makes the hidden width int(width * factor * 2 / 3)
            "ff_expansion_factor": (shape.ffn + 0.5) * 3 / 2 / shape.width,
        }
        self.library = Library(
            num_text_tokens=text_size,
            transformer=stack,
            dim_latent=grid[2],
            modality_default_shape=grid[:2],
            add_pos_emb=True,
            text_loss_weight=0.0,
            prob_uncond=0.0,  # the batch has dropped captions already
        )
        self.library.to_text_logits.requires_grad_(False)  # no loss reaches it: not a parameter

    def loss(self, batch: Batch) -> Tensor:
        latents = batch.latents.to(self.device)
        documents = [
            [torch.tensor(caption, dtype=torch.int64), latent] if caption else [latent]
            for caption, latent in zip(batch.captions, latents, strict=True)
        ]
        return self.library(documents)

    def draw(self, captions: Sequence[Caption], how: How) -> Tensor:
        cache, lengths = self._read(with_and_without(captions))
        side, _, channels = self.grid
        attend = torch.arange(cache.shape[-2], device=self.device) < lengths[:, None]
        attend = torch.cat([attend, attend.new_ones(len(attend), self.tokens)], dim=1)
        attend = attend[:, None].expand(-1, self.tokens, -1)
        rotation = self.library.rotary_emb(lengths)[:, None, None].expand(-1, 1, self.tokens, -1)
        info = self.library.get_modality_info(0)
        places = info.pos_emb_mlp(torch.tensor([side, side], device=self.device), flatten=True)
        states = torch.randn(len(captions), self.tokens, channels).to(self.device)
        for step in range(how.steps):
            time = torch.full((len(attend), self.tokens), step / how.steps, device=self.device)
            hidden = self.library.transformer(
                info.latent_to_model(states.repeat(2, 1, 1)) + places,
                times=time,
                cache=cache,
                decode_length=self.tokens,
                rotary_emb=rotation,
                attn_mask=attend,
                is_any_modality=True,
            )
            velocity = guided(info.model_to_latent(hidden), how.guidance_scale)
            states = states + velocity / how.steps
        return states.unflatten(1, (side, side))

    def _read(self, captions: Sequence[Caption]) -> tuple[Tensor, Tensor]:
        """Keys and values of all that comes before the pictures, and its length in each row.

        A picture is announced as in training: its shape as characters, then its start.
        """
        library = self.library
        info = library.get_modality_info(0)
        shape = library.char_tokenizer(",".join(map(str, self.grid[:2])), device=self.device)
        around = [library.meta_id, *shape.tolist(), info.som_id]
        prompts = [torch.tensor([library.sos_id, *c, *around]) for c in captions]
        _, (cache, _) = library(
            [[prompt] for prompt in prompts],
            return_loss=False,
            return_embed=True,
            return_kv_cache=True,
            decoding_text_or_modality="text",
        )
        return cache, torch.tensor([len(p) for p in prompts], device=self.device)
