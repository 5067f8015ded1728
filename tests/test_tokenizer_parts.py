"""The parts of an image tokeniser's training: use of codes, losses, latent norm, crops."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetModel

from mmrdpm import distributed
from mmrdpm.cli import main, training
from mmrdpm.data.images import Cropper, ImagePlan
from mmrdpm.data.sources import SourceConfig
from mmrdpm.errors import CheckpointError, RecipeError
from mmrdpm.rdpm.autoencoder import AutoencoderConfig, LatentNorm
from mmrdpm.rdpm.codebook import Codebook, CodebookFit
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer, ImageTokenizerConfig, TokenRecord
from mmrdpm.rdpm.perceptual import PerceptualLoss
from mmrdpm.rdpm.reconstruction import LossConfig, Reconstruction, adaptive_weight
from mmrdpm.rdpm.usage import CollapseConfig, Usage, perplexity
from mmrdpm.tokenizer_plan import ImageTokenizerTraining
from mmrdpm.train_tokenizer import (
    ImageTokenizerRecipe,
    TextTokenizerRecipe,
    train_image,
    train_text,
)


def test_usage_worked_by_hand():
    """Timestep 1 uses 2 of 4 codes alike; timestep 2 one of 4, and saw more than that."""
    usage = Usage((4, 4), torch.device("cpu"))
    config, zero = CollapseConfig(min_usage=0.3, patience=2), torch.tensor(0)
    for _ in range(2):  # two updates
        usage.add(2, torch.tensor([5.0, 0, 0, 0]), torch.tensor(0.25), torch.tensor(3))
        usage.add(1, torch.tensor([4.0, 4.0, 0, 0]), torch.tensor(0.5), zero)
    assert usage.shares() == pytest.approx([0.5, 0.25])
    figures = usage.check(config, "run")
    assert figures["codebook_usage/timestep_02"] == pytest.approx(0.25)
    assert figures["dead_codes/timestep_01"] == 2 and figures["dead_codes/timestep_02"] == 3
    assert figures["reseeded_codes/timestep_02"] == 6
    assert figures["latent_error/timestep_01"] == pytest.approx(0.5)
    assert usage.check(config, "run") == {}  # nothing since
    usage.add(2, torch.ones(4), torch.tensor(0.1), zero)
    usage.add(1, torch.ones(4), torch.tensor(0.1), zero)
    assert usage.check(config, "run")["codebook_usage/timestep_02"] == pytest.approx(1)
    assert usage.low == 0  # it recovered


def test_half_the_codes_moved_far_away_come_back_into_use():
    """With their averages, as if latents had once lain there: no residual is near them."""
    generator, book = torch.Generator().manual_seed(0), Codebook(1, 32, 4)
    fit = CodebookFit(book)

    def usage():
        chosen = book.nearest(torch.randn(64, 16, 4, generator=generator), 1)
        return perplexity(chosen, 32) / 32

    def observe(times):
        for _ in range(times):
            fit.observe(torch.randn(64, 16, 4, generator=generator), 1, generator)

    observe(20)
    assert usage() > 0.7
    book.codes[0, :16] += 1000
    fit.sums[0] = book.codes[0] * fit.counts[0, :, None]
    assert usage() <= 0.5
    observe(80)  # until the counts of old have decayed below a tenth of the mean
    assert usage() > 0.7 and book.codes.abs().max() < 100


def test_fewer_residuals_than_codes_are_no_collapse():
    usage = Usage((64,), torch.device("cpu"))
    counts = torch.zeros(64)
    counts[:3] = 1
    usage.add(1, counts, torch.tensor(0.0), torch.tensor(0))
    assert usage.shares() == pytest.approx([1.0])


def test_the_perceptual_distance_is_that_of_unit_features(backbone):
    loss = PerceptualLoss(str(backbone), 32)
    network = ResNetModel.from_pretrained(backbone).eval()
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 2, 3, 32, 32, generator=generator) * 2 - 1
    mean, std = ([[m]] for m in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        layers = []
        for images in (a, b):
            pixels = (images + 1) / 2
            pixels = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
            layers.append(network(pixels, output_hidden_states=True).hidden_states)
        distances = []
        for x, y in zip(*layers, strict=True):
            x, y = (f / f.norm(dim=1, keepdim=True).clamp(min=1e-6) for f in (x, y))
            distances.append(((x - y) ** 2).sum(1).mean())
    assert loss(a, b).item() == pytest.approx(torch.stack(distances).mean().item(), rel=1e-4)
    assert loss(a, a).item() == 0
    a.requires_grad_()
    loss(a, b).backward()
    assert a.grad.abs().sum() > 0


def test_the_adaptive_weight_makes_both_losses_pull_alike():
    layer = torch.tensor([1.0, 2.0], requires_grad=True)
    weight = adaptive_weight(6 * layer.sum(), -2 * layer.sum(), layer)
    assert weight.item() == pytest.approx(3, rel=1e-3)


def test_the_discriminator_learns_what_is_real():
    torch.manual_seed(0)
    loss = Reconstruction(LossConfig(adversarial=0.5, adversarial_lr=1e-3), 32, torch.device("cpu"))
    real, made = torch.full((4, 3, 32, 32), 0.5), torch.rand(4, 3, 32, 32) * 2 - 1
    assert loss.learn(made, real, step=0)["discriminator"].item() == pytest.approx(1, abs=0.5)
    for step in range(1, 12):
        found = loss.learn(made, real, step)
    assert found["discriminator"] < 0.2
    with torch.no_grad():
        assert loss.discriminator(real).mean() > loss.discriminator(made).mean()


def test_normalised_latents_find_back():
    norm = LatentNorm(2)
    norm.set(torch.tensor([3.0, -1.0]), torch.tensor([4.0, 0.25]))
    norm.eval()
    latents = torch.tensor([5.0, -1.5]).view(1, 2, 1, 1)
    torch.testing.assert_close(
        norm(latents).flatten(), torch.tensor([1.0, -1.0]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(norm.undo(norm(latents)), latents)


def test_crops():
    """A picture whose colours are its columns and rows says where a crop came from."""
    x, y = np.meshgrid(np.arange(60), np.arange(40))
    picture = Image.fromarray(np.stack([x * 4, y * 4, x * 0], -1).astype(np.uint8))
    sources = {"a": SourceConfig("folder", path="x")}
    centre = Cropper(ImagePlan(sources, crop="centre"), 40).square(picture, None)
    assert centre[0, 0, 0] == 40 and centre[-1, -1, 0] == 49 * 4 and centre[-1, -1, 1] == 39 * 4
    random = np.random.default_rng(0)
    cropper = Cropper(ImagePlan(sources, crop="random", min_scale=0.5, flip=True), 16)
    squares = [cropper.square(picture, random).astype(int) for _ in range(200)]
    flipped = [square[0, 0, 0] > square[0, -1, 0] for square in squares]
    assert 60 < sum(flipped) < 140
    for square in squares:
        wide, high = (abs(np.diff(square[0, :, 0])).sum(), abs(np.diff(square[:, 0, 1])).sum())
        assert abs(wide - high) < 16  # square in the picture: nothing is stretched
        assert 15 / 16 * 80 - 16 < wide < 160
    assert min(square[..., 0].min() for square in squares) < 8
    assert max(square[..., 0].max() for square in squares) > 228


def test_latents_off_centre_keep_their_variance_over_ranks(monkeypatch):
    """E[x^2] - E[x]^2 of numbers near 30 would lose a variance of 1e-4 in float32."""
    norm = LatentNorm(1)
    norm.running_mean.fill_(29.9)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed.nn.functional, "all_reduce", lambda x: 2 * x)
    latents = 30 + 0.01 * torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    made = norm(latents)
    assert made.mean().abs() < 1e-2
    assert made.var().item() == pytest.approx(1, abs=0.12)  # eps is a tenth of the variance


def test_grids_that_are_not_square_come_back():
    tokenizer = ImageTokenizer(
        ImageTokenizerConfig(AutoencoderConfig(32, 4, 4, (8, 16), 1), 3, codebook_size=16)
    )
    tokenizer.codebook.codes.normal_()
    latents = torch.randn(2, 2, 6, 4)
    code_indices, states = tokenizer.encode_latents(latents, [3, 4])
    records = [TokenRecord(seed, code_indices[:, i]) for i, seed in enumerate((3, 4))]
    torch.testing.assert_close(tokenizer.states(records), states)


def test_numbers_that_float16_does_not_hold_are_not_saved(tmp_path):
    tokenizer = ImageTokenizer(
        ImageTokenizerConfig(AutoencoderConfig(16, 4, 4, (8,), 0), 3, codebook_size=4)
    )
    tokenizer.codebook.codes.fill_(1e5)
    with pytest.raises(CheckpointError, match=r"'codebook\.codes' holds numbers that are not"):
        tokenizer.save(tmp_path)


def test_phases_leave_updates_for_the_autoencoder():
    shares = {"codebook_share": 0.5, "decoder_share": 0.5}
    with pytest.raises(RecipeError, match="leave no update for the autoencoder"):
        ImageTokenizerTraining(steps=10, **shares).phases(frozen=False)
    assert ImageTokenizerTraining(steps=10, **shares).phases(frozen=True).codebook == 5


@pytest.mark.parametrize(
    "content", [b"x" * 99, b"\x08\0\0\0\0\0\0\0{}      ", b""], ids=["noise", "empty", "no bytes"]
)
def test_a_damaged_network_to_judge_by_is_refused(content, backbone, tmp_path):
    folder = shutil.copytree(backbone, tmp_path / "backbone")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"train\.loss\.backbone"):
        PerceptualLoss(str(folder), 32)


def test_a_network_of_half_precision_judges_in_single(backbone, tmp_path):
    ResNetModel.from_pretrained(backbone).half().save_pretrained(tmp_path)
    a, b = torch.rand(2, 1, 3, 32, 32) * 2 - 1
    half, single = (PerceptualLoss(str(p), 32)(a, b).item() for p in (tmp_path, backbone))
    assert half == pytest.approx(single, rel=1e-2)


def test_a_tokeniser_without_a_recipe_is_never_written_over(tmp_path, tiny_tokenizers):
    """As in the folder of every model."""
    for kind, recipe_class, begin in (
        ("image", ImageTokenizerRecipe, train_image),
        ("text", TextTokenizerRecipe, train_text),
    ):
        own = tmp_path / kind
        shutil.copytree(tiny_tokenizers / kind, own)
        (own / "recipe.yaml").unlink(missing_ok=True)
        before = {path.name: path.read_bytes() for path in own.iterdir()}
        with pytest.raises(CheckpointError, match="holds a tokeniser already"):
            begin(recipe_class(), own)
        after = {path.name: path.read_bytes() for path in own.iterdir() if path.name != ".lock"}
        assert after == before


def test_a_gpu_that_a_tokeniser_fills_is_answered_with_its_own_keys(
    image_recipe_file, tmp_path, monkeypatch, capsys
):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 ...")

    monkeypatch.setattr(training, "train_image", fail)
    command = ["tokenizer", "train", str(image_recipe_file), "--run", str(tmp_path / "run")]
    assert main(command) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert "the GPU's memory is full (CUDA out" in said and "lower train.batch_size and" in said
    assert "micro_batch_size" not in said and "recompute" not in said
