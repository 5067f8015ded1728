"""What a recipe will need, before anything is allocated: memory by part, operations, hours.

One update is run on tensors without memory (torch's fake tensors): every operation that the real
one would call is seen, what it computes and moves is added up, and the bytes that live at once are
followed from allocation to release. Time is the sum of both at the machine's rates (a roofline
without overlap), measured here for `cpu`, from NVIDIA's data sheets for the GPUs. A GPU also waits
for the host, which hands it one operation after the other and makes the rows; docs/scaling.md sets
plans beside runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from mmrdpm import hub, machine, pretrained, recipe, shipped, text_tokenizer
from mmrdpm.api import build
from mmrdpm.dry_run import one_pass, positions_of
from mmrdpm.engine.parallel import BYTES_PER_PARAMETER, DDP_SHARE
from mmrdpm.errors import MmrdpmError, UsageError
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.optim import STACK, Muon
from mmrdpm.rdpm.image_tokenizer import SPEC_FILE, ImageTokenizer, ImageTokenizerConfig
from mmrdpm.tally import Tally
from mmrdpm.vocabulary import Vocabulary

Kind = Literal["cpu", "h100", "h200", "a100"]

_PER_NODE = 8  # GPUs that hybrid sharding shards over
# what an H200 reached, see docs/scaling.md
_REACHED = 0.7  # of the data sheet's matrix products, in 200 large ones behind each other
_BANDWIDTH = 0.6  # of the data sheet's, in practice: an assumption
_FUSED = 0.39  # of the bytes that operations move one by one, where torch.compile joins them
_THROUGH = 4.6  # times the bytes that operations move on a CPU, slower than one addition: fitted
_CALL, _TOKEN = 42e-6, 0.8e-6  # seconds of the host for an operation, and for a token of a row
_CONTEXT = 3.0e9  # bytes that CUDA, its libraries and gaps between tensors took: 2.8 and 3.2
_HOLES = 1.2  # what glibc's heap takes over what lives, as `machine.prepare` sets it: measured
_LINK = 50e9  # bytes per second between GPUs, 400 Gbit/s: what a card of a network promises
_PROGRAM = 0.55e9  # bytes that an emoji run on the CPU held before its first update, measured


@dataclass(frozen=True)
class Plan:
    """What one update of a recipe needs, per GPU (or process).

    Attributes:
        memory: bytes by part.
        peak: bytes held at once: gradients come while activations go.
        room: bytes that there are for `together` of them, None where that is unknown.
        flops, moved: floating point operations of matrix products, and bytes moved, per update.
        exchanged: bytes that it gets from other GPUs in an update, see `_exchanged`.
        seconds: per update; the exchange between GPUs is left out, and reading the data.
    """

    recipe: ModelRecipe
    gpus: int
    kind: Kind
    sharded: bool
    parameters: int
    tokens_per_image: int
    memory: dict[str, float]
    peak: float
    room: float | None
    flops: float
    moved: float
    exchanged: float
    seconds: float

    @property
    def hours(self) -> float:
        return self.seconds * self.recipe.train.steps / 3600

    @property
    def together(self) -> int:
        """How many share the room: processes on the CPU one main memory, as if on one machine."""
        return self.gpus if self.kind == "cpu" else 1

    @property
    def fits(self) -> bool:
        return self.room is None or self.peak * self.together <= self.room


def make_plan(loaded: ModelRecipe, gpus: int, kind: Kind) -> Plan:
    """Plans one update.

    Raises:
        UsageError: the rows cannot be shared among so many GPUs.
        MmrdpmError: a tokeniser is missing or its spec is wrong.
    """
    rows = loaded.data.rows
    if rows % gpus:
        raise UsageError(f"data.rows is {rows}, no multiple of {gpus} GPUs: change one of them")
    machine.prepare(loaded.train.threads)
    if pretrained.lacks_shape(loaded.model) or not loaded.tokenizers.text:
        loaded = pretrained.complete(loaded)
    images, vocabulary = _tokenizers(loaded)
    with torch.device("meta"):
        model = build(loaded.model, vocabulary, images)
    parameters, room = sum(p.numel() for p in model.parameters()), _room(kind)
    sharded = _is_sharded(loaded, gpus, parameters, room, kind)
    share = min(gpus, _PER_NODE) if loaded.train.parallel == "hybrid" else gpus
    micro = min(loaded.train.micro_batch_size or rows // gpus, rows // gpus)
    update, optimizer = Tally(), Tally()
    passes = rows // gpus / micro
    added = gpus > 1 or passes > 1  # a gradient is added to what is there (DDP's buckets), and gone
    logits = one_pass(
        loaded,
        images,
        vocabulary,
        micro,
        _dtype(loaded, kind),
        update,
        on_cpu=kind == "cpu",
        added=added,
        sharded=sharded,
    )
    _optimise(loaded, model, kind, gpus, optimizer)
    parts = share if sharded else 1
    lasting = _lasting(loaded, model, kind, parts)
    held, spent = lasting["weights"], update.peak * (_HOLES if kind == "cpu" else 1)
    activations = max(0.0, spent - logits - (0 if added else held))
    memory = {**lasting, "gradients": held, "logits": logits, "activations": activations}
    apart = held if added else 0.0  # gradients, which otherwise come while activations go
    peak = sum(lasting.values()) + max(spent + apart, held)
    flops = passes * update.flops + optimizer.flops
    passed, optimised = passes * update.moved, optimizer.moved / parts
    calls = passes * update.calls + optimizer.calls
    return Plan(
        recipe=loaded,
        gpus=gpus,
        kind=kind,
        sharded=sharded,
        parameters=parameters,
        tokens_per_image=images.num_timesteps * positions_of(images),
        memory=memory,
        peak=peak,
        room=room,
        flops=flops,
        moved=passed + optimised,
        exchanged=_exchanged(loaded, model, _dtype(loaded, kind), gpus, parts, passes),
        seconds=_seconds(loaded, kind, flops, (passed, optimised), calls, rows // gpus),
    )


def _lasting(loaded: ModelRecipe, model: nn.Module, kind: Kind, parts: int) -> dict[str, float]:
    """Bytes that are held from update to update, of a model in so many parts."""
    held = 4.0 * sum(p.numel() for p in model.parameters()) / parts
    return {
        "weights": held,
        "optimiser": _moments(loaded, model) / parts,
        "average": held if loaded.train.ema else 0.0,
        "gathered": 4.0 * _outside(model) if parts > 1 else 0.0,  # embeddings, for the whole pass
        "program": _PROGRAM if kind == "cpu" else _CONTEXT,
    }


def lines(plan: Plan) -> Iterator[str]:
    """The plan as a page of text."""
    data, train = plan.recipe.data, plan.recipe.train
    unit = "processes" if plan.kind == "cpu" else plan.kind.upper()
    yield f"machine              {plan.gpus} {unit}" + (", sharded" if plan.sharded else "")
    yield f"parameters           {plan.parameters:,}"
    yield f"tokens per image     {plan.tokens_per_image:,} (all timesteps)"
    yield f"tokens per update    {data.rows * data.seq_len:,} ({data.rows} rows of {data.seq_len})"
    yield f"FLOPs per update     {plan.flops * plan.gpus:.3g} of matrix products"
    yield "memory per GPU, GB" if plan.kind != "cpu" else "memory per process, GB"
    for part, size in plan.memory.items():
        yield f"  {part:<19}{size / 1e9:8.2f}"
    room = f"  of {plan.room / 1e9:.0f}" if plan.room else ""
    yield f"  {'at once':<19}{plan.peak / 1e9:8.2f}" + (room if plan.together == 1 else "")
    if plan.together > 1:
        all_of_them = f"all {plan.together} on a machine"
        yield f"  {all_of_them:<19}{plan.together * plan.peak / 1e9:8.2f}{room}"
    yield f"seconds per update   {plan.seconds:.3g} (exchange between GPUs left out)"
    if plan.gpus > 1 and plan.kind != "cpu":
        yield (
            f"exchange, GB         {plan.exchanged / 1e9:.3g} for each GPU and update,"
            f" {plan.exchanged / _LINK:.3g} s at {_LINK / 1e9:.0f} GB/s if nothing overlaps"
        )
    yield f"hours                {plan.hours:.3g} for {train.steps:,} updates"
    if _emulates(plan):
        yield (
            "WARNING: this CPU has no bfloat16 arithmetic and emulates it: train.precision=fp32 is"
            " faster"
        )
    if not plan.fits:
        number = "fewer processes" if plan.together > 1 else "more GPUs"
        yield (
            "WARNING: it does not fit: lower train.micro_batch_size, set train.recompute=true,"
            f" train.parallel=fsdp, or use {number}"
        )


def _emulates(plan: Plan) -> bool:
    here = torch.device("cpu")
    dtype = _dtype(plan.recipe, plan.kind)
    return plan.kind == "cpu" and dtype == torch.bfloat16 and not machine.has_bfloat16(here)


def _tokenizers(loaded: ModelRecipe) -> tuple[ImageTokenizer, Vocabulary]:
    """The image tokeniser without weights, of which nothing but the spec is needed."""
    with torch.device("meta"):
        images = ImageTokenizer(_image_spec(loaded.tokenizers.image))
    text = hub.resolve("tokenizers", loaded.tokenizers.text, text_tokenizer.FILES)
    return images, Vocabulary(text_tokenizer.load(text).size, images.codebook_size)


def _image_spec(name: str) -> ImageTokenizerConfig:
    """The spec in a tokeniser's folder, or in the recipe (a .yaml file) that is to train it."""
    if name.endswith(".yaml"):
        path = shipped.resolve("recipes", name)
        section = recipe.of_kind(path, "image").get("tokenizer") or {}
        return recipe.from_dict(ImageTokenizerConfig, section, f"{path}: tokenizer")
    try:
        folder = shipped.resolve("tokenizers", name)
    except MmrdpmError as error:
        raise UsageError(
            f"{error}; before it is trained, plan with its recipe: tokenizers.image=RECIPE.yaml"
        ) from None
    return recipe.load(ImageTokenizerConfig, folder / SPEC_FILE)


