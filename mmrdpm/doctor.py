"""What this machine can do, on one page, and whether a recipe can be trained on it."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mmrdpm import hub, machine, pretrained, recipe, shipped, text_tokenizer
from mmrdpm.attention import backend
from mmrdpm.checkpoint import CheckpointPolicy
from mmrdpm.data.images import StreamedImages, check_batches, open_images
from mmrdpm.data.loader import Loader
from mmrdpm.data.rows import InOrder, Lanes
from mmrdpm.errors import MmrdpmError, UsageError
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.plan import Kind, Plan, make_plan
from mmrdpm.rdpm import image_tokenizer
from mmrdpm.rdpm.published import PublishedConfig
from mmrdpm.tokenizer_trainer import TokenizerTrainer
from mmrdpm.train_tokenizer import ImageTokenizerRecipe
from mmrdpm.vocabulary import Vocabulary

_OPTIONAL = {  # package -> what it is for
    "xformers": "attention over long rows on CUDA without a compiler",
    "triton": "flex attention and torch.compile on CUDA",
    "wandb": "train.wandb",
    "efficientnet-lite-pytorch": "mmrdpm eval and sweep",
    "datasets": "sources of type huggingface",
    "webdataset": "sources of type webdataset",
    "transformers": "recipes/unified_*.yaml, perceptual loss",
    "diffusers": "published autoencoders",
    "ray": "mmrdpm data cache on a Ray cluster",
}
_OTHERS = {  # kind of a recipe -> what looks at it in the doctor's place
    "text": "mmrdpm tokenizer train tells what it lacks",
    "sweep": "name its model_recipe or its tokenizer_recipe",
    "peers": "mmrdpm bench peers tells what it lacks",
}
_CHECKPOINT = 4  # times the weights: their average, themselves, two moments


@dataclass(frozen=True)
class Line:
    """One finding; `trouble` says that a recipe cannot be trained as it is."""

    name: str
    text: str
    trouble: bool = False

    def __str__(self) -> str:
        return f"{'!' if self.trouble else ' '} {self.name:<12} {self.text}"


def examine(
    path: Path | None, overrides: list[str], gpus: int | None = None, run: Path = Path(".")
) -> Iterator[Line]:
    """Looks at the machine, then, where one is given, at a recipe and its data.

    Args:
        gpus: how many a model is to be trained on, or processes on the CPU; None for those here,
            as far as they can share its rows.
        run: where the run would go, there already or not.
    """
    yield from _machine(run)
    yield from _attention()
    yield from _packages()
    if path is not None:
        yield from _recipe(path, overrides, gpus, run)


def _machine(run: Path) -> Iterator[Line]:
    yield Line("python", f"{platform.python_version()}, {platform.platform()}")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    yield Line("torch", f"{torch.__version__}, {build}")
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        yield Line("gpu", f"{index}: {card.name}, {card.total_memory / 1e9:.0f} GB")
    if not torch.cuda.is_available():
        yield Line("gpu", "none that torch can use")
    yield Line("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()}")
    device = machine.device()
    dtype = machine.matrix_dtype("auto", device)
    rate = machine.measured_rate(device, dtype)
    name = str(dtype).removeprefix("torch.")
    yield Line("precision", f"{name} by auto, {rate / 1e9:,.0f} GFLOP/s in one matrix product")
    memory = machine.main_memory()
    yield Line("memory", f"{memory / 1e9:.0f} GB" if memory else "unknown")
    free, place = _free(run)
    yield Line("disk", f"{free / 1e9:.0f} GB free at {place}")


def _attention() -> Iterator[Line]:
    device = machine.device()
    chosen = backend.resolve("auto", device)
    for name in backend.BACKENDS:
        why = backend.why_not(name, device)
        text = f"{name}: " + (f"not here: {why}" if why else "can train here")
        yield Line("attention", text + (" (auto)" if name == chosen else ""))


def _packages() -> Iterator[Line]:
    for package, purpose in _OPTIONAL.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "not installed"
        yield Line("package", f"{package}: {found} ({purpose})")


def _recipe(path: Path, overrides: list[str], gpus: int | None, run: Path) -> Iterator[Line]:
    try:
        kind = recipe.read(path).get("kind")
        if kind == "model":
            yield from _model(path, overrides, gpus, run)
        elif kind == "image":
            if gpus is not None:
                raise UsageError(
                    f"{path}: is of an image tokeniser, which is not looked into for {gpus} GPUs:"
                    " leave out --gpus"
                )
            yield from _image_tokenizer(path, overrides, run)
        else:
            text = f"{path}: is of kind {kind!r}, which is not looked into: {_OTHERS[str(kind)]}"
            yield Line("recipe", text, trouble=True)
    except MmrdpmError as error:
        yield Line("recipe", str(error), trouble=True)


def _model(path: Path, overrides: list[str], gpus: int | None, run: Path) -> Iterator[Line]:
    loaded = pretrained.complete(recipe.load(ModelRecipe, path, overrides))
    yield Line("recipe", f"{path}: fits its schema")
    shape = loaded.model.head_dim, loaded.data.seq_len
    chosen = backend.resolve(loaded.train.attention, machine.device(), *shape)
    yield Line("attention", chosen)
    rows, here = loaded.data.rows, torch.cuda.device_count() or 1
    gpus = gpus or next(n for n in range(here, 0, -1) if rows % n == 0)
    plan = make_plan(loaded, gpus, _kind())
    yield from _needs(plan)
    # shards hold the average once more
    times = _CHECKPOINT + (plan.sharded and loaded.train.ema > 0)
    yield _disk(loaded.checkpoint, loaded.train.steps, times * plan.parameters, run)
    yield from _data(loaded, min(loaded.train.micro_batch_size or rows, rows // gpus))


def _image_tokenizer(path: Path, overrides: list[str], run: Path) -> Iterator[Line]:
    """Makes the tokeniser and reads the first batch, as a run would; memory is not foreseen."""
    loaded = recipe.load(ImageTokenizerRecipe, path, overrides)
    yield Line("recipe", f"{path}: fits its schema")
    plan, config = loaded.train, loaded.tokenizer
    check_batches(loaded.data, plan.batch_size, plan.codebook_batch)
    size = config.autoencoder.image_size
    data = open_images(loaded.data, plan.seed, size, plan.batch_size)
    trainer = TokenizerTrainer(config, plan, data)
    yield Line("tokenizer", trainer.describe())
    data.images(plan.batch_size, torch.Generator().manual_seed(plan.seed))
    yield Line("data", f"the first batch is there, {plan.batch_size} pictures of {size}x{size}")
    if isinstance(data, StreamedImages):
        yield from _broken(data.rows, loaded.data.max_broken_share)
    held = sum(tensor.numel() for tensor in trainer.tokenizer.state_dict().values())
    frozen = isinstance(config.autoencoder, PublishedConfig)
    yield _disk(loaded.checkpoint, plan.steps, held if frozen else _CHECKPOINT * held, run)


def _data(loaded: ModelRecipe, rows: int) -> Iterator[Line]:
    """Makes a first batch of so many rows, as one process of a run would."""
    images = image_tokenizer.load(shipped.resolve("tokenizers", loaded.tokenizers.image))
    files = text_tokenizer.FILES
    texts = text_tokenizer.load(hub.resolve("tokenizers", loaded.tokenizers.text, files))
    vocabulary = Vocabulary(texts.size, images.codebook_size)
    yield Line("tokenizers", f"{texts.size} text ids, {images.codebook_size} image codes")
    loader = Loader(replace(loaded.data, rows=rows), loaded.train.seed, images, texts, vocabulary)
    useful = (loader.batch().layout.document_ids >= 0).double().mean().item()
    yield Line("data", f"the first {rows} rows are there, {useful:.1%} of their tokens useful")
    yield from _broken(loader.rows, loaded.data.max_broken_share)


def _broken(rows: InOrder | Lanes, share: float) -> Iterator[Line]:
    """What was left out of the first batch, and whether it is more than the share allowed."""
    broken, seen = rows.broken(), rows.seen()
    too_many = broken.total() > share * seen
    for cause, count in broken.most_common():
        yield Line("broken", f"{count} of {seen} records read for it: {cause}", trouble=too_many)
    if too_many:
        text = f"more than data.max_broken_share {share}: mend the data, or raise the share"
        yield Line("broken", text, trouble=True)


def _needs(plan: Plan) -> Iterator[Line]:
    if torch.cuda.is_available():  # the card that is here may be none of the planned kinds
        plan = replace(plan, room=float(torch.cuda.get_device_properties(0).total_memory))
    each = f"in each of {plan.gpus} processes" if plan.gpus > 1 else "in one process"
    text = f"{plan.peak / 1e9:.2f} GB at once {each}"
    if plan.room:
        share = " for all" if plan.together > 1 else ""
        text += f", of {plan.room / 1e9:.0f} GB{share}"
    yield Line("needs", text, trouble=not plan.fits)


def _disk(policy: CheckpointPolicy, steps: int, numbers: int, run: Path) -> Line:
    """Whether there is room for a run's checkpoints of so many float32 numbers each."""
    every = policy.keep_every
    count = policy.keep + 1 + ((steps - 1) // every if every else 0)  # a new one before one goes
    kept, (free, place) = count * 4 * numbers, _free(run)
    text = f"{kept / 1e9:.2f} GB for checkpoints, {free / 1e9:.0f} GB are free at {place}"
    return Line("needs", text, trouble=kept > free)


def _free(run: Path) -> tuple[int, Path]:
    """Bytes on the disk of a folder that may be yet to be made, and what of it is there."""
    run = Path(os.path.expanduser(run)).absolute()
    place = next(folder for folder in (run, *run.parents) if folder.exists())
    return shutil.disk_usage(place).free, place


def _kind() -> Kind:
    """The planned kind that is nearest to this machine."""
    if not torch.cuda.is_available():
        return "cpu"
    name = torch.cuda.get_device_name().lower()
    return next((kind for kind in ("h200", "h100", "a100") if kind in name), "a100")  # type: ignore
