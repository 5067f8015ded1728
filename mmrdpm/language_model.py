"""A language model's weights in the terms of our transformer: Qwen3 (arXiv 2505.09388, section 2).

The stack differs from ours in its norms' weights, in embeddings that enter as they are and in RoPE,
whose channel pairs are `j` and `j + D / 2`, ours `2 j` and `2 j + 1`: queries and keys are permuted
here. `TransformerConfig` holds the other differences, so that texts score as they did. What the
language model lacks is made here: rows for specials and image codes, and the way in for images.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrdpm import recipe, weights
from mmrdpm.errors import CheckpointError
from mmrdpm.transformer import TransformerConfig, initialise
from mmrdpm.vocabulary import Vocabulary

CONFIG_FILE = "config.json"
_SPARE_ROWS = 1024  # that a table may have beyond its tokeniser: they are padded for speed
_MOST_ROPE_BASE = 1e12
_SPREAD = 0.1  # of new rows around the mean of the old ones, as a share of the old ones' own
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


def _size(most: int = 10_000_000) -> Any:
    return field(metadata={"min": 1, "max": most})


@dataclass(frozen=True, kw_only=True)
class Qwen3Config:
    """The keys of `config.json` that count."""

    hidden_size: int = _size()
    num_hidden_layers: int = _size(1000)
    num_attention_heads: int = _size()
    num_key_value_heads: int = _size()
    head_dim: int = _size()
    intermediate_size: int = _size()
    vocab_size: int = _size()
    rms_norm_eps: float = field(metadata={"min": 0.0})
    tie_word_embeddings: bool = False

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of a checkpoint by its name."""
        width, ffn = self.hidden_size, self.intermediate_size
        q, kv = (n * self.head_dim for n in (self.num_attention_heads, self.num_key_value_heads))
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm": (width,),
            "self_attn.q_proj": (q, width),
            "self_attn.k_proj": (kv, width),
            "self_attn.v_proj": (kv, width),
            "self_attn.q_norm": (self.head_dim,),
            "self_attn.k_norm": (self.head_dim,),
            "self_attn.o_proj": (width, q),
            "post_attention_layernorm": (width,),
            "mlp.gate_proj": (ffn, width),
            "mlp.up_proj": (ffn, width),
            "mlp.down_proj": (width, ffn),
        }
        heads = ["model.embed_tokens"] + ["lm_head"] * (not self.tie_word_embeddings)
        return {
            **{f"{name}.weight": (self.vocab_size, width) for name in heads},
            **{
                f"model.layers.{index}.{name}.weight": shape
                for index in range(self.num_hidden_layers)
                for name, shape in layer.items()
            },
            "model.norm.weight": (width,),
        }