def _optimise(loaded: ModelRecipe, model: nn.Module, kind: Kind, gpus: int, tally: Tally) -> None:
    """AdamW reads weight, gradient and moments and writes three; Muon multiplies matrices, one on
    each GPU at a time, of which the largest takes longest."""
    matrices = _matrices(loaded, model)
    taken = sum(p.numel() for p in matrices)
    tally.moved += 7 * 4 * (sum(p.numel() for p in model.parameters()) - taken)
    tally.moved += 8 * 4 * taken
    with FakeTensorMode():
        muon = Muon([nn.Parameter(torch.empty(1, 1))], 0.0, _dtype(loaded, kind))
        for begin in range(0, len(matrices), gpus):
            largest = max(matrices[begin : begin + gpus], key=torch.numel)
            matrix = torch.empty(largest.shape)
            with tally:
                muon.orthogonal(matrix)


def _matrices(loaded: ModelRecipe, model: nn.Module) -> list[nn.Parameter]:
    if loaded.optimizer.name != "muon":
        return []
    return [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith(STACK)]


def _outside(model: nn.Module) -> int:
    """Parameters outside of the layers."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(STACK))


def _exchanged(
    loaded: ModelRecipe,
    model: nn.Module,
    dtype: torch.dtype,
    gpus: int,
    parts: int,
    passes: float,
) -> float:
    """Bytes that a GPU gets from the others in an update, by rings: as many as it gives.

    Copies add up their gradients once. A sharded model does it in every pass, after gathering the
    layers before and again after the loss, and what lies outside of them once, in float32. Muon
    gathers a sharded momentum whole, and gives each matrix's update to all.

    Args:
        parts: that the model is cut into; GPUs beyond them hold copies of a part.
        passes: parts of a batch that a GPU computes one after the other.
    """
    total, outside = sum(p.numel() for p in model.parameters()), _outside(model)
    by_muon = sum(p.numel() for p in _matrices(loaded, model))
    narrow, copies = dtype.itemsize, gpus / parts
    shard, all_but_own = (parts - 1) / parts, (gpus - 1) / gpus
    gathered = shard * (2 * narrow * (total - outside) + 4 * outside)
    scattered = shard * 4 * total
    added = 2 * (copies - 1) / copies * 4 * total / parts
    muon = shard * 4 * by_muon + all_but_own * narrow * by_muon
    rounds = math.ceil(passes) if parts > 1 else 1  # see `Parallel.backward`
    return rounds * (gathered + scattered + added) + muon


def _moments(loaded: ModelRecipe, model: nn.Module) -> float:
    """Bytes of the optimisers' state: one moment for Muon, two for AdamW."""
    one = sum(p.numel() for p in _matrices(loaded, model))
    return 4.0 * (2 * sum(p.numel() for p in model.parameters()) - one)


