from dataclasses import replace

import pytest
import torch

from mmrdpm.errors import CheckpointError, RecipeError
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.rdpm.autoencoder import AutoencoderConfig
from mmrdpm.rdpm.codebook import Codebook, CodebookFit
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from mmrdpm.rdpm.schedule import SCHEDULES, Schedule
from mmrdpm.rdpm.trajectory import TRAJECTORIES, decode, encode, make_trajectory
from mmrdpm.rdpm.usage import perplexity
from mmrdpm.tokenizer_plan import ImageTokenizerTraining, Phases
from mmrdpm.train_tokenizer import ImageTokenizerRecipe, train_image

TINY = ImageTokenizerConfig(
    AutoencoderConfig(image_size=16, latent_channels=4, patch=4, widths=(8, 16), blocks=1),
    num_timesteps=3,
    codebook_size=8,
)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_run_from_exact_noise_to_exact_data(name):
    schedule = Schedule(name, 7)
    assert schedule.coefficients(7) == (0.0, 1.0)
    assert schedule.coefficients(0) == (1.0, 0.0)
    alphas = [schedule.coefficients(t)[0] for t in range(8)]
    assert alphas == sorted(alphas, reverse=True)


def test_cosine_preserves_variance():
    for timestep in range(11):
        alpha, sigma = Schedule("cosine", 10).coefficients(timestep)
        assert alpha**2 + sigma**2 == pytest.approx(1)


def test_a_path_worked_by_hand():
    """z0 = 1, eps = 0, T = 2, codes {-0.5, 0.25, 0.5}: 0 -> 0.5 -> 1."""
    codebook = Codebook(2, 3, 1)
    codebook.codes[0] = torch.tensor([[-0.5], [0.25], [0.5]])
    codes, states = encode(
        make_trajectory("path", Schedule("linear", 2)),
        codebook,
        torch.ones(1, 1, 1),
        torch.zeros(1, 1, 1, 1),
    )
    assert codes.flatten().tolist() == [2, 2]
    assert states.flatten().tolist() == [1.0, 0.5, 0.0]


def test_later_steps_correct_the_errors_of_earlier_ones():
    """The only small code overshoots or rests, so step 1 must start from the real state."""
    codebook = Codebook(2, 2, 1)
    codebook.codes[0] = torch.tensor([[0.0], [1.0]])
    codes, states = encode(
        make_trajectory("path", Schedule("linear", 2)),
        codebook,
        torch.full((1, 1, 1), 1.2),
        torch.zeros(1, 1, 1, 1),
    )
    assert codes.flatten().tolist() == [0, 1]  # 0.6 -> code 1.0, then 0.2 -> code 0
    assert states.flatten().tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("name", TRAJECTORIES)
@pytest.mark.parametrize("grid", [(5,), (2, 3), (2, 2, 2)])
@pytest.mark.parametrize("per_step", [False, True])
def test_decode_retraces_encode_on_grids_of_any_rank(name, grid, per_step):
    generator = torch.Generator().manual_seed(1)
    trajectory = make_trajectory(name, Schedule("linear", 4))
    codebook = Codebook(4, 16, 3, per_step)
    codebook.codes.normal_(generator=generator)
    latents = torch.randn(2, *grid, 3, generator=generator)
    noise = torch.randn(trajectory.num_noises, 2, *grid, 3, generator=generator)
    codes, states = encode(trajectory, codebook, latents, noise)
    assert codes.shape == (4, 2, *grid)
    assert torch.equal(decode(trajectory, codebook, codes, noise), states)


def test_nearest_equals_brute_force():
    generator = torch.Generator().manual_seed(2)
    codebook = Codebook(2, 32, 5, per_step=True)
    codebook.codes.normal_(generator=generator)
    codebook.gains[:] = torch.tensor([0.5, 2.0])
    residual = torch.randn(4, 6, 5, generator=generator)
    distance = (residual[..., None, :] / 2.0 - codebook.codes[1]).square().sum(-1)
    assert torch.equal(codebook.nearest(residual, 2), distance.argmin(-1))


