"""Flow matching in latents (Lipman et al. 2023, arXiv 2210.02747), whatever the network.

Times are drawn as in Esser et al. 2024 (arXiv 2403.03206, eq. 19 with m = 0 and s = 1).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.nn.functional import mse_loss

from mmrdpm.bench.peers.protocol import Batch, Caption, How, Peer, guided, with_and_without

TRAINING_TIMES = 1000  # what the library calls time 1


class FlowMatching(Peer):
    """Predicts the velocity `eps - z_0` at `(1 - sigma) z_0 + sigma eps`."""

    draws_codes = False
    grid: tuple[int, int, int]

    @abstractmethod
    def condition(self, captions: Sequence[Caption]) -> Any:
        """What `velocity` has to know of captions, once for all steps."""

    @abstractmethod
    def velocity(self, states: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        """At states `[B, h, w, C]` and noise levels `[B]` in [0, 1]; float32 like the states."""

    def loss(self, batch: Batch) -> Tensor:
        latents = batch.latents.to(self.device)
        noise = torch.randn(latents.shape).to(self.device)
        sigma = torch.randn(len(latents)).sigmoid().to(self.device)
        states = torch.lerp(latents, noise, sigma[:, None, None, None])
        velocity = self.velocity(states, sigma, self.condition(batch.captions))
        return mse_loss(velocity, noise - latents)

    def draw(self, captions: Sequence[Caption], how: How) -> Tensor:
        scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAINING_TIMES)
        sigmas = np.linspace(1, 1 / how.steps, how.steps)  # the library's own end one step short
        scheduler.set_timesteps(sigmas=sigmas, device=self.device)
        states = torch.randn(len(captions), *self.grid).to(self.device)
        both = self.condition(with_and_without(captions))
        for timestep in scheduler.timesteps:
            sigma = (timestep / TRAINING_TIMES).expand(2 * len(captions))
            velocity = self.velocity(states.repeat(2, 1, 1, 1), sigma, both)
            velocity = guided(velocity, how.guidance_scale)
            states = scheduler.step(velocity, timestep, states, return_dict=False)[0]
        return states
