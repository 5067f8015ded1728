"""Imports go down the house, never up."""

import ast
from pathlib import Path

import mmrdpm
from mmrdpm import shipped

PACKAGE = Path(mmrdpm.__file__).parent

FLOORS = [
    {"errors", "recipe", "shipped", "hub", "machine", "tally", "distributed"},
    {"weights", "rdpm", "text_tokenizer", "vocabulary", "attention"},
    {"document", "positions", "transformer", "objective", "data", "language_model"},
    {"sampling", "optim", "tree", "checkpoint", "monitor", "metrics", "engine", "identity"},
    {"api", "pretrained"},
    {
        "train_tokenizer",
        "tokenizer_trainer",
        "tokenizer_plan",
        "model_recipe",
        "train_model",
        "samples",
        "evaluation",
    },
    {"bench", "export", "quickstart", "sweep", "plan", "dry_run", "doctor"},
    {"cli", "__main__"},
]
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def imports(path):
    """The names right under `mmrdpm` that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mmrdpm"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("mmrdpm."))


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path != PACKAGE / "__init__.py" and "_shipped" not in path.parts:
            yield path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path


def test_every_module_has_a_floor_and_every_floor_its_modules():
    assert {name for name, _ in modules()} == set(FLOOR)


def test_imports_go_down_or_stay_on_the_floor_without_circles():
    edges = {name: set() for name in FLOOR}
    for name, path in modules():
        for imported in set(imports(path)) - {name}:
            assert FLOOR[imported] <= FLOOR[name], f"{path} imports {imported}, which is above it"
            edges[name].add(imported)
    done: set[str] = set()
    while free := {n for n in edges if n not in done and edges[n] <= done}:
        done |= free
    assert done == set(edges), f"circle among {set(edges) - done}"


def test_only_one_module_knows_each_tokeniser_library():
    for name, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            found = []
            if isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path}: a relative import, which the floors do not see"
                found = [node.module]
            elif isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            roots = {module.split(".")[0] for module in found}
            assert name == "text_tokenizer" or not roots & {"sentencepiece", "tokenizers"}, path


def test_the_shipped_folders_hold_no_python():
    for kind in ("tokenizers", "recipes", "eval", "models"):
        assert shipped.folder(kind).is_dir() and not list(shipped.folder(kind).rglob("*.py"))
