"""The loss of the autoencoder: pixels, perception, and a discriminator that learns beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmrdpm import distributed
from mmrdpm.errors import RecipeError
from mmrdpm.rdpm.perceptual import PerceptualLoss

_GREATEST = 1e4  # that an adaptive weight may be (Esser et al. 2021, their code)


@dataclass(frozen=True)
class LossConfig:
    """What a reconstruction is judged by.

    Attributes:
        l2, l1: weights of the mean squared error, for PSNR, and the mean absolute one, for sharp
            edges.
        perceptual: weight of the perceptual distance, see `PerceptualLoss`; 0 is off.
        backbone: its network, folder or hub id.
        adversarial: weight of the adversarial loss, beside the adaptive one; 0 is off.
        adversarial_start: updates before it begins.
        adversarial_lr: of the discriminator.

    Raises:
        RecipeError: one of perceptual and backbone is given without the other.
    """

    l2: float = field(default=1.0, metadata={"min": 0.0})
    l1: float = field(default=0.5, metadata={"min": 0.0})
    perceptual: float = field(default=0.0, metadata={"min": 0.0})
    backbone: str = ""
    adversarial: float = field(default=0.0, metadata={"min": 0.0})
    adversarial_start: int = field(default=0, metadata={"min": 0})
    adversarial_lr: float = field(default=1e-4, metadata={"min": 0.0, "max": 1e30})

    def __post_init__(self) -> None:
        if bool(self.perceptual) != bool(self.backbone):
            raise RecipeError(
                "train.loss: perceptual is the weight of a distance in the network `backbone`:"
                " give both or neither"
            )
        if not (self.l2 or self.l1 or self.perceptual):
            raise RecipeError("train.loss: l2, l1 and perceptual are all 0: raise one")


class Discriminator(nn.Sequential):
    """Real or made, for each of many overlapping patches: images `[B, 3, H, W]` to `[B, 1, h, w]`.

    The PatchGAN of Isola et al. 2017 (arXiv 1611.07004) with three strides; group norms in the
    place of batch norms, which would mix what is real and what is made over ranks.
    """

    def __init__(self) -> None:
        width = 64  # channels of the first layer
        layers: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for before, after, stride in ((1, 2, 2), (2, 4, 2), (4, 8, 1)):
            layers += [
                nn.Conv2d(width * before, width * after, 4, stride, 1, bias=False),
                nn.GroupNorm(32, width * after),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*layers, nn.Conv2d(width * 8, 1, 4, 1, 1))


class Reconstruction:
    """The loss and what learns with it."""

    smallest = 32  # pixels that the discriminator's patches need

    def __init__(self, config: LossConfig, image_size: int, device: torch.device) -> None:
        self.config = config
        self.perceptual: PerceptualLoss | None = None
        self.discriminator: Discriminator | None = None
        if config.perceptual:
            self.perceptual = PerceptualLoss(config.backbone, image_size).to(device)
        if config.adversarial:
            if image_size < self.smallest:
                raise RecipeError(
                    f"train.loss.adversarial needs pictures of at least {self.smallest} pixels, not"
                    f" {image_size}: set it to 0"
                )
            self.discriminator = Discriminator().to(device)
            self.optimizer = torch.optim.AdamW(
                self.discriminator.parameters(), config.adversarial_lr, betas=(0.5, 0.9)
            )

    def loss(
        self, output: Tensor, images: Tensor, last_layer: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of reconstructions `[B, 3, H, W]`, and its parts by name for the log."""
        error, parts = output.float() - images, {}
        total = self.config.l2 * error.square().mean() + self.config.l1 * error.abs().mean()
        if self.perceptual:
            parts["pixels"] = total.detach()
            distance = self.perceptual(output, images)
            total = total + self.config.perceptual * distance
            parts["perceptual"] = distance.detach()
        if self.discriminator and step >= self.config.adversarial_start:
            self.discriminator.requires_grad_(False)
            fooled = -self.discriminator(output).float().mean()
            weight = adaptive_weight(total, fooled, last_layer)
            total = total + self.config.adversarial * weight * fooled
            parts |= {"adversarial": fooled.detach(), "adaptive_weight": weight}
        return total, parts

    def learn(self, output: Tensor, images: Tensor, step: int) -> dict[str, Tensor]:
        """One update of the discriminator by the hinge loss; gives its loss for the log."""
        if self.discriminator is None or step < self.config.adversarial_start:
            return {}
        self.discriminator.requires_grad_(True)
        made, real = self.discriminator(output.detach()), self.discriminator(images)
        relu = nn.functional.relu
        loss = (relu(1 + made.float()).mean() + relu(1 - real.float()).mean()) / 2
        self.optimizer.zero_grad()
        loss.backward()
        distributed.average_gradients(self.discriminator.parameters())
        self.optimizer.step()
        return {"discriminator": loss.detach()}

    def state(self) -> dict[str, Any]:
        """What `restore` takes: nothing where nothing learns."""
        if self.discriminator is None:
            return {}
        return {
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back to a saved state."""
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self.optimizer.load_state_dict(state["optimizer"])


def adaptive_weight(reconstruction: Tensor, fooled: Tensor, last_layer: Tensor) -> Tensor:
    """How much the adversarial loss must weigh for both to pull alike on the last layer.

    Esser et al. 2021 (arXiv 2012.09841), equation 7; the gradients are those of all ranks.
    """
    norms = []
    for loss in (reconstruction, fooled):
        (gradient,) = torch.autograd.grad(loss, last_layer, retain_graph=True)
        norms.append(distributed.mean_over_ranks(gradient.contiguous()).norm())
    return (norms[0] / (norms[1] + 1e-4)).clamp(0.0, _GREATEST).detach()
