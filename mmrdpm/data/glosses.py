"""The embedded texts: definitions of common nouns from WordNet 3.1 (see WORDNET_LICENSE.txt)."""

from __future__ import annotations

import gzip
from importlib.resources import files


def load_glosses() -> list[str]:
    """Sentences such as "a lantern is light in a transparent protective case.", sorted."""
    packed = (files("mmrdpm") / "data" / "glosses.txt.gz").read_bytes()
    return gzip.decompress(packed).decode("ascii").splitlines()
