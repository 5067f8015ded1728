import dataclasses
import json
import weakref
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from mmrdpm import api, recipe
from mmrdpm.attention import backend
from mmrdpm.attention.layout import BlockKind
from mmrdpm.bench import attention, measure, plot, sample, train
from mmrdpm.bench.attention import layout_of
from mmrdpm.bench.sample import Size
from mmrdpm.cli import main
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.sampling.image import Guided
from mmrdpm.train_model import Trainer


def test_the_exponent_of_a_power_law_is_found():
    sizes = [1, 2, 4, 8]
    assert measure.exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)


def test_works_take_turns_and_ratios_are_taken_within_a_round():
    calls = []
    works = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    seconds = measure.interleaved(works, 3)
    assert calls == list("ab") * 4
    assert {len(column) for column in seconds.values()} == {3}
    # a machine that slows down from round to round does not change the ratio
    assert measure.ratio([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]) == 2.0


def test_charts_are_well_formed_and_keep_the_order_of_values():
    drawn = plot.chart("a < b", "x", "y", {"line & more": [(1, 10), (10, 1000), (100, 100)]})
    root = ElementTree.fromstring(plot.page([drawn, drawn, drawn]))
    (line, *_) = root.iter("{http://www.w3.org/2000/svg}polyline")
    points = [tuple(map(float, p.split(","))) for p in line.get("points").split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)  # decades are evenly spaced
    assert y1 < y2 < y0  # SVG counts downwards


def test_the_operations_of_an_image_are_those_that_torch_counts(tiny_run):
    from torch.utils.flop_counter import FlopCounterMode

    model = api.load(tiny_run).to("cpu")
    caption = (1, 2)
    draw = sample._drawing(
        model.transformer, model.images, model.vocabulary, caption, 1, Guided(guidance_scale=1.0)
    )
    with FlopCounterMode(display=False) as counter:
        draw()
    counted = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counted.items() if "mm" in str(op) and "bmm" not in str(op))
    prompt = 2 * sample.stack_weights(model.transformer) * 16
    latents = 2 * model.transformer.from_latents.weight.numel() * (3 * 4 + 16)
    needed = sample.image_operations(model.transformer, model.images, Guided(guidance_scale=1.0))
    assert products == needed + prompt + latents


def test_a_bench_of_attention_lays_rows_out_and_covers_every_backend(monkeypatch, capsys, tmp_path):
    layout = layout_of(16, 128, 4, 16)
    assert layout.kinds.shape == (16, 128)
    first = layout.document_ids[0]
    assert torch.bincount(first).tolist() == [32] * 4
    kinds = layout.kinds[0].view(4, 2, 16)
    assert (kinds[:, 0] == BlockKind.TEXT).all() and (kinds[:, 1] == BlockKind.NOISY).all()
    assert len(set(layout.block_ids[0].tolist())) == 8
    small = dataclasses.replace(attention._SIZES["cpu"], tokens=128, row_lengths=(64, 128))
    monkeypatch.setattr(attention, "_SIZES", dict.fromkeys(attention._SIZES, small))
    paths = tmp_path / "f.json", tmp_path / "f.svg"
    asked = ["bench", "attention", "--threads", "1", "--rounds", "1"]
    assert main([*asked, "--json", str(paths[0]), "--plot", str(paths[1])]) == 0
    figures = json.loads(paths[0].read_text())
    backends = {*figures["results"][0]["backends"], *figures["missing"]}
    assert backends == set(backend.Name.__args__) - {"auto"}
    assert ElementTree.parse(paths[1])
    assert figures["machine"]["threads"] == 1
    assert "with backward" in capsys.readouterr().out


def test_a_bench_of_sampling_gives_figures_that_hang_together(
    monkeypatch, tiny_run, tmp_path, capsys
):
    monkeypatch.setattr(sample, "_BATCHES", (1, 3))
    monkeypatch.setattr(sample, "_WIDTHS", (32, 64))
    monkeypatch.setattr(measure, "_PRODUCTS", {"cpu": (64, 1), "cuda": (64, 1)})
    monkeypatch.setattr(measure, "_READ", 2**16)
    grown = {4: Size(1, 1, side=2, width=32), 64: Size(1, 1, side=8, width=32)}
    monkeypatch.setattr(sample, "GROWTH", {"positions": grown})
    path = tmp_path / "made" / "figures.json"
    asked = ["bench", "sample", "--model", str(tiny_run), "--threads", "1", "--rounds", "2"]
    assert main([*asked, "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert [batch["images"] for batch in figures["images"]["batches"]] == [1, 3]
    assert all(batch["share"] > 0 for batch in figures["images"]["batches"])
    points = figures["growth"]["positions"]["points"]
    # on a GPU every group is full, and holds more pictures of few positions
    assert torch.cuda.is_available() or points[1]["bytes"] > points[0]["bytes"]
    assert figures["text"]["weight_bytes"] > 0
    assert "tokens per second" in capsys.readouterr().out


def test_a_bench_of_training_reports_share_memory_and_optimiser(tiny_recipe, tmp_path, capsys):
    """Some records of its data being broken."""
    path = tmp_path / "figures.json"
    lines = [{"text": f"line {i}"} if i % 3 else {} for i in range(30)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    data = f"data.sources={{t: {{type: text, path: {tmp_path / 't.jsonl'}}}}}"
    more = [data, "data.max_caption_tokens=16", "data.max_broken_share=0.9"]
    command = ["bench", "train", str(tiny_recipe), *more, "--rounds", "2"]
    assert main([*command, "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert 0 < figures["optimizer_share"] < 1
    assert figures["peak_bytes"] > 2**20
    assert len(figures["all_rounds"]["flops_per_second"]) == 2
    points = figures["growth"]["rows of a batch"]["points"]
    assert [point["size"] for point in points] == [1, 2]
    assert points[1]["bytes"] > points[0]["bytes"]
    said = capsys.readouterr().out
    assert "peak memory" in said and "rows of a batch (1, 2): time ~ size^" in said


def test_where_growth_has_no_room_the_rest_is_told(tiny_recipe, monkeypatch):
    made = []

    class Watched(Trainer):
        def __init__(self, *arguments):
            made.append(weakref.ref(self))
            super().__init__(*arguments)

    def full(*_):
        assert [one() for one in made] == [None]  # what has been measured leaves room
        raise torch.OutOfMemoryError

    monkeypatch.setattr(train, "Trainer", Watched)
    monkeypatch.setattr(train, "_growth", full)
    figures = train.bench_train(recipe.load(ModelRecipe, tiny_recipe), 1)
    said = train.lines(figures)
    assert figures["share"] > 0 and said[-1].endswith("not measured: the GPU's memory was full")
    assert "<svg" in train.plot(figures)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (["--json", "."], "Is a directory"),
        (["--json", "taken/deeper.json"], "taken"),
        (["--json", "a.json", "--plot", "taken/deeper.svg"], "taken"),
        (["--plot", "a.png"], "name a .svg file"),
    ],
)
def test_where_nothing_can_be_written_nothing_is_measured(
    asked, says, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr(attention, "bench_attention", lambda *_: pytest.fail("measured"))
    assert main(["bench", "attention", *asked]) == 1
    message = capsys.readouterr().err
    assert says in message and message.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
