from dataclasses import dataclass, field
from typing import Literal

import pytest

from mmrdpm import recipe
from mmrdpm.cli import main
from mmrdpm.errors import RecipeError


@dataclass(frozen=True)
class Inner:
    lr: float = field(default=0.1, metadata={"min": 0.0})
    steps: int = 5
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Other:
    size: int = 1


@dataclass(frozen=True)
class Outer:
    name: str
    train: Inner = field(default_factory=Inner)
    sizes: tuple[int, ...] = field(default=(1, 2), metadata={"min": 1})
    note: str | None = None
    part: Inner | Other = field(default_factory=Inner)
    shares: dict[str, float] = field(default_factory=dict)


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_what_kind_a_recipe_is_of_is_told_before_its_other_keys(tmp_path):
    path = write(tmp_path, "{size: 3, kind: other}")
    with pytest.raises(RecipeError, match="kind is 'other': choose one of a, b"):
        recipe.load(Inner, path)
    with pytest.raises(RecipeError, match="is of kind 'other', not 'a'"):
        recipe.of_kind(path, "a")
    with pytest.raises(RecipeError, match="unknown key lr:1: YAML wants a space"):
        recipe.load(Inner, write(tmp_path, "lr:1: 2"))


@pytest.mark.parametrize("kind", ["[model]", "{}"])
def test_a_kind_that_is_no_name_is_one_clear_line(kind, tmp_path, capsys):
    path = write(tmp_path, f"kind: {kind}\n")
    assert main(["train", str(path)]) == 1
    assert "its key kind must be 'model'" in capsys.readouterr().err


def test_overrides_win_and_the_dump_reads_back_equal(tmp_path):
    path = write(tmp_path, "name: x\ntrain: {lr: 1}\n")
    loaded = recipe.load(Outer, path, ["train.lr=1e-3", "sizes=[3]", "train.steps=7"])
    assert loaded == Outer("x", Inner(lr=1e-3, steps=7), (3,))
    recipe.dump(loaded, path)
    assert recipe.load(Outer, path) == loaded


def test_a_key_that_yaml_takes_for_a_number_can_be_overridden(tmp_path):
    path = write(tmp_path, "name: x\nshares: {1: 0.5}")
    assert recipe.load(Outer, path, ["shares.1=2"]).shares == {"1": 2.0}


@pytest.mark.parametrize(
    ("text", "override", "parts"),
    [
        ("name: x\ntrain: {stesp: 1}", None, ["train.stesp", "did you mean train.steps?"]),
        ("name: x\ntrain: {steps: 1.5}", None, ["train.steps", "an integer", "1.5"]),
        ("name: x\ntrain: {steps: true}", None, ["train.steps", "an integer"]),
        ("name: x\ntrain: {lr: -1}", None, ["train.lr", "at least 0.0"]),
        ("name: x\ntrain: {kind: c}", None, ["train.kind", "a, b"]),
        ("name: x\ntrain: 3", None, ["train", "mapping"]),
        ("train: {}", None, ["name", "missing"]),
        ("name: [", None, ["not valid YAML"]),
        ("- 1", None, ["mapping"]),
        ("name: x", "train.lr", ["key=value"]),
        ("name: x", "name.deep=1", ["holds no keys"]),
        ("name: x\nsizes: 4", None, ["sizes", "a list"]),
        ("name: x\nsizes: [1, 0]", None, ["sizes[1] is 0", "at least 1"]),
        ("name: x", "part=null", ["part must be a mapping", "nothing"]),
        ("name: x", "shares={a: 1, a: 2}", ["'a' comes twice"]),
        ("name: x\nshares: {1: 0.5, '1': 0.5}", None, ["shares.1 comes twice"]),
        ("name: x", "train.lr=1" + 400 * "0", ["train.lr", "finite"]),
    ],
)
def test_mistakes_are_one_line_that_names_the_place(tmp_path, text, override, parts):
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        recipe.load(Outer, path, [override] if override else [])
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"gone\.yaml"):
        recipe.load(Outer, tmp_path / "gone.yaml")


def test_a_key_that_comes_twice_is_refused(tmp_path):
    path = write(tmp_path, "name: a\nname: b\n")
    with pytest.raises(RecipeError, match="'name' comes twice, again in line 2"):
        recipe.load(Outer, path)


def test_a_part_can_be_merged_into_another(tmp_path):
    text = "a: &shared {x: 1, y: 2}\nb: {<<: *shared, y: 3}\n"
    assert recipe.read(write(tmp_path, text))["b"] == {"x": 1, "y": 3}
    with pytest.raises(RecipeError, match="'y' comes twice, again in line 2"):
        recipe.read(write(tmp_path, text.replace("y: 3", "y: 3, y: 4")))


def test_a_tag_that_does_not_fit_is_told(tmp_path):
    with pytest.raises(RecipeError, match=r"a tag .* does not fit its value: 'foo'"):
        recipe.read(write(tmp_path, "key: !!bool foo\n"))


ODD = ["2024-13-01", "0x_", "[" * 500, "!!bool foo", "!!timestamp foo", "!!int ''"]


@pytest.mark.parametrize("value", ODD)
def test_values_that_yaml_itself_trips_over_are_one_clear_line(value, tmp_path):
    (tmp_path / "r.yaml").write_text(f"key: {value}\n")
    with pytest.raises(RecipeError, match="not valid YAML"):
        recipe.read(tmp_path / "r.yaml")
    (tmp_path / "r.yaml").write_text("key: 1\n")
    with pytest.raises(RecipeError, match="not valid YAML"):
        recipe.read(tmp_path / "r.yaml", [f"key={value}"])


def test_of_overrides_of_one_key_the_last_counts():
    """As where a script has its own, and passes on more."""
    assert recipe.override({"a": 1}, ["a=2", "b.c=1", "a=3"]) == {"a": 3, "b": {"c": 1}}