@pytest.mark.parametrize("per_step", [False, True])
def test_the_fit_lowers_the_error_and_uses_every_code(per_step):
    generator = torch.Generator().manual_seed(3)
    trajectory = make_trajectory("path", Schedule("linear", 4))
    codebook = Codebook(4, 32, 2, per_step)
    fit, errors = CodebookFit(codebook), []
    for _ in range(30):
        latents, eps = torch.randn(2, 1024, 2, generator=generator)
        state = eps
        for timestep in range(4, 0, -1):
            residual = trajectory.residual(latents, eps[None], state, timestep)
            state = state + fit.observe(residual, timestep, generator)
        errors.append((state - latents).square().mean().item())
    assert errors[-1] < 0.8 * errors[0]
    codes, _ = encode(trajectory, codebook, latents, eps[None])
    assert all(perplexity(step, 32) > 16 for step in codes)


def test_tables_of_steps_start_alike():
    """Else the first tie would average codes that have nothing to do with each other."""
    generator = torch.Generator().manual_seed(3)
    trajectory, codebook = make_trajectory("path", Schedule("linear", 4)), Codebook(4, 32, 2, True)
    fit = CodebookFit(codebook)
    latents, eps = torch.randn(2, 1024, 2, generator=generator)
    state = eps
    for timestep in range(4, 0, -1):
        residual = trajectory.residual(latents, eps[None], state, timestep)
        state = state + fit.observe(residual, timestep, generator)
    before = codebook.codes.square().mean()
    fit.tie()
    assert codebook.codes.square().mean() > 0.7 * before  # of four unrelated ones a quarter is left


def test_perplexity_of_known_uses():
    assert perplexity(torch.tensor([0, 1, 2, 3]), 8) == pytest.approx(4)
    assert perplexity(torch.tensor([5, 5]), 8) == pytest.approx(1)


def make_tokenizer():
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(TINY).eval()
    tokenizer.codebook.codes.normal_()
    return tokenizer


def test_a_saved_tokenizer_decodes_records_to_the_same_pictures(tmp_path):
    tokenizer = make_tokenizer()
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        records = tokenizer.encode(images, [5, 6, 7])
        tokenizer.save(tmp_path)
        again = image_tokenizer.load(tmp_path)
        # weights are stored as float16
        torch.testing.assert_close(
            again.decode(records), tokenizer.decode(records), atol=0.02, rtol=0
        )
        alone = again.decode(records[1:2])
    assert torch.equal(alone[0], again.decode(records)[1])


def test_noise_depends_on_the_seed_alone():
    tokenizer = make_tokenizer()
    assert torch.equal(tokenizer.noise([4, 9])[:, 1], tokenizer.noise([9])[:, 0])


def test_damaged_or_foreign_weights_are_refused(tmp_path):
    make_tokenizer().save(tmp_path)
    path = tmp_path / image_tokenizer.WEIGHTS_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        image_tokenizer.load(tmp_path)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="pickled"):
        image_tokenizer.load(tmp_path)
    path.write_bytes(whole)
    spec = tmp_path / image_tokenizer.SPEC_FILE
    spec.write_text(spec.read_text().replace("codebook_size: 8", "codebook_size: 9"))
    with pytest.raises(CheckpointError, match="shape"):
        image_tokenizer.load(tmp_path)


def test_unknown_names_are_refused():
    with pytest.raises(RecipeError, match="linear"):
        Schedule("linaer", 3)
    with pytest.raises(RecipeError, match="path"):
        make_trajectory("paht", Schedule("linear", 3))