class LanguageModel:
    """A folder with `config.json` and `*.safetensors`, one file or several.

    Attributes:
        config: of the transformer that holds it.

    Raises:
        CheckpointError: its architecture is another one, or `config.json` is damaged.
        RecipeError: a key of `config.json` is missing or of a wrong type.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, path = folder, folder / CONFIG_FILE
        raw = _read(path)
        _check_architecture(raw, path)
        kept = {f.name: raw[f.name] for f in fields(Qwen3Config) if f.name in raw}
        self.shape = recipe.from_dict(Qwen3Config, kept, str(path))
        self.config = _transformer_config(self.shape, _rope_base(raw, path))
        self._ends = [_first(raw.get(f"{name}_token_id")) for name in ("bos", "eos", "pad")]
        self._files: dict[str, Path] = {}

    def check(self, vocabulary: Vocabulary) -> None:
        """Looks at the names and shapes of all tensors, before any is read.

        Raises:
            CheckpointError: a tensor is missing, too many, or of another shape; the weights are
                pickled; the rows of the embedding are not those of the text ids.
        """
        rows, ids = self.shape.vocab_size, vocabulary.text_size
        if not ids <= rows <= ids + _SPARE_ROWS:
            raise CheckpointError(
                f"{self.folder}: its embedding has {rows} rows, the text tokenizer {ids} ids: they"
                " belong to different models"
            )
        files, expected = _index(self.folder), self.shape.shapes()
        unused = {"lm_head.weight"} if self.shape.tie_word_embeddings else set()
        for name, shape in expected.items():
            if name not in files:
                raise CheckpointError(
                    f"{self.folder}: tensor {name!r} is in none of its *.safetensors: files are"
                    " missing, or it is of another architecture"
                )
            path, found = files[name]
            if found != shape:
                raise CheckpointError(
                    f"{path}: tensor {name!r} has shape {list(found)}, by {CONFIG_FILE} it should"
                    f" have {list(shape)}: they belong to different models"
                )
        for name in sorted(files.keys() - expected.keys() - unused):
            raise CheckpointError(
                f"{files[name][0]}: tensor {name!r} has no place in a Qwen3 model: it is of"
                " another architecture"
            )
        self._files = {name: path for name, (path, _) in files.items()}

    def tensor(self, name: str, shape: torch.Size, vocabulary: Vocabulary) -> Tensor:
        """One parameter of ours, float32, of that shape; call `check` first.

        Raises:
            CheckpointError: its file cannot be read.
        """
        if name.startswith(("from_latents", "timesteps", "from_codes", "precision")):
            return self._way_in(name, shape)
        whole = convert(name, self.shape, self._get)
        if name.startswith(("table", "unembedding")):
            return self._enlarged(whole, vocabulary)
        return whole

    def _enlarged(self, rows: Tensor, vocabulary: Vocabulary) -> Tensor:
        """The rows of the text ids, then those of specials and codes, without the spare ones.

        New rows lie close to the mean of the old ones, so that their scores do not drown the old
        ones' (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models").
        Where the model has a token of its own for the beginning, the end or padding, ours begins
        as its copy.
        """
        text = rows[: vocabulary.text_size]
        spread, mean = torch.std_mean(text, dim=0)
        new = mean + _SPREAD * spread * torch.randn(vocabulary.size - len(text), text.shape[1])
        whole = torch.cat([text, new])
        ours = (vocabulary.bos, vocabulary.eos, vocabulary.pad)
        for own, theirs in zip(ours, self._ends, strict=True):
            if theirs is not None and 0 <= theirs < len(text):
                whole[own] = text[theirs]
        return whole

    def _way_in(self, name: str, shape: torch.Size) -> Tensor:
        """Drawn as without a language model, but of the size that its embeddings have."""
        values = torch.empty(shape)
        initialise(name, values)
        return values * self._get("model.embed_tokens.weight").square().mean().sqrt()

    def _get(self, name: str) -> Tensor:
        tensor = weights.tensor(self._files[name], name)
        weights.check_number(tensor, name, self._files[name], torch.float32)
        return tensor.float()


def convert(name: str, shape: Qwen3Config, get: Callable[[str], Tensor]) -> Tensor:
    """One parameter of our stack, tables included, from the tensors of a Qwen3 checkpoint.

    Args:
        name: as in `Transformer.named_parameters`.
        get: gives a tensor of the checkpoint by its name.
    """
    kind, *place = name.removesuffix(".weight").split(".")
    if kind in ("table", "unembedding"):
        return get({"table": "model.embed_tokens", "unembedding": "lm_head"}[kind] + ".weight")
    if kind == "norms":
        return get(_norm(int(place[0]), shape.num_hidden_layers))
    index, part = place
    d = shape.head_dim

    def of(theirs: str) -> Tensor:
        return get(f"model.layers.{index}.{theirs}.weight")

    match part:
        case "qkv":
            q, k, v = (of(f"self_attn.{each}_proj") for each in "qkv")
            return torch.cat([paired(q, d), paired(k, d), v])
        case "q_norm" | "k_norm":
            return paired(of(f"self_attn.{part}"), d)
        case "gate_up":
            return torch.cat([of("mlp.gate_proj"), of("mlp.up_proj")])
        case _:
            return of({"out": "self_attn.o_proj", "down": "mlp.down_proj"}[part])


def paired(rows: Tensor, head_dim: int) -> Tensor:
    """Rows `[H * D, ...]` of heads: channels `j` and `j + D / 2` come to `2 j` and `2 j + 1`."""
    halves = rows.unflatten(0, (-1, 2, head_dim // 2))
    return halves.transpose(1, 2).flatten(0, 2)


def _norm(place: int, layers: int) -> str:
    """The name of the norm at a place in `Transformer.norms`."""
    layer, second = divmod(place, 2)
    if layer == layers:
        return "model.norm.weight"
    kind = "post_attention_layernorm" if second else "input_layernorm"
    return f"model.layers.{layer}.{kind}.weight"


def _transformer_config(shape: Qwen3Config, rope_base: float) -> TransformerConfig:
    return TransformerConfig(
        layers=shape.num_hidden_layers,
        width=shape.hidden_size,
        heads=shape.num_attention_heads,
        kv_heads=shape.num_key_value_heads,
        ffn=shape.intermediate_size,
        attention_width=shape.num_attention_heads * shape.head_dim,
        norm_weights=True,
        norm_eps=shape.rms_norm_eps,
        norm_inputs=False,
        rope="shifted",
        rope_base=rope_base,
        tied=shape.tie_word_embeddings,
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path}: cannot be read ({reason}): get a good copy") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: no mapping of keys: get a good copy")
    return raw


def _check_architecture(raw: dict[str, Any], path: Path) -> None:
    """Refuses what would be computed otherwise than by us."""
    rope = _rope(raw, path)
    found = {
        "model_type": raw.get("model_type"),
        "hidden_act": raw.get("hidden_act", "silu"),
        "attention_bias": raw.get("attention_bias", False),
        "use_sliding_window": raw.get("use_sliding_window", False),
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
    }
    taken = {
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "rope_type": "default",
        "partial_rotary_factor": 1.0,
    }
    for key, value in taken.items():
        if found[key] != value:
            raise CheckpointError(
                f"{path}: {key} is {found[key]!r}: only Qwen3 models with {key} {value!r} can be"
                " taken: choose another one"
            )


def _rope(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """What is said about RoPE, under the name of newer or older versions of transformers."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{path}: rope_parameters is no mapping of keys: get a good copy")
    return rope


