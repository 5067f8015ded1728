"""The attention backends side by side: forward and backward, over row lengths and packings."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from mmrdpm import machine
from mmrdpm.attention import backend
from mmrdpm.attention.layout import Attend, BlockKind, Layout
from mmrdpm.bench.measure import Work, interleaved, machine_facts
from mmrdpm.bench.plot import chart, page
from mmrdpm.errors import RecipeError

_DOCUMENTS = (1, 4)  # packed into a row


@dataclass(frozen=True)
class _Size:
    """What a device has enough to do with: the small recipes' or the large ones' sizes."""

    tokens: int  # of all rows together
    row_lengths: tuple[int, ...]
    block: int  # tokens of a text or of an image
    heads: int
    head_dim: int


_SIZES = {
    "cpu": _Size(2048, (128, 256, 512, 1024), 16, 4, 64),
    "cuda": _Size(32768, (256, 1024, 2048, 4096, 8192), 64, 16, 128),
}


def bench_attention(threads: int, rounds: int) -> dict[str, Any]:
    """Every backend that runs here on the same rows; planning is in all and by itself.

    A document is a text and noisy image blocks, of one length each.
    """
    machine.prepare(threads)
    device = machine.device()
    size = _SIZES[device.type]
    dtype = machine.matrix_dtype("auto", device)
    names, missing = _backends(device)
    results = [
        _measure(names, size, length, documents, device, dtype, rounds)
        for documents in _DOCUMENTS
        for length in size.row_lengths
    ]
    facts = machine_facts(dtype, device)
    shape = {"tokens": size.tokens, "heads": size.heads, "head_dim": size.head_dim}
    return {"machine": facts, **shape, "missing": missing, "results": results}


def lines(figures: dict[str, Any]) -> list[str]:
    """The figures to read."""
    shown = [", ".join(f"{key} {value}" for key, value in figures["machine"].items())]
    shown += [f"{name}: left out: {why}" for name, why in figures["missing"].items()]
    shown.append(
        f"milliseconds for {figures['tokens']} tokens, {figures['heads']} heads of"
        f" {figures['head_dim']}, one layer"
    )
    shown.append("row length   documents   backend         plan    forward   with backward")
    for result in figures["results"]:
        for name, found in result["backends"].items():
            shown.append(
                f"{result['row_length']:10d}   {result['documents']:9d}   {name:9s}"
                f"   {1e3 * found['plan']:8.2f}   {1e3 * found['forward']:8.2f}"
                f"   {1e3 * found['both']:13.2f}"
            )
    return shown


def plot(figures: dict[str, Any]) -> str:
    """Seconds with backward over row length, a chart per packing, as SVG."""
    charts = []
    for documents in sorted({result["documents"] for result in figures["results"]}):
        series: dict[str, list[tuple[float, float]]] = {}
        for result in figures["results"]:
            if result["documents"] == documents:
                for name, found in result["backends"].items():
                    series.setdefault(name, []).append((result["row_length"], found["both"]))
        charts.append(chart(f"{documents} documents a row", "row length", "seconds", series))
    return page(charts)


def layout_of(rows: int, length: int, documents: int, block: int) -> Layout:
    """Rows of equal documents, each a text block and then noisy blocks, without padding."""
    place = torch.arange(length)
    document_ids = place * documents // length
    begins = torch.searchsorted(document_ids, document_ids)
    block_in_document = (place - begins) // block
    blocks = document_ids * length + block_in_document
    kinds = torch.where(block_in_document == 0, int(BlockKind.TEXT), int(BlockKind.NOISY))
    return Layout(*(x.expand(rows, -1).contiguous() for x in (document_ids, blocks, kinds)))


def _backends(device: torch.device) -> tuple[list[Any], dict[str, str]]:
    """Those that run here, and why the others do not."""
    names, missing = [], {}
    for name in get_args(backend.Name):
        if name == "auto":
            continue
        try:
            names.append(backend.resolve(name, device))
        except RecipeError as error:
            missing[name] = str(error)
    return names, missing


def _measure(
    names: list[Any],
    size: _Size,
    length: int,
    documents: int,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
) -> dict[str, Any]:
    torch.compiler.reset()  # else kernels of many lengths pass the compiler's limit
    layout = layout_of(size.tokens // length, length, documents, size.block).to(device)
    shape = (*layout.kinds.shape, size.heads, size.head_dim)
    q, k, v = torch.randn(3, *shape, device=device).to(dtype).unbind()
    works: dict[str, Work] = {}
    for name in names:
        works[f"{name} plan"] = partial(backend.planner(name), layout)
        works[f"{name} forward"] = _forward(backend.planner(name), layout, q, k, v)
        works[f"{name} both"] = _both(backend.planner(name), layout, q, k, v)
    seconds = {work: statistics.median(all_) for work, all_ in interleaved(works, rounds).items()}
    parts = ("plan", "forward", "both")
    found = {name: {part: seconds[f"{name} {part}"] for part in parts} for name in names}
    return {"row_length": length, "documents": documents, "backends": found}


Plan = Callable[[Layout], Attend]


def _forward(plan: Plan, layout: Layout, q: Tensor, k: Tensor, v: Tensor) -> Work:
    def work() -> None:
        with torch.no_grad():
            plan(layout)(q, k, v)

    return work


def _both(plan: Plan, layout: Layout, q: Tensor, k: Tensor, v: Tensor) -> Work:
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]

    def work() -> None:
        out = plan(layout)(*inputs)
        torch.autograd.grad(out.sum(), inputs)

    return work