def test_eta_0_is_the_deterministic_step_from_the_real_state():
    """DDIM: the state's own noise, errors included, is kept and rescaled."""
    trajectory = make_trajectory("ancestral", Schedule("cosine", 4))
    generator = torch.Generator().manual_seed(0)
    latents, state = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    noise = torch.full((4, 5, 3), torch.nan, dtype=torch.float64)
    for timestep in (4, 3, 2, 1):
        (alpha, sigma), (alpha_s, sigma_s) = map(
            trajectory.schedule.coefficients, (timestep, timestep - 1)
        )
        implied = (state - alpha * latents) / sigma
        expected = alpha_s * latents + sigma_s * implied - state
        noise[timestep - 1] = 7.0  # plays no part
        residual = trajectory.residual(latents, noise, state, timestep)
        torch.testing.assert_close(residual, expected)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_exact_ancestral_steps_keep_the_marginals(name, eta):
    """Without quantisation z_t stays N(alpha_t z_0, sigma_t^2) at every step, whatever eta."""
    trajectory = make_trajectory("ancestral", Schedule(name, 5), eta)
    noise = torch.randn(5, 20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    latents = torch.full((20_000,), 2.0, dtype=torch.float64)
    state = trajectory.start(noise)
    for timestep in range(5, 0, -1):
        state = state + trajectory.residual(latents, noise, state, timestep)
        alpha, sigma = trajectory.schedule.coefficients(timestep - 1)
        assert state.mean().item() == pytest.approx(2 * alpha, abs=0.03)
        assert state.std().item() == pytest.approx(sigma, abs=0.03)


def test_fresh_noise_is_the_posterior_variance_of_ddpm():
    """Ho et al. 2020 (arXiv 2006.11239, eq. 7) with its own abar and beta."""
    trajectory = make_trajectory("ancestral", Schedule("cosine", 6), 1.0)
    for timestep in range(2, 7):
        abar, abar_s = (
            trajectory.schedule.coefficients(t)[0] ** 2 for t in (timestep, timestep - 1)
        )
        beta = 1 - abar / abar_s
        variance = (1 - abar_s) / (1 - abar) * beta
        assert trajectory.fresh(timestep) ** 2 == pytest.approx(variance)
    assert trajectory.fresh(1) == 0


def test_eta_belongs_to_one_trajectory():
    with pytest.raises(RecipeError, match=r"eta is 0\.5, but trajectory 'path' has none"):
        make_trajectory("path", Schedule("linear", 3), 0.5)


def test_a_growing_codebook_uses_the_codes_that_a_step_has():
    generator = torch.Generator().manual_seed(0)
    codebook = Codebook(3, 16, 2, per_step=True, sizes=(16, 8, 2))  # timestep 3 is the first
    fit, trajectory = CodebookFit(codebook), make_trajectory("path", Schedule("linear", 3))
    for update in range(30):
        latents, eps = torch.randn(2, 512, 2, generator=generator)
        state = eps
        for timestep in (3, 2, 1):
            residual = trajectory.residual(latents, eps[None], state, timestep)
            state = state + fit.observe(residual, timestep, generator)
        if update < 10:
            fit.tie()
            assert torch.equal(codebook.table(3), codebook.table(1)[:2])
    codes, _ = encode(trajectory, codebook, latents, eps[None])
    for timestep, size in ((3, 2), (2, 8), (1, 16)):
        used = codes[timestep - 1].unique()
        assert used.max() < size and len(used) > size // 2
    assert (fit.counts[2, 2:] == 0).all()


@pytest.mark.parametrize(
    ("sizes", "per_step", "says"),
    [
        ((8, 8), True, "for each of the 3"),
        ((0, 4, 8), True, "from 1 to codebook_size, 8"),
        ((4, 8, 9), True, r"sizes \[9, 8, 4\]: .* from 1 to codebook_size, 8"),  # T first
        ((2, 4, 8), False, "set per_step_codebook to true"),
        ((4, 4, 4), False, "the largest must be codebook_size, 8"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, per_step, says):
    with pytest.raises(RecipeError, match=says):
        Codebook(3, 8, 2, per_step, sizes)


def test_a_tokenizer_on_anothers_autoencoder_keeps_it_as_it_is(tiny_tokenizers, tmp_path):
    theirs = image_tokenizer.load(tiny_tokenizers / "image")
    shape = replace(theirs.config, num_timesteps=2, trajectory="residual")
    plan = ImageTokenizerTraining(
        steps=4,
        decoder_share=0.0,
        codebook_batch=16,
        autoencoder_from=str(tiny_tokenizers / "image"),
        threads=1,
    )
    assert plan.phases(frozen=True) == Phases(0, 4, 0)
    assert train_image(ImageTokenizerRecipe(shape, plan), tmp_path / "made")
    made = image_tokenizer.load(tmp_path / "made")
    for name, tensor in theirs.autoencoder.state_dict().items():
        assert torch.equal(tensor, made.autoencoder.state_dict()[name])
    assert made.codebook.codes.abs().sum() > 0
    other = replace(shape, autoencoder=replace(shape.autoencoder, latent_channels=8))
    with pytest.raises(RecipeError, match="make them equal"):
        train_image(ImageTokenizerRecipe(other, plan), tmp_path / "other")
    assert not (tmp_path / "other").exists()
