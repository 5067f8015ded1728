"""What weights say of the tokenizers that they belong to."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from mmrdpm import recipe, weights
from mmrdpm.data.cache import fingerprint
from mmrdpm.errors import CheckpointError, DamagedError
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer
from mmrdpm.text_tokenizer import TextTokenizer
from mmrdpm.vocabulary import Vocabulary

_STEPS = ("num_timesteps", "schedule", "trajectory", "eta", "codebook_sizes")


def identity(images: ImageTokenizer, texts: TextTokenizer) -> dict[str, Any]:
    """What weights say in their file's header about the tokenizers that they belong to."""
    return {
        "vocabulary": Vocabulary(texts.size, images.codebook_size).to_dict(),
        "tokenizers": {"image": codes_sha256(images), "text": texts.fingerprint()},
        "steps": steps_of(images),
    }


def codes_sha256(images: ImageTokenizer) -> str:
    """Of an image tokeniser's autoencoder and codes."""
    codes = hashlib.sha256(fingerprint(images).encode())
    for _, tensor in sorted(images.codebook.state_dict().items()):
        codes.update(tensor.cpu().contiguous().numpy().tobytes())
    return codes.hexdigest()


def steps_of(images: ImageTokenizer) -> dict[str, Any]:
    """How the same codes become an image."""
    values = {key: getattr(images.config, key) for key in _STEPS}
    return values | {"codebook_sizes": list(images.config.codebook_sizes)}  # as JSON has it


def check_vocabulary(path: Path, vocabulary: Vocabulary) -> None:
    """Raises CheckpointError unless weights were trained with a vocabulary of these sizes."""
    saved = weights.metadata(path).get("vocabulary")
    if saved is not None:
        vocabulary.check_same(recipe.from_dict(Vocabulary, saved, str(path)), str(path))


def check_identity(path: Path, images: ImageTokenizer, texts: TextTokenizer) -> None:
    """Raises CheckpointError unless the weights at `path` belong to the tokenizers."""
    check_vocabulary(path, Vocabulary(texts.size, images.codebook_size))
    saved, here = weights.metadata(path), identity(images, texts)
    tokenizers = saved.get("tokenizers", {})
    if not isinstance(tokenizers, dict) or not all(isinstance(h, str) for h in tokenizers.values()):
        raise DamagedError(f"{path}: its header does not tell its tokenisers: get a good copy")
    for kind, known in tokenizers.items():
        if here["tokenizers"].get(kind) != known:
            raise CheckpointError(
                f"{path}: the weights were trained with another {kind} tokeniser (SHA-256"
                f" {known[:12]}) than the one here ({here['tokenizers'].get(kind, 'none')[:12]}):"
                " put theirs back"
            )
    steps = saved.get("steps", here["steps"])  # older weights do not say
    if steps != here["steps"]:
        raise CheckpointError(
            f"{path}: the weights were trained with images coded by {steps!s:.200}, the image"
            f" tokeniser here has {here['steps']}: put theirs back"
        )
