"""Files made to do harm, or by who did not know better: one line says what is wrong."""

import io
import json
import shutil
import tarfile

import pytest
import tokenizers
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from tokenizers import models, pre_tokenizers
from torch import nn

from mmrdpm import api, recipe, shipped, text_tokenizer, weights
from mmrdpm.cli import main
from mmrdpm.data.records import DAMAGED_SHARD, Broken
from mmrdpm.data.sources.cached import Manifest
from mmrdpm.data.sources.webdataset import Shards
from mmrdpm.errors import CheckpointError, RecipeError, printable
from mmrdpm.identity import check_identity
from mmrdpm.model_recipe import ModelRecipe

ESCAPE = "\x1b[31m"


@pytest.fixture
def spec(tmp_path):
    """That of a shipped text tokeniser, and what loads it when it is changed."""
    source = shipped.resolve("tokenizers", "emoji-bpe-4k") / "tokenizer.json"
    content = json.loads(source.read_text())

    def load():
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        return text_tokenizer.load(tmp_path)

    return content, load


def test_merges_that_a_file_drops_at_random_are_not_dropped(spec):
    content, load = spec
    whole = load().encode("red paper lantern")
    content["model"]["dropout"] = 0.5
    tokenizer = load()
    assert all(tokenizer.encode("red paper lantern") == whole for _ in range(8))


def test_a_token_with_an_id_beyond_all_others_is_refused(spec):
    """The library would make a table of all ids, and end the process where that does not fit."""
    content, load = spec
    content["model"]["vocab"]["zzz"] = 4_000_000_000
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: .*'zzz' has id 4000000000"):
        load()


@pytest.mark.parametrize("kind", ["no byte a", "words", "unknown words", "nothing"])
def test_a_tokeniser_that_loses_text_is_refused(kind, tmp_path):
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {letter: i for i, letter in enumerate(sorted({*letters} - {"a"}))}
    model = {
        "no byte a": lambda: models.BPE(vocab=vocabulary, merges=[]),
        "words": lambda: models.WordLevel({"hello": 0, "[UNK]": 1}, unk_token="[UNK]"),
        "unknown words": lambda: models.WordLevel({"hello": 0}, unk_token="[UNK]"),
        "nothing": lambda: models.BPE(vocab={}, merges=[]),
    }[kind]()
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json: (texts do not survive|not a read)"
    ):
        text_tokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"weight": torch.full((2, 3), 1e300, dtype=torch.float64)}, "not finite"),
        ({"weight": torch.zeros(2, 3, dtype=torch.complex64)}, "'weight' is of complex64"),
        ({"weight": torch.zeros(2, 3, dtype=torch.bool)}, "'weight' is of bool"),
        ({"weight": torch.zeros(2, 3).to(torch.float8_e4m3fn)}, "'weight' is of float8_e4m3fn"),
        ({"weight": torch.zeros(2, 3), "other.int8_scale": torch.ones(2)}, "of no tensor"),
        (
            {
                "weight": torch.zeros(2, 3, dtype=torch.int8),
                "weight.int8_scale": torch.ones(2, dtype=torch.bool),
            },
            "does not fit its factors",
        ),
        (
            {"weight": torch.zeros(6, dtype=torch.int8), "weight.int8_scale": torch.ones(6)},
            "does not fit its factors",
        ),
    ],
)
def test_weights_of_other_numbers_are_refused(tensors, says, tmp_path):
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=says):
        weights.load_into(nn.Linear(3, 2, bias=False), tmp_path / "w.safetensors")


@pytest.mark.parametrize("tokenizers", [[1], None, {"image": 5}])
def test_a_header_that_does_not_tell_its_tokenisers_is_refused(tokenizers, tiny_run, tmp_path):
    model = api.load(tiny_run)
    path = tmp_path / "w.safetensors"
    weights.save({"w": torch.zeros(1)}, path, {"tokenizers": tokenizers})
    with pytest.raises(CheckpointError, match="does not tell its tokenisers"):
        check_identity(path, model.images, model.texts)


@pytest.mark.parametrize(
    ("file", "section", "size"),
    [
        ("recipe.yaml", "model", {"ffn": 4096}),
        ("recipe.yaml", "model", {"layers": 40}),
        ("tokenizers/image/tokenizer.yaml", "autoencoder", {"widths": [8, 512]}),
    ],
)
def test_a_recipe_cannot_ask_for_more_weights_than_come_with_it(
    file, section, size, tiny_run, tmp_path
):
    """Their shapes are compared once they are built: too late where there is no memory for them."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_run, folder)
    mapping = yaml.safe_load((folder / file).read_text())
    mapping[section] |= size
    (folder / file).write_text(yaml.safe_dump(mapping))
    with pytest.raises(CheckpointError, match=r"safetensors: the recipe beside it asks for more"):
        api.load(folder)


def png():
    stream = io.BytesIO()
    Image.new("RGB", (12, 8)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path, members, **headers):
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(content), headers
            archive.addfile(member, io.BytesIO(content))
    return Shards(str(path))


def test_a_member_said_to_be_larger_than_all_there_is_ends_its_shard(tmp_path):
    members = [("a.txt", b"one"), ("a.png", png())]
    found = list(write_tar(tmp_path / "s.tar", members, size=str(2**60)).shard(0))
    assert [record.cause for record in found if isinstance(record, Broken)][-1] == DAMAGED_SHARD


def test_a_member_that_comes_twice_is_told(tmp_path):
    members = [("a.png", png()), ("a.txt", b"one"), ("a.txt", b"two"), ("b.png", png())]
    (first, _) = write_tar(tmp_path / "s.tar", members).shard(0)
    assert isinstance(first, Broken) and first.cause == "a member comes twice"


def test_nothing_in_a_name_or_a_caption_steers_the_terminal(tmp_path, capsys):
    assert printable(f"a{ESCAPE}\nb\u202e é 👩\u200d🚀") == r"a\x1b[31m\nb\u202e é 👩" + "\u200d🚀"
    assert main(["caption", f"nofile{ESCAPE}\n"]) == 1
    said = capsys.readouterr().err
    assert ESCAPE not in said and r"nofile\x1b[31m\n" in said and said.count("\n") == 1
    name = f"a{ESCAPE}\nproblems: none"
    Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png")
    (tmp_path / f"{name}.txt").write_text(f"red{ESCAPE}\x07")
    assert main(["data", "inspect", str(tmp_path)]) == 0
    assert not set("\x1b\x07") & set(capsys.readouterr().out)


def test_an_override_changes_its_own_key_alone(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("data:\n  sources:\n    a: &a {type: text, path: x, weight: 0.5}\n    b: *a\n")
    sources = recipe.read(path, ["data.sources.b.path=y"])["data"]["sources"]
    assert [sources[name]["path"] for name in "ab"] == ["x", "y"]


@pytest.mark.parametrize("key", ["model.width", "model.layers", "train.warmup"])
def test_a_whole_number_beyond_all_use_is_refused(key, tiny_recipe):
    with pytest.raises(RecipeError, match=rf"{key} is 1{'0' * 30}: it must be .* at most"):
        recipe.load(ModelRecipe, tiny_recipe, [f"{key}=1{'0' * 30}"])


def test_a_manifest_of_more_shards_than_can_be_is_refused():
    keys = {"autoencoder": "a", "tokenizer": "t", "source": "s", "per_shard": 1, "buckets": False}
    with pytest.raises(RecipeError, match="shards is 1000000000000"):
        recipe.from_dict(Manifest, {**keys, "shards": 10**12}, "manifest.json")