def _rope_base(raw: dict[str, Any], path: Path) -> float:
    """Beside the other keys in older versions; their default where it is nowhere."""
    base = _rope(raw, path).get("rope_theta", raw.get("rope_theta", 10_000.0))
    if not (isinstance(base, (int, float)) and 1 <= base <= _MOST_ROPE_BASE):
        raise CheckpointError(
            f"{path}: rope_theta is {base!r}, not a number from 1 to 1e12: get a good copy"
        )
    return float(base)


def _first(ids: Any) -> int | None:
    """The token id of `eos_token_id` and its like: a number, a list of them, or nothing."""
    first = ids[0] if isinstance(ids, list) and ids else ids
    return first if isinstance(first, int) else None


def _index(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """File and shape of every tensor."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        pickled = next((p.name for p in sorted(folder.iterdir()) if p.suffix in _PICKLED), None)
        raise CheckpointError(
            f"{folder}: holds no *.safetensors"
            + (
                f", only pickled weights ({pickled}), which are never loaded: convert them"
                if pickled
                else ": the download is incomplete"
            )
        )
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for path in paths:
        for name, shape in weights.shapes(path).items():
            if name in found:
                raise CheckpointError(
                    f"{folder}: tensor {name!r} is in {found[name][0].name} and in {path.name}:"
                    " move one of the copies away"
                )
            found[name] = path, shape
    return found
