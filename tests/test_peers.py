# ruff: noqa: E402 (what needs the extra is imported after it was looked for)
"""Every peer on pictures of 2x2 positions: conventions, caches, resuming, the whole command."""

import json
import math
import re
from itertools import combinations

import pytest
import torch
import yaml

from mmrdpm import recipe
from mmrdpm.cli import main
from mmrdpm.errors import RecipeError, UsageError

for package in ("diffusers", "transformers", "transfusion_pytorch", "matplotlib"):
    pytest.importorskip(package, reason="the extra `peers` is not installed")

from mmrdpm.bench.peers import peers as registry
from mmrdpm.bench.peers import report, run
from mmrdpm.bench.peers.peers import MAKERS, make
from mmrdpm.bench.peers.protocol import Batch, How, PeerBench, Scene, guided
from mmrdpm.bench.peers.qwen import prefix_mask
from mmrdpm.bench.peers.trainer import Diverged, Trainer, fit

TINY = {"layers": 2, "width": 32, "heads": 2, "ffn": 48, "batch_size": 4, "lrs": [0.01]}
GREEDY = How(steps=3, guidance_scale=2.0, temperature=0.0)


@pytest.fixture(scope="session")
def mapping(tiny_tokenizers):
    """A recipe for pictures of 2x2 positions, as plain mappings."""
    return {
        "kind": "peers",
        "tokenizers": {t: str(tiny_tokenizers / t) for t in ("image", "text")},
        "budget": {"flops": 2e7, "search_flops": 1e7, "points": 2},
        "equal": {"tolerance": 9.0, "levels": 4, "threads": 1},
        "checkpoint": {"every": 2, "keep": 1, "log_every": 1},
        "judging": {"concepts": 5, "guidance_scales": [2.0], "repeats": 1, "speed_batches": [2]},
        **{name: dict(TINY) for name in ("ours", "masked", "raster", "scales")},
        "flow": {**TINY, "ffn": 128, "steps": [3, 2]},
        "masked": {**TINY, "steps": [3]},
        "transfusion": {**TINY, "steps": [2]},
        "causal_flow": {**TINY, "steps": [2]},
    }


@pytest.fixture(scope="session")
def tiny(mapping):
    return recipe.from_dict(PeerBench, mapping, "tiny")


@pytest.fixture(scope="session")
def scene(tiny):
    return Scene(tiny)


@pytest.fixture(scope="session")
def build(tiny, scene, tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes")

    def built(name):
        torch.manual_seed(0)
        peer = make(name, tiny, scene, folder)
        for parameter in peer.parameters():  # zeros would hide mistakes
            if parameter.requires_grad and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
        return peer

    return built


@torch.no_grad()
def test_the_flow_of_a_caption_leaves_out_what_all_captions_share(build):
    peer = build("flow")
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
        ("ours", 32),  # a row of timesteps: the first is 1
        ("flow", 59 * 32 + 64),  # the library's places of the largest grid
        ("masked", 0),
        ("raster", 32),  # the last place is never read
        ("transfusion", 131 * 32 + 64),  # the library's ids of shapes
        ("causal_flow", 0),
        ("scales", 0),
    ],
)
def test_what_is_counted_is_learned(name, idle, build, scene):
    """Where pictures and captions have every id, all that is counted has a gradient."""
    peer, ids = build(name), torch.arange(scene.texts.size).tensor_split(64)
    batch = Batch([tuple(i.tolist()) for i in ids], scene.training_latents[:64], [0] * 64)
    peer.loss(batch).backward()
    counted = [p for p in peer.parameters() if p.requires_grad]
    assert sum((p.grad == 0).sum().item() for p in counted) <= idle


