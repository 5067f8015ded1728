"""Text <-> ids, lossless: byte-level BPE or SentencePiece behind one small interface.

The only importer of `tokenizers` and `sentencepiece`. No special tokens live here: a text that
looks like one ("<|bos|>") is encoded as plain text, and the vocabulary owns the real ones.
"""

from __future__ import annotations

import hashlib
import io
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import chain, dropwhile
from pathlib import Path
from typing import ClassVar

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mmrdpm.errors import CheckpointError, DataError, RecipeError

_LONGEST_TEXT = 2**30  # bytes; SentencePiece would leave out longer than 4,192 without a word
_SPARE_IDS = 1024  # that the numbering of tokens may leave out
_PROBE_CODES = (
    *(*range(0xC0), *range(0xC0, 0x800, 0x40)),
    *(0x800, *range(0x1000, 0xD001, 0x1000), 0xE000, 0xF000),
    *range(0x10000, 0x100001, 0x30000),
)
_PROBE = "".join(map(chr, _PROBE_CODES))  # has every byte that UTF-8 has
FILES = ("tokenizer.json", "tokenizer.model")
"""What a text tokeniser's folder holds, one of the two."""


class TextTokenizer(ABC):
    """Any Unicode string survives `decode(encode(text))` byte for byte, see `BPE` for one limit."""

    file_name: str

    @property
    @abstractmethod
    def size(self) -> int:
        """The number of ids, 0..size-1."""

    @abstractmethod
    def serialise(self) -> bytes:
        """The model file's content."""

    @abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text.

        Raises:
            DataError: the text holds a lone surrogate, which is no Unicode text.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"text {text[:40]!r}: character {error.start} is a lone surrogate, not Unicode"
                " text: remove it"
            ) from None
        return self._encode(text)

    def normalised(self, text: str) -> str:
        """What a text comes back as."""
        return text

    def fingerprint(self) -> str:
        """SHA-256 of the model file, as hexadecimal digits."""
        return hashlib.sha256(self.serialise()).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes the model file into a folder, which is made if missing."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.file_name).write_bytes(self.serialise())


