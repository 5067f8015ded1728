"""`model.init_from`: the weights of a Qwen3 language model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmrdpm
from mmrdpm import hub, pretrained, recipe, text_tokenizer
from mmrdpm.cli import main
from mmrdpm.data.emoji import load_emoji
from mmrdpm.document import TextSegment, pack
from mmrdpm.errors import CheckpointError, MmrdpmError, RecipeError
from mmrdpm.language_model import LanguageModel, convert, paired
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.positions import rotate, shifted_rotations
from mmrdpm.sampling.text import sample_text
from mmrdpm.train_model import Trainer, train
from mmrdpm.transformer import Transformer, TransformerConfig
from mmrdpm.vocabulary import Vocabulary

transformers = pytest.importorskip("transformers")

ADDED = ("<|endoftext|>", "<|im_end|>")
ENDS = {"bos_token_id": None, "eos_token_id": 320, "pad_token_id": 321}


def make_model(folder, tied=True, shard="1GB", **changes):
    """A tiny Qwen3 with random weights, norms included, as transformers saves it."""
    torch.manual_seed(1)
    config = transformers.Qwen3Config(
        **{
            "vocab_size": 328,  # six spare rows
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "intermediate_size": 48,
            "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
            **ENDS,
            **changes,
        }
    )
    model = transformers.Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = 0.3 if "norm" in name else 0.15
            parameter.add_(size * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=shard)
    texts = text_tokenizer.train_bpe(load_emoji(16).names, 320)
    texts.model.add_special_tokens([ADDED[0]])
    texts.model.add_tokens([ADDED[1]])
    texts.save(folder)
    return model


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def both(request, tmp_path_factory):
    """Qwen3 by transformers, and its folder; the untied one in several files."""
    folder = tmp_path_factory.mktemp("qwen")
    return make_model(folder, request.param, "1GB" if request.param else "20KB"), folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    make_model(folder)
    return folder


@pytest.fixture
def copy(qwen, tmp_path):
    """A copy of the folder to damage."""
    return shutil.copytree(qwen, tmp_path / "copy")


def begun(folder, codes=16, **changes):
    """Our transformer that holds it, its vocabulary and tokeniser."""
    texts = text_tokenizer.load(folder)
    vocabulary = Vocabulary(texts.size, codes)
    config = LanguageModel(folder).config
    model = Transformer(config, vocabulary.size, latent_channels=4, num_timesteps=3)
    pretrained.begin(model, str(folder), vocabulary, texts)
    return model, vocabulary, texts


def rows_of(ids, vocabulary, length=None):
    return pack([[[TextSegment(tuple(ids))]]], length or len(ids), vocabulary, 4, 2)


def changed(path, **keys):
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@torch.no_grad()
def test_text_scores_as_it_did(both):
    theirs, folder = both
    ours, vocabulary, texts = begun(folder)
    for seed in range(3):
        ids = torch.randint(320, (40,), generator=torch.Generator().manual_seed(seed))
        expected = theirs(ids[None]).logits[0, :, : texts.size]
        hidden = ours(rows_of(ids.tolist(), vocabulary))[0]
        assert expected.std() > 0.3  # so that agreement says something
        torch.testing.assert_close(
            ours.logits(hidden, slice(texts.size)), expected, atol=1e-5, rtol=0
        )


@torch.no_grad()
def test_a_text_continues_greedily_to_the_same_ids(both):
    theirs, folder = both
    ours, vocabulary, texts = begun(folder)
    ids = texts.encode("red heart and a snowman")
    how = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones(1, len(ids), dtype=torch.int64)
    spare = {"suppress_tokens": list(range(texts.size, 328))}
    expected = theirs.generate(torch.tensor([ids]), attention_mask=mask, **how, **spare)
    found = sample_text(ours, vocabulary, rows_of(ids, vocabulary), 24)
    assert len(set(found)) > 3
    assert found == expected[0, len(ids) :].tolist()


@torch.no_grad()
def test_documents_packed_into_one_row_score_as_alone(qwen):
    """Relative positions only: a document's place in a row does not count."""
    ours, vocabulary, _ = begun(qwen)
    first, second = [5, 6, 7, 8], [9, 10, 11]
    row = pack([[[TextSegment(tuple(ids))] for ids in (first, second)]], 8, vocabulary, 4, 2)
    alone = ours(rows_of(second, vocabulary))[0]
    torch.testing.assert_close(ours(row)[0, 4:7], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("table.weight", lambda get: get("model.embed_tokens.weight")),
        ("unembedding.weight", lambda get: get("lm_head.weight")),
        ("norms.0.weight", lambda get: get("model.layers.0.input_layernorm.weight")),
        ("norms.3.weight", lambda get: get("model.layers.1.post_attention_layernorm.weight")),
        ("norms.4.weight", lambda get: get("model.norm.weight")),
        ("attentions.1.out.weight", lambda get: get("model.layers.1.self_attn.o_proj.weight")),
        ("feed_forwards.1.down.weight", lambda get: get("model.layers.1.mlp.down_proj.weight")),
    ],
)
def test_what_is_taken_as_it_is(both, name, expected):
    theirs, folder = both
    tensors = theirs.state_dict()
    found = convert(name, LanguageModel(folder).shape, tensors.__getitem__)
    assert found is expected(tensors.__getitem__)


