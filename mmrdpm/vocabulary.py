"""One id space: `[ text ids | special ids | image code ids ]`, contiguous.

All arithmetic between text ids, code indices and token ids lives here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from torch import Tensor

from mmrdpm.errors import CheckpointError

SPECIALS = (
    "<|bos|>",
    "<|eos|>",
    "<|pad|>",
    "<|image|>",
    "<|/image|>",
    "<|system|>",  # for chats, as the next two: unused, but shipped weights have their rows
    "<|user|>",
    "<|assistant|>",
)


@dataclass(frozen=True)
class Vocabulary:
    """The sizes of the two learned parts; everything else follows."""

    text_size: int
    codebook_size: int

    def special(self, name: str) -> int:
        """The token id of one of `SPECIALS`."""
        return self.text_size + SPECIALS.index(name)

    @property
    def bos(self) -> int:
        return self.special("<|bos|>")

    @property
    def eos(self) -> int:
        return self.special("<|eos|>")

    @property
    def pad(self) -> int:
        return self.special("<|pad|>")

    @property
    def image_start(self) -> int:
        return self.special("<|image|>")

    @property
    def image_end(self) -> int:
        return self.special("<|/image|>")

    @property
    def code_offset(self) -> int:
        """The token id of code index 0."""
        return self.text_size + len(SPECIALS)

    @property
    def size(self) -> int:
        return self.code_offset + self.codebook_size

    def prompt(self, caption: Iterable[int] = ()) -> tuple[int, ...]:
        """What an image follows: its caption where it is to be drawn, none where it is read."""
        return (self.bos, *caption, self.image_start)

    def caption(self, text: Iterable[int], whole: bool = True) -> tuple[int, ...]:
        """What follows an image that was read; a text that was cut has no end."""
        return (self.image_end, *text, *((self.eos,) if whole else ()))

    def code_token_ids(self, code_indices: Tensor) -> Tensor:
        """Code indices 0..K-1 -> token ids."""
        return code_indices + self.code_offset

    def check_same(self, other: Vocabulary, where: str) -> None:
        """Raises CheckpointError naming both sides unless they are equal."""
        if self != other:
            raise CheckpointError(
                f"{where}: the weights have {other.text_size} text ids and {other.codebook_size}"
                f" image codes, the tokenizers {self.text_size} and {self.codebook_size}: they"
                " belong to different models"
            )

    def to_dict(self) -> dict[str, int]:
        return asdict(self)
