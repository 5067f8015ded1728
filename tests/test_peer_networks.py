# ruff: noqa: E402 (what needs the extra is imported after it was looked for)
"""Every peer's network on pictures of 2x2 positions: conventions, masks, caches."""

from itertools import combinations

import pytest
import torch

for package in ("diffusers", "transformers", "transfusion_pytorch"):
    pytest.importorskip(package, reason="the extra `peers` is not installed")

from mmrdpm import machine
from mmrdpm.bench.peers.flow_matching import TRAINING_TIMES
from mmrdpm.bench.peers.peers import MAKERS, make
from mmrdpm.bench.peers.protocol import Batch, How, guided
from mmrdpm.bench.peers.qwen import prefix_mask
from mmrdpm.bench.peers.trainer import Trainer

GREEDY = How(steps=3, guidance_scale=2.0, temperature=0.0)


@torch.no_grad()
def test_the_flow_of_a_caption_leaves_out_what_all_captions_share(build_peer):
    peer = build_peer("flow")
    states = torch.randn(1, *peer.grid).expand(3, -1, -1, -1)

    def velocity():
        return peer.velocity(states, torch.full((3,), 0.5), peer.condition([(5,), (7,), ()]))

    before = velocity()
    assert all((a - b).abs().max() > 1e-3 for a, b in combinations(before, 2))
    peer.table.weight[peer.first] *= -3
    after = velocity()
    assert torch.equal(after[:2], before[:2]) and not torch.equal(after[2], before[2])


@pytest.mark.parametrize(
    ("name", "idle"),
    [
        # a row of timesteps, as the first is 1, and ids that no prompt holds, which nothing scores
        ("ours", 32 + 6 * 32),
        ("flow", 59 * 32 + 64),  # the library's places of the largest grid
        ("masked", 0),
        ("raster", 32),  # the last place is never read
        ("transfusion", 131 * 32 + 64),  # the library's ids of shapes
        ("causal_flow", 0),
        ("scales", 0),
    ],
)
def test_what_is_counted_is_learned(name, idle, build_peer, peer_scene):
    """Where pictures and captions have every id, all that is counted has a gradient."""
    peer = build_peer(name).to(machine.device())
    ids = torch.arange(peer_scene.texts.size).tensor_split(64)
    batch = Batch([tuple(i.tolist()) for i in ids], peer_scene.training_latents[:64], [0] * 64)
    peer.loss(batch).backward()
    counted = [p for p in peer.parameters() if p.requires_grad]
    assert sum((p.grad == 0).sum().item() for p in counted) <= idle


@pytest.mark.parametrize("name", MAKERS)
def test_a_peer_learns_a_batch_and_draws_latents(name, peer_recipe, peer_scene, tmp_path):
    trainer = Trainer(name, peer_recipe, peer_scene, tmp_path, lr=0.01, steps=100)
    assert len(trainer.optimizers.parts) == 2, "Muon found no matrices"
    same = peer_scene.batch(0, 0, 4)
    first = _mean_loss(trainer.peer, same)
    for update in range(16):
        torch.manual_seed(update % 4)  # the noise that it is then judged with
        trainer.peer.loss(same).backward()
        trainer.optimizers.step(0.01)
    assert _mean_loss(trainer.peer, same) < first
    with torch.no_grad():
        for steps in trainer.peer.steps:
            drawn = trainer.peer.draw([(1, 2), ()], How(steps, 2.0, 1.0))
            assert drawn.shape == (2, *peer_scene.latent_shape) and drawn.isfinite().all()


def _mean_loss(peer, batch):
    with torch.no_grad():
        return sum(_seeded(seed, peer, batch) for seed in range(4)) / 4


def _seeded(seed, peer, batch):
    torch.manual_seed(seed)
    return peer.loss(batch).item()


