"""Looks at data and caches latents."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmrdpm import distributed, machine, recipe, shipped
from mmrdpm.cli.common import Commands, command, count, group, recipe_file, recipe_options
from mmrdpm.data.cache import CacheWriter
from mmrdpm.data.faults import ReadOnce
from mmrdpm.data.inspect import guess, inspect
from mmrdpm.data.records import Indexed, Source
from mmrdpm.data.sources import SourceConfig, open_source
from mmrdpm.errors import DataError, MmrdpmError, UsageError, printable
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.train_tokenizer import ImageTokenizerRecipe


def add(commands: Commands) -> None:
    """Registers `data ...`."""
    of = group(commands, "data", "Looks at data and caches latents.")
    p = command(of, data_inspect, "inspect")
    p.add_argument("source", metavar="SOURCE", help="recipe, or path, glob, URL or hub id of data")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, or the source")
    p.add_argument("--n", type=count, default=16, help="records of each source")
    p.add_argument("--out", type=Path, metavar="DIR", help="where contact sheets go")
    p = command(of, data_cache, "cache")
    recipe_options(p)
    p.add_argument("--out", type=Path, required=True, metavar="DIR")
    p.add_argument("--per-shard", type=count, default=1000, help="records in a shard")
    p.add_argument("--buckets", action="store_true", help="keep aspect ratios")
    p.add_argument("--ray", action="store_true", help="share the work by Ray Data")


def data_inspect(options: argparse.Namespace) -> None:
    """Shows the first records of data: sizes, captions and problems."""
    configs, captions = _configs(options.source, options.overrides)
    if options.out:
        _check_names(configs)
    for name, config in configs.items():
        source = open_source(name, config, captions)
        size = f", {len(source)} records" if isinstance(source, Indexed) else ""
        print(f"{name}: {config.type}{size}")
        findings = inspect(source, options.n)
        for line in [*findings.lines, *findings.summary()]:
            print(f"  {printable(line)}")
        if options.out and (sheet := findings.sheet()):
            options.out.mkdir(parents=True, exist_ok=True)
            path = options.out / f"{name}.png"
            sheet.save(path)
            print(f"  {path}")
        if findings.stopped:
            raise findings.stopped


def _configs(source: str, overrides: list[str]) -> tuple[dict[str, SourceConfig], bool]:
    """The sources of a recipe, or the one that a path means, and whether captions are wanted."""
    emoji = SourceConfig("emoji")
    if Path(source).suffix in (".yaml", ".yml") or _is_recipe(source):
        path = recipe_file(source, ("model", "image"))
        if recipe.read(path)["kind"] == "image":
            pictures = recipe.load(ImageTokenizerRecipe, path, overrides).data.sources
            return pictures or {"emoji": emoji}, False
        sources = recipe.load(ModelRecipe, path, overrides).data.sources
        return sources or {"emoji": emoji, "glosses": SourceConfig("glosses")}, True
    mapping = recipe.to_dict(guess(source))
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise UsageError(
                f"{override!r}: one source at a time, and its keys as key=value (put braces and"
                " stars in quotes, or the shell makes many words of them)"
            )
        mapping[key] = {"true": True, "false": False}.get(value, value)
    return {"source": recipe.from_dict(SourceConfig, mapping, source)}, True


def _is_recipe(name: str) -> bool:
    try:
        return shipped.resolve("recipes", name).is_file() and not Path(name).exists()
    except MmrdpmError:
        return False


def _check_names(names: Iterable[str]) -> None:
    """Refuses names of sources that do not do as names of files."""
    for name in names:
        if not name.strip(".") or Path(name).name != name:
            raise UsageError(
                f"data.sources: {name!r} is to name a file: use no slashes, nor dots alone"
            )


def data_cache(options: argparse.Namespace) -> None:
    """Caches the latents of a recipe's images; started again, it goes on; also under torchrun."""
    loaded = recipe.load(ModelRecipe, recipe_file(options.recipe, ("model",)), options.overrides)
    _check_names(loaded.data.sources)
    distributed.take_device()
    pairs = dict(_pairs(loaded.data.sources))
    configs, images = loaded.data.sources, loaded.tokenizers.image
    writers = {n: _writer(s, images, options, n, configs[n]) for n, s in pairs.items()}
    if not writers:
        raise UsageError(f"{options.recipe}: none of its data.sources holds image-text pairs")
    for name, writer in writers.items():
        _fill(name, writer, options, loaded.data.max_broken_share)
        print(writer.folder)


def _pairs(configs: Mapping[str, SourceConfig]) -> Iterator[tuple[str, Source]]:
    """The sources of image-text pairs, opened; says of each other one that it is left out."""
    for name, config in configs.items():
        known = config.type in ("text", "glosses", "interleaved", "cache")
        if not known and not _streams_texts(name, config):
            source = open_source(name, config)
            if not source.texts_only:
                yield name, source
                continue
        if distributed.is_main():
            print(f"{name}: left out, it holds no image-text pairs to encode", file=sys.stderr)


def _streams_texts(name: str, config: SourceConfig) -> bool:
    """Whether a data set that would be fetched whole shows no pictures when it is streamed."""
    if config.type != "huggingface" or config.streaming:
        return False
    try:
        return open_source(name, replace(config, streaming=True)).texts_only
    except DataError:  # not all can be streamed: as it is configured, it opens or tells why not
        return False


def _writer(
    source: Source, tokenizer: str, options: argparse.Namespace, name: str, config: SourceConfig
) -> CacheWriter:
    images = image_tokenizer.load(shipped.resolve("tokenizers", tokenizer)).to(machine.device())
    how = (options.out / name, tokenizer, options.per_shard, options.buckets, config.taken())
    return CacheWriter(source, images, *how)


def _fill(
    name: str, writer: CacheWriter, options: argparse.Namespace, max_broken_share: float
) -> None:
    """Makes this process's share of the missing shards; tells what was left out, and why."""
    rank, world_size = distributed.rank(), distributed.world_size()
    mine = range(rank, writer.manifest.shards, world_size)
    missing = [i for i in writer.missing() if i in mine]
    make = writer.write_by_ray if options.ray else lambda shards: map(writer.write, shards)
    mended = f"what was mended is read again where {writer.folder} is deleted"
    counts = ReadOnce(name, writer.source, max_broken_share, mended)  # of this process
    with _progress(name, len(mine), len(mine) - len(missing)) as advance:
        for done, (kept, skipped) in enumerate(make(missing), start=1):
            advance()
            for record in skipped:
                print(printable(str(record)), file=sys.stderr)
            counts.add(kept + len(skipped), skipped, done)
    if not writer.missing():  # of all processes, whoever made which
        seen, broken = writer.totals()
        for cause, number in broken.most_common():
            print(f"{name}: {number} of {seen} left out: {cause}", file=sys.stderr)
        counts.check(seen, broken, writer.manifest.shards)


@contextmanager
def _progress(title: str, total: int, done: int) -> Iterator[Callable[[], None]]:
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("shards"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task = bar.add_task(title, total=total, completed=done)
    with bar:
        yield lambda: bar.advance(task)
