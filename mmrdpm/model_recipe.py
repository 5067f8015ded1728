"""The recipe of a model: what is trained, on what, and how."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from mmrdpm import checkpoint, recipe
from mmrdpm.attention.backend import Name
from mmrdpm.checkpoint import MOST_STEPS, CheckpointPolicy
from mmrdpm.data.plan import DataPlan
from mmrdpm.engine.guard import GuardConfig
from mmrdpm.engine.parallel import Wanted
from mmrdpm.errors import CheckpointError, RecipeError
from mmrdpm.machine import Precision
from mmrdpm.optim import LearningRateSchedule, OptimizerConfig, before_fall
from mmrdpm.samples import Samples
from mmrdpm.sampling.image import Guided
from mmrdpm.transformer import TransformerConfig


@dataclass(frozen=True)
class Tokenizers:
    """Names of shipped tokenizers, or folders; for texts also hub ids."""

    image: str = "emoji-rdpm-32"
    text: str = "emoji-bpe-4k"


@dataclass(frozen=True)
class ModelTokenizers(Tokenizers):
    """As above; a text tokenizer that is left out is that of `model.init_from`, if any."""

    text: str = ""


@dataclass(frozen=True)
class Training:
    """How the transformer is trained.

    Attributes:
        steps: updates; the learning rate falls to zero at the last.
        lr: peak learning rate, reached after `warmup` updates.
        schedule: how it falls: cosine, or wsd, which falls in the last `decay` share only.
        text_weight: weight of a text target; an image target weighs 1.
        z_loss: weight of the squared log of the softmax's denominator; 0 is off.
        soft_labels: temperature of the codes' labels, see `objective.loss`; 0 is off.
        codes_apart: whether codes are scored among the codes alone, and text among all else.
        ema: decay of the moving average of the weights, which is then what a checkpoint's weights
            file holds; 0 is off.
        guard: against updates that would spoil the run.
        precision: of matrix products, weights stay float32; auto is bf16 where the machine has
            instructions for it, else fp32.
        attention: backend; auto takes the fastest that is installed and can train here.
        threads: CPU threads; another number sums in another order, so it is part of the recipe.
        parallel: how many ranks share the model; auto copies it where it fits, else shards it.
        micro_batch_size: rows of `data.rows` that a rank computes at once, 0 for all of its own;
            lower it where memory is short: gradients add up to the same.
        recompute: whether layers are computed anew in the backward pass, which saves their
            activations and costs a third more time.
        compile: whether torch.compile fuses the layers, on CUDA only.
        timeout: seconds after which a rank that does nothing ends the job.
        wandb: project of Weights & Biases to log to, "" for none.
    """

    steps: int = field(default=6000, metadata={"min": 1, "max": MOST_STEPS})
    lr: float = field(default=3e-3, metadata={"min": 0.0, "max": 1e30})
    warmup: int = field(default=100, metadata={"min": 0})
    schedule: LearningRateSchedule = "cosine"
    decay: float = field(default=0.2, metadata={"min": 0.0, "max": 1.0})
    text_weight: float = field(default=1.0, metadata={"min": 0.0})
    z_loss: float = field(default=0.0, metadata={"min": 0.0})
    soft_labels: float = field(default=0.0, metadata={"min": 0.0})
    codes_apart: bool = True
    ema: float = field(default=0.0, metadata={"min": 0.0, "max": 1.0})
    guard: GuardConfig = field(default_factory=GuardConfig)
    precision: Precision = "auto"
    attention: Name = "auto"
    seed: int = field(default=0, metadata={"min": 0, "max": 2**63 - 1})
    threads: int = field(default=2, metadata={"min": 1, "max": 1024})
    parallel: Wanted = "auto"
    micro_batch_size: int = field(default=0, metadata={"min": 0})
    recompute: bool = False
    compile: bool = True
    timeout: float = field(default=600.0, metadata={"min": 1.0})
    wandb: str = ""


MAY_CHANGE = frozenset(  # when a run goes on
    {"data.max_broken_share", "data.workers"}
    | checkpoint.MAY_CHANGE
    | {f"samples.{key.name}" for key in fields(Samples)}
    | {
        f"train.{name}"
        for name in ("parallel", "micro_batch_size", "recompute", "compile", "timeout", "wandb")
    }
    | {"train.lr"}  # the way on from losses that are no numbers
)


@dataclass(frozen=True)
class ModelRecipe:
    """A recipe of kind `model`."""

    tokenizers: ModelTokenizers = field(default_factory=ModelTokenizers)
    model: TransformerConfig = field(default_factory=TransformerConfig)
    data: DataPlan = field(default_factory=DataPlan)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: Training = field(default_factory=Training)
    checkpoint: CheckpointPolicy = field(default_factory=CheckpointPolicy)
    samples: Samples = field(default_factory=Samples)
    sampling: Guided = field(default_factory=Guided)
    kind: Literal["model"] = "model"

    def __post_init__(self) -> None:
        if not self.tokenizers.text and not self.model.init_from:
            known = replace(self.tokenizers, text=Tokenizers.text)
            object.__setattr__(self, "tokenizers", known)
        if self.train.soft_labels and not self.model.code_geometry:
            raise RecipeError(
                "train.soft_labels compares codes by their vectors, which the model knows by"
                " model.code_geometry alone: set that to true, or soft_labels to 0"
            )


def may_change(run: Path, resolved: ModelRecipe) -> frozenset[str]:
    """The keys that may differ when the run in a folder goes on by a recipe.

    These are `MAY_CHANGE`; of wsd also the length, as long as no update has been made whose
    learning rate hangs on the old one or on the new one.

    Raises:
        CheckpointError: the length differs, and such an update has been made; or the run was begun
            before there was `train.codes_apart`, which now has another default.
        RecipeError: the recipe in the folder cannot be read.
    """
    path, latest = run / checkpoint.RECIPE_FILE, checkpoint.newest(run)
    if not path.exists():
        return MAY_CHANGE
    saved = recipe.read(path)
    begun = recipe.from_dict(ModelRecipe, saved, str(path)).train
    if "codes_apart" not in (saved.get("train") or {}):
        raise CheckpointError(
            f"{path}: train has no codes_apart, so that the run was begun without: add"
            " codes_apart: false to its train, and resume it with train.codes_apart=false"
        )
    plans = (begun, resolved.train)
    lengths = {(plan.steps, plan.decay) for plan in plans}
    if len(lengths) == 1 or any(plan.schedule != "wsd" for plan in plans):
        return MAY_CHANGE
    last = min(before_fall(*length) for length in lengths)
    if latest and checkpoint.step_of(latest) > last:
        raise CheckpointError(
            f"{run}: train.steps and train.decay may change up to update {last} only, as the"
            f" learning rate falls from there on, and {latest.name} is later: resume it with"
            f" train.steps={begun.steps} and train.decay={begun.decay}, or take the checkpoints"
            " after that update away to go on from an earlier one"
        )
    return MAY_CHANGE | {"train.steps", "train.decay"}
