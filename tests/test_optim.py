import copy

import pytest
import torch
from torch import nn

from mmrdpm import checkpoint, recipe
from mmrdpm.errors import CheckpointError
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.optim import Average, Muon, OptimizerConfig, Optimizers, before_fall, learning_rate
from mmrdpm.train_model import Trainer, train


def test_muon_in_bfloat16_is_torchs_own():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (
        [nn.Parameter(torch.ones(shape)) for shape in ((6, 10), (12, 4))] for _ in range(2)
    )
    mine = Muon(ours, 0.1, torch.bfloat16)
    reference = torch.optim.Muon(theirs, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for lr in (0.1, 0.05):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        mine.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = lr
        mine.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (24, 30)])
def test_muons_iterations_are_those_of_the_definition(shape):
    """Jordan 2024: `X <- a X + (b G + c G^2) X` with `G = X X^T`, five times, here in float64."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = matrix.double() / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    made = Muon([nn.Parameter(matrix)], 0.0, torch.float32).orthogonal(matrix)
    assert torch.allclose(made.double(), x, atol=1e-5)


def test_muons_update_is_nearly_orthogonal_in_float32():
    matrix = torch.randn(8, 20, generator=torch.Generator().manual_seed(1))
    made = Muon([nn.Parameter(matrix)], 0.0, torch.float32).orthogonal(matrix)
    left, before, right = torch.linalg.svd(matrix, full_matrices=False)
    assert before.max() / before.min() > 2
    after = torch.diagonal(left.T @ made @ right.T)
    assert after.min() > 0.6 and after.max() < 1.3
    torch.testing.assert_close(left @ torch.diag(after) @ right, made, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_restored_optimiser_goes_on_as_the_first(name):
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.attentions, self.table = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)

    def update(model, optimizers):
        (model.attentions(torch.ones(2, 4)) * model.table(torch.ones(2, 4))).sum().backward()
        optimizers.clip()
        optimizers.step(0.1)
        optimizers.clear()

    models = [Stack(), Stack()]
    first, second = (Optimizers(m, OptimizerConfig(name=name)) for m in models)
    update(models[0], first)
    models[1].load_state_dict(models[0].state_dict())
    second.restore(copy.deepcopy(first.state()))
    update(models[0], first)
    update(models[1], second)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_learning_rate_rises_then_falls_to_zero():
    course = [learning_rate(2.0, step, 100, 10) for step in range(101)]
    assert course[0] == pytest.approx(0.2) and course[10] == pytest.approx(2.0)
    assert course[55] == pytest.approx(1.0) and course[100] == pytest.approx(0, abs=1e-12)
    assert course[:11] == sorted(course[:11]) and course[10:] == sorted(course[10:], reverse=True)


def test_wsd_stays_at_the_peak_and_falls_at_the_end_only():
    course = [learning_rate(2.0, step, 100, 10, "wsd", 0.2) for step in range(101)]
    assert course[:11] == sorted(course[:11]) and course[10:81] == [2.0] * 71
    assert course[85] == pytest.approx(2.0 * (1 - 0.5)) and course[100] == pytest.approx(0)


@pytest.mark.parametrize(("steps", "decay"), [(100, 0.2), (7, 0.5), (3, 0.0), (5, 1.0)])
def test_before_its_fall_wsd_has_the_rates_of_any_longer_plan(steps, decay):
    """All updates that are counted have the peak, and the next one has not."""
    stable = before_fall(steps, decay)
    course = [learning_rate(2.0, step, steps, 0, "wsd", decay) for step in range(steps + 1)]
    assert course[:stable] == [2.0] * stable and course[stable] < 2.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="bits are promised for CPUs alone")
def test_a_wsd_run_is_prolonged_from_before_its_fall_and_not_from_after(
    tiny_recipe, tmp_path, interrupted
):
    """The plans' rates fall after update 7 (of 12, halved) and after update 12 (of 16)."""

    def load(steps, decay):
        overrides = ("train.schedule=wsd", f"train.steps={steps}", f"train.decay={decay}")
        return recipe.load(ModelRecipe, tiny_recipe, [*overrides, "checkpoint.every=1"])

    whole, run, late = (tmp_path / name for name in ("whole", "run", "late"))
    assert train(load(16, 0.3), whole)
    for folder, stopped in ((run, 7), (late, 8)):
        with interrupted(Trainer, stopped):
            assert not train(load(12, 0.5), folder)
    assert train(load(16, 0.3), run, resume=True)
    ours, theirs = (checkpoint.newest(folder) for folder in (run, whole))
    assert ours.name == theirs.name == "step-0000016.safetensors"
    assert ours.read_bytes() == theirs.read_bytes()
    assert recipe.read(run / checkpoint.RECIPE_FILE)["train"]["steps"] == 16
    with pytest.raises(
        CheckpointError, match=r"up to update 7 only.*and step-0000008\.saf.*train\.steps=12 and"
    ):
        train(load(16, 0.3), late, resume=True)
    (late / "step-0000008.safetensors").unlink()
    assert train(load(16, 0.3), late, resume=True)
    assert checkpoint.newest(late).read_bytes() == theirs.read_bytes()