def _is_sharded(
    loaded: ModelRecipe, gpus: int, parameters: int, room: float | None, kind: Kind
) -> bool:
    wanted = loaded.train.parallel
    if gpus == 1 or wanted == "ddp":
        return False
    if wanted != "auto":
        return True
    if kind == "cpu" or room is None:
        return False
    return parameters * BYTES_PER_PARAMETER > room * DDP_SHARE


def _dtype(loaded: ModelRecipe, kind: Kind) -> torch.dtype:
    if kind != "cpu":
        return torch.float32 if loaded.train.precision == "fp32" else torch.bfloat16
    return machine.matrix_dtype(loaded.train.precision, torch.device("cpu"))


def _room(kind: Kind) -> float | None:
    return machine.main_memory() if kind == "cpu" else machine.DATASHEET[kind].memory


def _seconds(
    loaded: ModelRecipe,
    kind: Kind,
    flops: float,
    moved: tuple[float, float],
    calls: float,
    rows: int,
) -> float:
    """Of an update with so many rows, on the device or, where that takes longer, on the host.

    Args:
        moved: bytes by the passes, and by the optimisers, whose operations nothing joins.
    """
    passed, beside = moved
    if kind != "cpu":
        sheet = machine.DATASHEET[kind]
        rate = sheet.fp32 if _dtype(loaded, kind) == torch.float32 else sheet.bf16
        fused = _FUSED if loaded.train.compile else 1.0
        bytes_ = fused * passed + beside
        device = flops / (rate * _REACHED) + bytes_ / (sheet.bandwidth * _BANDWIDTH)
        return max(device, calls * _CALL) + rows * loaded.data.seq_len * _TOKEN
    here = torch.device("cpu")
    rate = machine.measured_rate(here, _dtype(loaded, kind), side=2048)
    return flops / rate + _THROUGH * (passed + beside) / machine.measured_bandwidth(here)