@pytest.mark.parametrize("name", MAKERS)
def test_a_peer_learns_a_batch_and_draws_latents(name, tiny, scene, tmp_path):
    trainer = Trainer(name, tiny, scene, tmp_path, lr=0.01, steps=100)
    assert len(trainer.optimizers.parts) == 2, "Muon found no matrices"
    same = scene.batch(0, 0, 4)
    first = _mean_loss(trainer.peer, same)
    for update in range(16):
        torch.manual_seed(update % 4)  # the noise that it is then judged with
        trainer.peer.loss(same).backward()
        trainer.optimizers.step(0.01)
    assert _mean_loss(trainer.peer, same) < first
    with torch.no_grad():
        for steps in trainer.peer.steps:
            drawn = trainer.peer.draw([(1, 2), ()], How(steps, 2.0, 1.0))
            assert drawn.shape == (2, *scene.latent_shape) and drawn.isfinite().all()


def _mean_loss(peer, batch):
    with torch.no_grad():
        return sum(_seeded(seed, peer, batch) for seed in range(4)) / 4


def _seeded(seed, peer, batch):
    torch.manual_seed(seed)
    return peer.loss(batch).item()


@pytest.mark.parametrize("name", ["raster", "scales"])
def test_padding_changes_no_loss(name, build, scene):
    peer, captions = build(name), [(5,), (6, 7, 8, 9)]
    latents = scene.latents[:2]
    both = peer.loss(Batch(captions, latents, [0, 0]))
    apart = [peer.loss(Batch([captions[i]], latents[i : i + 1], [0])) for i in range(2)]
    torch.testing.assert_close(both, (apart[0] + apart[1]) / 2, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_raster_draws_with_its_cache_what_it_draws_without(build):
    peer, captions = build("raster"), [(5,), (6, 7, 8)]
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
def test_scales_draw_with_their_cache_what_they_draw_without(build):
    peer, captions = build("scales"), [(5,), (6, 7, 8)]
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
def test_masked_sees_both_ways_and_no_padding(build):
    peer = build("masked")
    codes = torch.randint(16, (1, peer.tokens))
    changed = codes.clone()
    changed[0, -1] = (codes[0, -1] + 1) % 16
    before, after = peer.hidden([(5, 6)], codes), peer.hidden([(5, 6)], changed)
    assert not torch.allclose(before[0, 0], after[0, 0])
    padded = peer.hidden([(5, 6), (1, 2, 3, 4)], codes.repeat(2, 1))
    torch.testing.assert_close(padded[:1], before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["flow", "causal_flow"])
def test_flow_reaches_the_picture_that_a_true_velocity_points_to(name, build, scene, monkeypatch):
    peer, truth = build(name), scene.latents[:2]

    def velocity(states, sigma, condition):
        target = truth.repeat(len(states) // 2, 1, 1, 1)
        return (states - target) / sigma[:, None, None, None]  # eps - z_0 of a straight path

    monkeypatch.setattr(peer, "velocity", velocity)
    drawn = peer.draw([(1,), (2,)], How(5, 1.0, 1.0))
    torch.testing.assert_close(drawn, truth, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_transfusion_samples_with_the_flow_that_it_was_trained_to_predict(build):
    peer = build("transfusion")
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


def test_a_killed_run_goes_on_exactly(tiny, scene, tmp_path, monkeypatch):
    def trainer():
        return Trainer("flow", tiny, scene, tmp_path, lr=0.01, steps=6)

    straight, killed = trainer(), trainer()
    stopped_at = []
    assert fit(straight, tmp_path / "straight", [3, 6], lambda _: None)
    update = killed.update

    def dying():
        if killed.step == 5:
            raise KeyboardInterrupt
        return update()

    monkeypatch.setattr(killed, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        fit(killed, tmp_path / "run", [3, 6], lambda _: None)
    again = trainer()
    assert fit(again, tmp_path / "run", [3, 6], lambda _: stopped_at.append(again.step))
    assert stopped_at == [6] and again.last_losses == straight.last_losses
    for name, tensor in straight.peer.state_dict().items():
        assert torch.equal(tensor, again.peer.state_dict()[name]), name


def test_updates_that_are_not_finite_are_skipped_and_five_in_a_row_name_the_learning_rate(
    tiny, scene, tmp_path, monkeypatch
):
    trainer = Trainer("flow", tiny, scene, tmp_path, lr=0.5, steps=9)
    losses = iter([0.1, math.nan, 0.2, *[math.inf] * 5])
    honest = trainer.peer.loss
    monkeypatch.setattr(trainer.peer, "loss", lambda batch: honest(batch) * next(losses))
    for learns in (True, False, True):
        before = trainer.peer.table.weight.clone()
        trainer.update()
        assert torch.equal(before, trainer.peer.table.weight) != learns
    assert (trainer.step, trainer.skipped) == (3, 1)
    for _ in range(4):
        trainer.update()
    with pytest.raises(
        UsageError, match=r"5 updates up to 8, with the learning rate 0\.5: begin.*lrs"
    ):
        trainer.update()


@pytest.fixture
def command(mapping, scene, tmp_path, monkeypatch, pixel_features):
    """Runs `bench peers` on a recipe file; gives the exit status."""
    monkeypatch.setattr(run, "Scene", lambda recipe: scene)  # reading it takes seconds
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(mapping))
    return lambda *more: main(["bench", "peers", str(path), "--out", str(tmp_path / "out"), *more])


def test_the_command_runs_all_peers_and_goes_on_where_it_was(command, tmp_path, capsys):
    out = tmp_path / "out"
    assert command("--only", "ours", "flow", "ours.lrs=[0.001,0.01]") == 0
    plan = json.loads((out / "ours" / "plan.json").read_text())
    assert set(plan["search"]) == {"0.001", "0.01"}
    assert plan["search"][f"{plan['lr']:g}"] == min(plan["search"].values())
    results = json.loads((out / "flow" / "results.json").read_text())
    spent = results["curve"][-1]["flops"]
    assert abs(spent - 2e7) <= plan["flops_per_update"]
    assert len(results["curve"]) == 2
    timing = json.loads((out / "timing.json").read_text())
    drawn = [(e["peer"], e["steps"]) for e in timing["sampling"]]
    assert drawn == [("ours", 3), ("flow", 3), ("flow", 2)]
    assert [e["peer"] for e in timing["training"]] == ["ours", "flow"]
    assert all(e["seconds_per_update"] > 0 for e in timing["training"])
    assert "in turns on" in (out / "table.md").read_text()

    last = results["curve"][-1]["drawn"]
    assert {entry["temperature"] for entry in last} == {None}  # a flow draws no codes
    assert "| 3 | 2 |  |" in (out / "table.md").read_text() and results["protocol"]["count"] == 5
    last.append({**last[0], "top10": 1.0, "kid": -1.0, "guidance_scale": 4.0})
    (out / "flow" / "results.json").write_text(json.dumps(results))
    begun = (out / "ours" / "results.json").stat().st_mtime_ns
    assert command("ours.lrs=[0.001,0.01]") == 0  # the rest
    assert (out / "ours" / "results.json").stat().st_mtime_ns == begun
    timing = json.loads((out / "timing.json").read_text())  # of drawing as it was judged best
    flow = [e for e in timing["sampling"] if e["peer"] == "flow"]
    assert {e["steps"]: e["guidance_scale"] for e in flow} == {3: 4.0, 2: 2.0}
    table = capsys.readouterr().out
    assert all(title in table for title in report.TITLES.values())
    for name in ("flops", "seconds", "sampling"):
        assert (out / f"quality-{name}.svg").read_text().count("<svg") == 1

    assert command() == 1  # another recipe in the same folder
    assert "was begun with ours.lrs" in capsys.readouterr().err


def test_ctrl_c_saves_and_the_same_command_goes_on(command, tmp_path, capsys, interrupted):
    with interrupted(Trainer, 1):
        assert command("--only", "flow") == 130
    assert "the same command goes on" in capsys.readouterr().err
    saved = tmp_path / "out" / "flow" / "run" / "step-0000001.safetensors"
    assert saved.exists()
    assert command("--only", "flow") == 0
    log = (tmp_path / "out" / "flow" / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in log]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > 1


@pytest.mark.parametrize(
    "error, reason",
    [
        (ModuleNotFoundError("No module named 'x'", name="x"), "needs the package x: pip install"),
        (
            RuntimeError("Failed to import diffusers.models because of:\ncannot import name 'y'"),
            "its libraries do not go together (cannot import name 'y')",
        ),
    ],
)
def test_a_peer_without_its_library_stays_in_the_table(
    command, capsys, monkeypatch, tmp_path, error, reason
):
    def failing(name):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(registry, "import_module", failing)
        assert command("--only", "flow") == 0
        assert f"not run: {reason}" in capsys.readouterr().out
    assert command("--only", "flow", "ours") == 0  # the library is there now
    (tmp_path / "out" / "timing.json").unlink()
    monkeypatch.setattr(registry, "import_module", failing)
    assert command("--only", "ours") == 0
    timing = json.loads((tmp_path / "out" / "timing.json").read_text())
    assert [e["peer"] for e in timing["training"]] == ["ours"]
    assert list(timing["missing"]) == ["flow"] and reason in timing["missing"]["flow"]
    assert "flow was not timed" in capsys.readouterr().err
    assert command("--only", "ours") == 0  # what cannot be timed is not tried at every call
    assert "timing" not in capsys.readouterr().err


def test_bad_input_is_one_line(command, capsys):
    assert command("--only", "flo") == 1
    assert "--only flo: no such peer: choose among ours, flow" in capsys.readouterr().err
    assert command("flow.ffn=100") == 1
    assert "flow.ffn is 100: the library's blocks have 4 * width = 128" in capsys.readouterr().err


def test_settings_that_cannot_be_measured_are_refused(mapping, scene, tmp_path):
    def made(**changed):
        name = next(iter(changed))
        altered = {**mapping, name: {**mapping[name], **changed[name]}}
        return make(name, recipe.from_dict(PeerBench, altered, "altered"), scene, tmp_path)

    with pytest.raises(RecipeError, match="steps is empty"):
        made(flow={"steps": []})
    with pytest.raises(RecipeError, match=r"ours\.steps: the method fixes it at 3"):
        made(ours={"steps": [50]})
    with pytest.raises(RecipeError, match=r"flow\.noise_pool: it belongs to ours alone"):
        made(flow={"noise_pool": 1})
    with pytest.raises(RecipeError, match="lrs: name at least one"):
        made(ours={"lrs": []})


def test_a_rate_that_diverges_loses_the_search_and_all_of_them_end_the_run(
    command, tmp_path, capsys, monkeypatch
):
    update = Trainer.update

    def diverging(self):
        if self.lr > 0.01:
            raise Diverged("too high")
        return update(self)

    monkeypatch.setattr(Trainer, "update", diverging)
    assert command("--only", "flow", "flow.lrs=[0.01,0.5]") == 0
    plan = json.loads((tmp_path / "out" / "flow" / "plan.json").read_text())
    assert plan["search"]["0.5"] is None and plan["lr"] == 0.01
    assert command("--only", "flow", "flow.lrs=[0.5,0.6]", "--out", str(tmp_path / "other")) == 1
    assert "diverges with every rate of flow.lrs" in capsys.readouterr().err


def test_a_peer_of_another_size_is_refused_before_anything_is_trained(command, tmp_path, capsys):
    assert command("--only", "ours", "scales", "equal.tolerance=0.05", "scales.layers=4") == 1
    assert re.search(r"scales has [\d,]+ parameters, ours [\d,]+: \+", capsys.readouterr().err)
    assert not (tmp_path / "out" / "ours").exists()