class BPE(TextTokenizer):
    """Byte-level byte-pair encoding (GPT-2), by the library `tokenizers`.

    The file may come with a language model. The tokens that were added to its BPE (`<|im_end|>`)
    keep their ids, but no text is encoded as one. If the file normalises (Qwen's: to NFC), so does
    `encode`, and what `decode` gives is the normalised text.
    """

    file_name = "tokenizer.json"

    def __init__(self, model: tokenizers.Tokenizer) -> None:
        self.model = model
        self._plain = _without_added_tokens(model)
        self._size = 1 + max(model.get_vocab().values(), default=-1)

    @property
    def size(self) -> int:
        return self._size

    def serialise(self) -> bytes:
        return self.model.to_str(pretty=True).encode()

    def normalised(self, text: str) -> str:
        normaliser = self.model.normalizer
        return normaliser.normalize_str(text) if normaliser else text

    def _encode(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.model.decode(list(ids), skip_special_tokens=False)


class SentencePiece(TextTokenizer):
    """A SentencePiece model with byte fallback.

    SentencePiece writes a space as U+2581 and so cannot tell the two apart; the text is escaped
    at the boundary with two private-use characters, which keeps every string distinct.
    """

    file_name = "tokenizer.model"

    _ESCAPES: ClassVar[dict[str, str]] = {"\ue000": "\ue000a", "\u2581": "\ue000b", "\0": "\ue000c"}

    def __init__(self, model: bytes) -> None:
        self._bytes = model
        self.model = sentencepiece.SentencePieceProcessor(model_proto=model)

    @property
    def size(self) -> int:
        return self.model.get_piece_size()

    def serialise(self) -> bytes:
        return self._bytes

    def _encode(self, text: str) -> list[int]:
        return self.model.encode(self._escape(text))

    def decode(self, ids: Iterable[int]) -> str:
        return self._unescape(self.model.decode(list(ids)))

    @classmethod
    def _escape(cls, text: str) -> str:
        return "".join(cls._ESCAPES.get(character, character) for character in text)

    @classmethod
    def _unescape(cls, text: str) -> str:
        for plain, escaped in reversed(cls._ESCAPES.items()):
            text = text.replace(escaped, plain)
        return text


def _without_added_tokens(model: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same tokeniser, to which text that looks like an added token is plain text.

    Texts keep their length too, and are always the same ids: a file may say that they are cut, or
    filled up, or that merges are dropped at random.
    """
    spec = {**json.loads(model.to_str()), "added_tokens": [], "truncation": None, "padding": None}
    if "dropout" in spec["model"]:
        spec["model"]["dropout"] = None
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def load(folder: Path) -> TextTokenizer:
    """The text tokeniser saved in a folder.

    Raises:
        CheckpointError: there is none, its file is damaged, or texts do not survive it.
    """
    bpe, piece = folder / BPE.file_name, folder / SentencePiece.file_name
    path = bpe if bpe.is_file() else piece
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: neither {BPE.file_name} nor {SentencePiece.file_name}: it is the folder of"
            " no text tokeniser: name another"
        )
    try:
        found = _bpe(path.read_text(encoding="utf-8")) if path == bpe else _piece(path)
        expected, back = found.normalised(_PROBE), found.decode(found.encode(_PROBE))
    except Exception as error:  # both libraries raise bare exceptions for a damaged file
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path}: not a readable text tokeniser: {reason}") from None
    if back != expected:
        pairs = zip(expected, f"{back}\0", strict=False)
        lost = next((a for a, b in pairs if a != b), expected[-1:])
        raise CheckpointError(
            f"{path}: texts do not survive it, such as those with {lost!r}: take a byte-level BPE,"
            " or SentencePiece with byte fallback and no normalisation"
        )
    return found


def _bpe(content: str) -> BPE:
    """Raises ValueError for token ids so large that tables of all ids would not fit anywhere."""
    spec = json.loads(content)
    vocabulary = spec["model"]["vocab"]
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    ids |= {token["content"]: token["id"] for token in spec.get("added_tokens") or ()}
    most = max(len(ids), len(vocabulary)) + _SPARE_IDS
    for token, number in ids.items():
        if number >= most:
            raise ValueError(f"token {token!r} has id {number}, but there are only {len(ids)}")
    return BPE(tokenizers.Tokenizer.from_str(content))


def _piece(path: Path) -> SentencePiece:
    return SentencePiece(path.read_bytes())


def _from_the_first_word(texts: Iterable[str]) -> Iterator[str]:
    """The texts without blank ones before the first that is not, which must be there."""
    rest = dropwhile(lambda text: not text.strip(), texts)
    first = next(rest, None)
    if first is None:
        raise DataError("there are no texts to learn a tokeniser from: name sources that hold some")
    return chain([first], rest)


def train_bpe(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Byte-level BPE of at most `vocab_size` ids (at least the 256 bytes).

    Raises:
        DataError: there are no texts, or blank ones alone.
    """
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(_from_the_first_word(texts), trainer)
    return BPE(model)


def train_sentencepiece(texts: Iterable[str], vocab_size: int) -> TextTokenizer:
    """SentencePiece BPE of `vocab_size` ids with byte fallback and no normalisation.

    Raises:
        DataError: there are no texts, or blank ones alone.
        RecipeError: there are not ids enough for bytes and characters.
    """
    model = io.BytesIO()
    # all at once: what is wrong with them should not be told by the library's own errors
    texts = [*_from_the_first_word(texts)]
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(SentencePiece._escape(text) for text in texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            hard_vocab_limit=False,
            bos_id=-1,
            eos_id=-1,
            num_threads=1,
            max_sentence_length=_LONGEST_TEXT,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise RecipeError(
            f"vocab_size {vocab_size}: SentencePiece gave up"
            f" ({' '.join(str(error).split())[:160]}): raise it if it is too small, or look at the"
            " texts"
        ) from None
    return SentencePiece(model.getvalue())