@pytest.mark.parametrize("name", ["raster", "scales"])
def test_padding_changes_no_loss(name, build_peer, peer_scene):
    peer, captions = build_peer(name), [(5,), (6, 7, 8, 9)]
    latents = peer_scene.latents[:2]
    both = peer.loss(Batch(captions, latents, [0, 0]))
    apart = [peer.loss(Batch([captions[i]], latents[i : i + 1], [0])) for i in range(2)]
    torch.testing.assert_close(both, (apart[0] + apart[1]) / 2, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_raster_draws_with_its_cache_what_it_draws_without(build_peer):
    peer, captions = build_peer("raster"), [(5,), (6, 7, 8)]
    prompt, real = peer.prompt([*captions, (), ()])
    row = torch.zeros(2, 0, dtype=torch.int64)
    for _ in range(peer.tokens):
        inputs = torch.cat([prompt, peer.embed(row.repeat(2, 1))], dim=1)
        seen = torch.cat([real, real.new_ones(4, row.shape[1])], dim=1)
        logits = guided(peer.head(peer.run(inputs, seen.long())[:, -1]), 2.0)
        row = torch.cat([row, logits.argmax(-1)[:, None]], dim=1)
    expected = peer.codes.partial(peer.levels(row))
    torch.testing.assert_close(peer.draw(captions, GREEDY), expected)


@torch.no_grad()
def test_scales_draw_with_their_cache_what_they_draw_without(build_peer):
    peer, captions = build_peer("scales"), [(5,), (6, 7, 8)]
    prompt, real = peer.prompt([*captions, (), ()])
    codes, inputs = [], [peer.embed(None, 1, 4)]
    for level in range(1, len(peer.codes.sides) + 1):
        if level > 1:
            inputs.append(peer.embed(peer.codes.partial(codes).repeat(2, 1, 1, 1), level, 4))
        blocks = peer.blocks[: sum(peer.codes.lengths[:level])]
        hidden = peer.run(torch.cat([prompt, *inputs], dim=1), prefix_mask(real, blocks))
        last = hidden[:, -peer.codes.lengths[level - 1] :]
        codes.append(guided(peer.head(last), 2.0).argmax(-1))
    torch.testing.assert_close(peer.draw(captions, GREEDY), peer.codes.partial(codes))


@torch.no_grad()
def test_masked_sees_both_ways_and_no_padding(build_peer):
    peer = build_peer("masked")
    codes = torch.randint(16, (1, peer.tokens))
    changed = codes.clone()
    changed[0, -1] = (codes[0, -1] + 1) % 16
    before, after = peer.hidden([(5, 6)], codes), peer.hidden([(5, 6)], changed)
    assert not torch.allclose(before[0, 0], after[0, 0])
    padded = peer.hidden([(5, 6), (1, 2, 3, 4)], codes.repeat(2, 1))
    torch.testing.assert_close(padded[:1], before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["flow", "causal_flow"])
def test_flow_reaches_the_picture_that_a_true_velocity_points_to(
    name, build_peer, peer_scene, monkeypatch
):
    peer, truth = build_peer(name), peer_scene.latents[:2]

    looked = []

    def velocity(states, sigma, condition):
        looked.append(sigma[0].item())
        target = truth.repeat(len(states) // 2, 1, 1, 1)
        return (states - target) / sigma[:, None, None, None]  # eps - z_0 of a straight path

    monkeypatch.setattr(peer, "velocity", velocity)
    drawn = peer.draw([(1,), (2,)], How(5, 1.0, 1.0))
    torch.testing.assert_close(drawn, truth, rtol=1e-3, atol=1e-3)
    assert looked == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


@torch.no_grad()
def test_transfusion_samples_with_the_flow_that_it_was_trained_to_predict(build_peer):
    peer = build_peer("transfusion")
    library = peer.library
    announced = library.char_tokenizer("2,2", device=peer.device).tolist()
    prompt = [
        library.sos_id,
        5,
        6,
        library.meta_id,
        *announced,
        library.get_modality_info(0).som_id,
    ]
    torch.manual_seed(1)
    noise = torch.randn(peer.grid)
    embed, flows = library(
        [[torch.tensor(prompt), noise]],
        times=torch.zeros(1, 1),  # where the state is the noise alone
        return_loss=False,
        return_embed=True,
    )
    (at_picture,) = flows[0]
    velocity = library.get_modality_info(0).model_to_latent(at_picture(embed))
    torch.manual_seed(1)
    drawn = peer.draw([(5, 6)], How(1, 1.0, 1.0))
    torch.testing.assert_close(drawn[0], noise + velocity.reshape(peer.grid))


@torch.no_grad()
def test_the_caption_that_is_read_once_is_read_as_in_one_row(build_peer):
    peer, captions = build_peer("causal_flow"), [(5,), (6, 7, 8), ()]
    states, sigma = torch.randn(3, *peer.grid), torch.tensor([0.1, 0.5, 0.9])
    condition = peer.condition(captions)
    first, second = (peer.velocity(states, sigma, condition) for _ in range(2))
    prompt, real = peer.prompt(captions)
    time = peer.time(peer.waves(sigma * TRAINING_TIMES))[:, None]
    image = peer.from_latents(states.flatten(1, 2)) + peer.places.weight + time
    mask = prefix_mask(real, torch.zeros(peer.tokens, dtype=torch.int64))
    hidden = peer.run(torch.cat([prompt, image], dim=1), mask)[:, -peer.tokens :]
    expected = peer.to_velocity(hidden).unflatten(1, peer.grid[:2])
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(first, second), "a step left something in the cache"


def test_masked_learns_the_codes_that_it_does_not_see(build_peer, peer_scene, monkeypatch):
    peer, seen = build_peer("masked"), []
    codes = torch.cat(peer.codes.encode(peer_scene.latents[:64]), dim=1)

    def hidden(captions, inputs):
        seen.append(inputs)
        known = torch.zeros(*inputs.shape, peer.codes.codebook.size)
        known.scatter_(2, codes[..., None], 50.0)
        known[inputs != peer.codes.codebook.size] = 0  # wrong where it is shown: it must not count
        return known

    monkeypatch.setattr(peer, "hidden", hidden)
    peer.head = torch.nn.Identity()
    loss = peer.loss(Batch([()] * 64, peer_scene.latents[:64], [0] * 64))
    masked = seen[0] == peer.codes.codebook.size
    assert loss < 1e-6 and torch.equal(seen[0][~masked], codes[~masked])
    assert masked.any(dim=1).all() and 0.5 < masked.float().mean() < 0.8  # 2 / pi of them


@torch.no_grad()
@pytest.mark.parametrize("name", ["flow", "causal_flow"])
def test_padding_changes_no_velocity(name, build_peer):
    peer, captions = build_peer(name), [(5,), (6, 7, 8, 9), ()]
    states, sigma = torch.randn(3, *peer.grid), torch.tensor([0.1, 0.5, 0.9])
    together = peer.velocity(states, sigma, peer.condition(captions))
    for i in range(3):
        alone = peer.velocity(states[i : i + 1], sigma[i : i + 1], peer.condition([captions[i]]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["masked", "raster", "causal_flow", "scales"])
def test_fresh_blocks_add_nothing(name, peer_recipe, peer_scene, tmp_path):
    peer = make(name, peer_recipe, peer_scene, tmp_path)
    inputs, real = peer.prompt([(5, 6, 7), (8, 9, 10)])
    torch.testing.assert_close(peer.run(inputs, real.long()), peer.decoder.norm(inputs))


@torch.no_grad()
@pytest.mark.parametrize("name", ["flow", "causal_flow"])
def test_a_fresh_flow_predicts_the_same_for_all(name, peer_recipe, peer_scene, tmp_path):
    peer = make(name, peer_recipe, peer_scene, tmp_path)
    states = torch.randn(2, *peer.grid)
    velocity = peer.velocity(states, torch.tensor([0.1, 0.9]), peer.condition([(5,), ()]))
    assert (velocity == velocity[0, 0, 0]).all()


@torch.no_grad()
def test_the_flow_does_not_look_at_the_length_of_queries_and_keys(build_peer):
    peer = build_peer("flow")
    states, condition = torch.randn(1, *peer.grid), peer.condition([(5, 6)])
    before = peer.velocity(states, torch.tensor([0.5]), condition)
    for block in peer.network.transformer_blocks:
        for attention in (block.attn1, block.attn2):
            for linear in (attention.to_q, attention.to_k):
                linear.weight *= 3
                linear.bias *= 3
    after = peer.velocity(states, torch.tensor([0.5]), condition)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_all_levels_of_a_place_are_one_position(peer_recipe, peer_scene, tmp_path):
    """With fresh blocks, through which no position hears of another."""
    peer = make("masked", peer_recipe, peer_scene, tmp_path)
    places, levels = peer.codes.lengths[0], len(peer.codes.lengths)
    codes = torch.zeros(1, peer.tokens, dtype=torch.int64)
    before = peer.hidden([(5,)], codes)
    for level in range(levels):
        changed = codes.clone()
        changed[0, level * places + 1] = 3
        other = (peer.hidden([(5,)], changed) != before).any(dim=-1)[0]
        assert (
            other.unflatten(0, (levels, places)).tolist() == [[False, True, False, False]] * levels
        )


@torch.no_grad()
def test_masked_tells_its_levels_apart(build_peer):
    peer = build_peer("masked")
    codes = torch.randint(16, (1, peer.tokens))
    codes[:, : peer.tokens // 2] = 1
    turned = codes.roll(peer.tokens // 2, dims=1)  # the same codes at other levels of their places
    assert not torch.allclose(peer.hidden([(5,)], codes), peer.hidden([(5,)], turned))