def test_what_is_joined_and_permuted(both):
    """Gate before up; of queries and keys, channels j and j + 8 of a head side by side."""
    theirs, folder = both
    tensors, shape = theirs.state_dict(), LanguageModel(folder).shape

    def ours(name):
        return convert(name, shape, tensors.__getitem__)

    gate_up = ours("feed_forwards.0.gate_up.weight")
    assert torch.equal(gate_up[:48], tensors["model.layers.0.mlp.gate_proj.weight"])
    assert torch.equal(gate_up[48:], tensors["model.layers.0.mlp.up_proj.weight"])
    qkv = ours("attentions.0.qkv.weight")
    q, k, v = (tensors[f"model.layers.0.self_attn.{n}_proj.weight"] for n in "qkv")
    assert torch.equal(qkv[16 + 2], q[16 + 1]) and torch.equal(qkv[16 + 3], q[16 + 1 + 8])
    assert torch.equal(qkv[64 + 14], k[7]) and torch.equal(qkv[64 + 15], k[15])
    assert torch.equal(qkv[96:], v)
    norm = tensors["model.layers.0.self_attn.k_norm.weight"]
    assert torch.equal(ours("attentions.0.k_norm"), norm[[i // 2 + 8 * (i % 2) for i in range(16)]])


def test_permuted_channels_turn_as_the_halves_do():
    """A slow reference: the rotation of halves (as in GPT-NeoX), channel by channel."""
    torch.manual_seed(0)
    x, d, position, base = torch.randn(8), 8, 11, 100.0
    expected = torch.empty(d)
    for j in range(d // 2):
        angle = torch.tensor(position * base ** (-2 * j / d))
        a, b = x[j], x[j + d // 2]
        expected[j] = a * angle.cos() - b * angle.sin()
        expected[j + d // 2] = a * angle.sin() + b * angle.cos()
    turn = shifted_rotations(torch.tensor([[[position, 0, 0]]]), d, base)
    turned = rotate(paired(x, d)[None, None, None], turn)[0, 0, 0]
    torch.testing.assert_close(turned, paired(expected, d))


def test_places_of_an_image_shift_half_of_the_pairs():
    """Pairs 0, 2, 4, ... turn with the slot; 1, 5, ... with the row too, 3, 7, ... the column."""

    def angles(*position):
        return shifted_rotations(torch.tensor([[[*position]]]), 16, 10.0)[0, 0, 0]

    text, there = angles(3, 0, 0), angles(3, 2, 5)
    assert torch.equal(there[0::2], text[0::2])
    torch.testing.assert_close(there[1::4], angles(5, 0, 0)[1::4])
    torch.testing.assert_close(there[3::4], angles(8, 0, 0)[3::4])


def test_new_rows_are_unlikely_and_the_ends_are_copies(both):
    theirs, folder = both
    model, vocabulary, texts = begun(folder)
    table = model.table.weight
    assert texts.size == 322 and len(table) == 322 + 8 + 16
    assert torch.equal(table[:322], theirs.get_input_embeddings().weight[:322])
    assert torch.equal(table[vocabulary.eos], table[320])
    assert torch.equal(table[vocabulary.pad], table[321])
    new, old = table[vocabulary.code_offset :], table[:322]
    assert (new - old.mean(0)).abs().mean() < 0.2 * (old - old.mean(0)).abs().mean()
    assert new.std(0).min() > 0  # no two alike
    hidden = model(rows_of(range(40), vocabulary))[0]
    likelihood = model.logits(hidden).softmax(-1)[:, vocabulary.code_offset :].sum(-1)
    assert likelihood.max() < 16 / 322


def test_image_positions_enter_at_the_size_of_the_text(qwen):
    model, _, _ = begun(qwen)
    ids, latents = torch.arange(300)[None], torch.randn(1, 300, 8)
    places = torch.zeros(1, 300, 3, dtype=torch.int64)
    text = model.embed(ids, torch.zeros_like(latents), torch.full_like(ids, -1), places)
    image = model.embed(ids, latents, torch.ones_like(ids), places)
    assert 0.5 < (image.square().mean() / text.square().mean()).sqrt() < 2


def test_text_that_looks_like_an_added_token_stays_text(qwen):
    texts = text_tokenizer.load(qwen)
    assert texts.size == 322
    for text in ("a<|endoftext|>b", "<|im_end|>"):
        ids = texts.encode(text)
        assert max(ids) < 320 and texts.decode(ids) == text
    assert texts.decode([320, 321]) == "".join(ADDED)


def test_a_run_begins_with_it_then_loads_and_goes_on_without_it(
    copy, tmp_path, capsys, recipe_from
):
    path, run = recipe_from(copy), tmp_path / "run"
    assert main(["train", str(path), "--run", str(run)]) == 0
    assert f"weights of {copy}" in " ".join(capsys.readouterr().err.split())
    assert sorted(p.name for p in (run / "tokenizers" / "text").iterdir()) == ["tokenizer.json"]
    copy.rename(tmp_path / "gone")
    model = mmrdpm.load(run)
    assert model.texts.size == 322 and model.transformer.config.norm_weights
    assert model.generate(["red heart"])[0].size == (16, 16)
    assert model.complete("red").startswith("red")
    last = run / "step-0000004.safetensors"
    whole = last.read_bytes()
    last.unlink()
    assert main(["train", str(path), "--run", str(run), "--resume"]) == 0
    assert last.read_bytes() == whole


def test_weights_and_their_average_begin_as_the_origin(qwen, tmp_path, recipe_from):
    path = recipe_from(qwen)
    loaded = recipe.load(ModelRecipe, path, ["train.ema=0.9"])
    trainer = Trainer(pretrained.complete(loaded), tmp_path / "run")
    tensors = load_file(qwen / "model.safetensors")
    norm = tensors["model.norm.weight"]
    assert torch.equal(trainer.transformer.norms[4].weight.cpu(), norm)
    assert torch.equal(trainer.average.tensors["norms.4.weight"].cpu(), norm)


def test_a_shape_is_left_out_or_that_of_the_origin(qwen, recipe_from):
    config = LanguageModel(qwen).config
    bare = recipe.load(ModelRecipe, recipe_from(qwen))
    done = pretrained.complete(bare)
    assert (done.model.layers, done.model.attention_width) == (2, 64)
    assert pretrained.complete(done) == done and pretrained.lacks_shape(bare.model)
    assert done.tokenizers.text == str(qwen) and done.model.tied == config.tied
    wrong = recipe.load(ModelRecipe, recipe_from(qwen, layers=3))
    with pytest.raises(RecipeError, match=r"layers 2 \(the recipe: 3\)"):
        pretrained.complete(wrong)


@pytest.mark.parametrize("text", ["tiny", "emoji-bpe-4k"])  # the latter is the default
def test_another_text_tokenizer_is_refused(text, qwen, tiny_tokenizers, tmp_path, recipe_from):
    path = recipe_from(qwen)
    name = tiny_tokenizers / "text" if text == "tiny" else text
    loaded = recipe.load(ModelRecipe, path, [f"tokenizers.text={name}"])
    with pytest.raises(CheckpointError, match=r"leave tokenizers\.text out"):
        train(loaded, tmp_path / "run")


def drop(name):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    return damage


def put(name, tensor):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        save_file({**tensors, name: tensor}, folder / "model.safetensors")

    return damage


def pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def twice(folder):
    shutil.copy(folder / "model.safetensors", folder / "model-2.safetensors")


def config(**keys):
    return lambda folder: changed(folder / "config.json", **keys)


MLP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (drop(MLP), rf"{MLP}' is in none of its \*\.safetensors"),
        (
            put("model.layers.0.self_attn.q_proj.bias", torch.zeros(64)),
            "q_proj.bias.* no place",
        ),
        (put(MLP, torch.zeros(3, 4)), r"has shape \[3, 4\], by config.json .*\[48, 32\]"),
        (pickle, r"pickled weights \(pytorch_model.bin\), which are never loaded"),
        (truncate, "not a readable safetensors file"),
        (twice, "is in model-2.safetensors and in model.safetensors"),
        (config(model_type="llama"), "model_type is 'llama': only Qwen3"),
        (config(attention_bias=True), "attention_bias is True"),
        (config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), "rope_type is 'yarn'"),
        (config(rope_parameters="default"), "rope_parameters is no mapping"),
        (config(rope_parameters={"rope_theta": "big"}), "rope_theta is 'big'"),
        (config(rope_parameters={"rope_theta": 10**400}), "not a number from 1 to 1e12"),
        (config(head_dim=15), "a head has 15 channels"),
        (config(hidden_size="32"), "hidden_size must be an integer"),
        (config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000"),
        (config(vocab_size=300), "its embedding has 300 rows, the text tokenizer 322 ids"),
        (config(vocab_size=5000), "its embedding has 5000 rows, the text tokenizer 322 ids"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: cannot be read"),
        (lambda f: (f / "config.json").write_text("[]"), "config.json: no mapping of keys"),
        (lambda f: (f / "config.json").unlink(), "neither a run .* nor a language model"),
        (lambda f: (f / "tokenizer.json").unlink(), "neither tokenizer.json nor"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "not a readable text tokeniser"),
    ],
)
def test_what_cannot_be_taken_is_said_in_one_line(
    damage, said, copy, tmp_path, capsys, recipe_from
):
    path = recipe_from(copy)
    damage(copy)
    assert main(["train", str(path), "--run", str(tmp_path / "run")]) == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message and len(message.splitlines()) == 1
    with pytest.raises(MmrdpmError, match=said):
        raise MmrdpmError(message)


def test_names_that_are_no_folder_are_asked_of_the_hub(monkeypatch, qwen):
    asked = []

    def snapshot(name, allow_patterns):
        asked.append((name, allow_patterns))
        if name == "who/gone":
            raise OSError("404: no such repository")
        return str(qwen)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert hub.resolve("models", "who/tiny-qwen", ["*.json"]) == qwen
    assert asked == [("who/tiny-qwen", ["*.json"])]
    with pytest.raises(CheckpointError, match=r"who/gone: no such folder here.*404"):
        hub.resolve("models", "who/gone", [])
    for name in ("emoji-tinny", "../no-such-folder", "models/none"):
        with pytest.raises(MmrdpmError, match="no such path"):
            hub.resolve("models", name, [])
    assert len(asked) == 2


def test_plan_fits_a_bare_recipe(qwen, capsys, recipe_from):
    path = recipe_from(qwen)
    assert main(["plan", str(path), "--kind", "h100"]) == 0
    parameters = sum(p.numel() for p in begun(qwen)[0].parameters())
    assert f"{parameters:,}" in capsys.readouterr().out


@pytest.mark.parametrize(("channels", "says"), [(15, "in pairs"), (6, "8 to tell slots, rows")])
def test_a_head_that_rope_cannot_turn_is_refused(channels, says):
    with pytest.raises(RecipeError, match=f"a head has {channels} channels, but .* {says}"):
        TransformerConfig(width=64, heads=4, kv_heads=4, attention_width=4 * channels)