def test_the_average_follows_by_hand():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
        average = Average(model, decay=0.9)
        model.weight.fill_(1.0)
    average.update(step=0)
    assert average.tensors["weight"].item() == pytest.approx(1 - 1 / 10)
    average.update(step=10**6)
    assert average.tensors["weight"].item() == pytest.approx(0.9 * 0.9 + 0.1)


def test_clip_scales_to_the_norm_and_zero_leaves_gradients_alone():
    for clip, expected in ((1.0, 1.0), (0.0, 5.0)):
        model = nn.Linear(2, 1, bias=False)
        model.weight.grad = torch.tensor([[3.0, 4.0]])
        assert Optimizers(model, OptimizerConfig(clip=clip)).clip() == pytest.approx(5.0)
        assert model.weight.grad.norm().item() == pytest.approx(expected, rel=1e-4)


def test_learning_rates_follow_the_width():
    """Twice the tuned width: matrices by Muon at the root of a half, scored tables at a half."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("attentions", "table", "from_latents"):
                setattr(self, name, nn.Linear(4, 6, bias=False))

    def rates(**config):
        model = Model()
        optimizers = Optimizers(model, OptimizerConfig(**config), width=128)
        optimizers.step(0.1)
        groups = [group for part in optimizers.parts for group in part.param_groups]
        names = {id(p): name.split(".")[0] for name, p in model.named_parameters()}
        return {names[id(p)]: group["lr"] for group in groups for p in group["params"]}

    assert set(rates().values()) == {0.1}
    muon = rates(tuned_width=64)
    assert muon == pytest.approx({"attentions": 0.1 / 2**0.5, "table": 0.05, "from_latents": 0.1})
    adamw = rates(tuned_width=64, name="adamw")
    assert adamw == pytest.approx({"attentions": 0.05, "table": 0.05, "from_latents": 0.1})


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_an_update_of_a_matrix_moves_a_model_of_any_width_alike(name):
    """The spectral norm of the first update, at aspect ratio 1, with the rate tuned at 32."""
    norms = []
    for width in (32, 128):
        names = ("attentions", "table")
        model = nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in names})
        weight = model["attentions"].weight
        before = weight.detach().clone()
        # of rank 1, as the gradient of one token: AdamW's update then has the norm of its signs
        weight.grad = torch.outer(torch.ones(width), torch.ones(width))
        if name == "muon":
            weight.grad = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
        config = OptimizerConfig(name=name, tuned_width=32, weight_decay=0.0)
        Optimizers(model, config, width=width).step(0.1)
        norms.append(torch.linalg.matrix_norm(weight.detach() - before, 2).item())
    assert norms[0] == pytest.approx(norms[1], rel=0.1)
