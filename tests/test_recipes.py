"""Every shipped recipe and suite fits its schema, and says in its header how to run it."""

import pytest

from mmrdpm import recipe, shipped
from mmrdpm.errors import MmrdpmError
from mmrdpm.evaluation import suite
from mmrdpm.train_model import ModelRecipe
from mmrdpm.train_tokenizer import ImageTokenizerRecipe, TextTokenizerRecipe

SCHEMAS = {"image": ImageTokenizerRecipe, "text": TextTokenizerRecipe, "model": ModelRecipe}
RECIPES = sorted(shipped.folder("recipes").glob("*.yaml"))
SUITES = sorted(shipped.folder("eval").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_shipped_recipe_fits_its_schema(path):
    loaded = recipe.load(SCHEMAS[recipe.read(path)["kind"]], path)
    assert recipe.from_dict(type(loaded), recipe.to_dict(loaded), "again") == loaded
    header = path.read_text().split("kind:")[0]
    assert f"recipes/{path.name}" in header and "Hardware:" in header
    if isinstance(loaded, ModelRecipe):
        shipped.resolve("tokenizers", loaded.tokenizers.image)
        shipped.resolve("tokenizers", loaded.tokenizers.text)


@pytest.mark.parametrize("path", SUITES, ids=lambda p: p.stem)
def test_a_shipped_suite_fits_its_schema(path):
    assert f"--suite {path.stem}" in path.read_text().split("kind:")[0]
    suite.load(path)


def test_shipped_things_are_found_by_name_and_by_path():
    by_name = shipped.resolve("recipes", "emoji_cpu")
    assert by_name == shipped.resolve("recipes", "recipes/emoji_cpu.yaml").resolve()
    with pytest.raises(MmrdpmError, match="did you mean emoji_cpu"):
        shipped.resolve("recipes", "emoji_cpv")
