"""One pass forward and backward on tensors without memory, operation by operation as a run's.

Rows are full of drawings, the longest documents of the embedded mixture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from mmrdpm import machine
from mmrdpm.api import build
from mmrdpm.attention import sdpa
from mmrdpm.attention.layout import Layout
from mmrdpm.data.plan import DataPlan
from mmrdpm.document import Packed
from mmrdpm.model_recipe import ModelRecipe
from mmrdpm.objective import PARTS, score
from mmrdpm.rdpm.image_tokenizer import ImageTokenizer
from mmrdpm.tally import Tally
from mmrdpm.transformer import Transformer
from mmrdpm.vocabulary import Vocabulary

_PROMPT = 12  # tokens of a drawing beside its image, about


def one_pass(
    loaded: ModelRecipe,
    images: ImageTokenizer,
    vocabulary: Vocabulary,
    rows: int,
    dtype: torch.dtype,
    tally: Tally,
    *,
    on_cpu: bool,
    added: bool,
    sharded: bool,
) -> float:
    """Counts the pass of some rows; gives the bytes of the logits that it holds at once.

    Args:
        dtype: of matrix products.
        added: whether a gradient is added to what is there, and gone.
        sharded: whether layers are gathered in `dtype`, where others are copied to it.
    """
    data, train = loaded.data, loaded.train
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = build(loaded.model, vocabulary, images)
        model.recompute = train.recompute
        lengths = documents(data, positions_of(images))
        attend = _by_document if on_cpu else _by_kernel
        for linear in [*model.attentions.modules(), *model.feed_forwards.modules()]:
            if sharded and isinstance(linear, nn.Linear):
                linear.weight = nn.Parameter(linear.weight.detach().to(dtype))
        if added:
            for p in model.parameters():
                p.register_post_accumulate_grad_hook(_forget)
        if train.compile and not on_cpu and not train.recompute:  # else one layer's, at the most
            _compile_layers(model, tally)
        packed = _blank(rows, data.seq_len, images)
        learned = torch.zeros(rows * targets(data, lengths), dtype=torch.int64)
        part = PARTS["cpu" if on_cpu else "cuda"]
        with tally, machine.autocast(dtype, torch.device("cpu")):
            attended = attend([n for _ in range(rows) for n in lengths], data.seq_len, tally)
            model.plan = lambda _: attended
            hidden = model(packed)
            columns = (hidden, packed.timesteps, packed.targets, packed.residuals)
            total, sizes = torch.zeros(()), []
            for count, ids, softness in _kinds(loaded, model, len(learned), lengths, rows, images):
                each = (t.flatten(0, 1)[learned[:count]].split(part) for t in columns)
                how = (model.code_features, softness, train.z_loss, model.scored(ids))
                scored = [model.checkpointed(score, *how, *p) for p in zip(*each, strict=True)]
                total = total + sum(wanted.sum() for _, wanted, _ in scored)
                sizes.append((min(part, count) if train.recompute else count) * len(how[-1]))
            total.backward()
    return 4.0 * (max(sizes) if train.recompute else sum(sizes))


def _kinds(
    loaded: ModelRecipe,
    model: Transformer,
    count: int,
    lengths: list[int],
    rows: int,
    images: ImageTokenizer,
) -> list[tuple[int, slice, float]]:
    """As `objective.loss` scores: how many targets, among which ids, with how soft labels."""
    data, train = loaded.data, loaded.train
    if not train.codes_apart:
        return [(count, slice(None), train.soft_labels)]
    drawings = sum(n == lengths[0] for n in lengths)
    codes = min(count, rows * drawings * data.steps_per_image * positions_of(images))
    first = model.code_ids.start
    return [
        (codes, model.code_ids, train.soft_labels),
        (count - codes, slice(0, first), 0.0),
    ]


def positions_of(images: ImageTokenizer) -> int:
    """Positions of one timestep of an image."""
    size = 1
    for side in images.grid:
        size *= side
    return size


def documents(data: DataPlan, positions: int) -> list[int]:
    """Lengths of the drawings that a row holds, and of what is left over at its end."""
    length = min(data.seq_len, data.steps_per_image * positions + _PROMPT)
    whole, rest = divmod(data.seq_len, length)
    return [length] * whole + [rest] * (rest > 0)


def targets(data: DataPlan, lengths: list[int]) -> int:
    """How many positions of such a row have a target.

    Of a document all do but one, the last of a text, which is the prompt of a drawing. What is left
    over is filled by something shorter, unless the recipe has nothing but drawings.
    """
    filled = [n for n in lengths if n == lengths[0] or data.image_share < 1]
    return sum(n - 1 for n in filled)


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def _by_document(lengths: list[int], *_: object) -> Callable[..., Tensor]:
    """Attention as the CPU computes it."""
    return sdpa.by_document([torch.zeros(n, n) for n in lengths])


def _by_kernel(lengths: list[int], seq_len: int, tally: Tally) -> Callable[..., Tensor]:
    """Attention as a fused kernel on a GPU computes it, with flex's mask of a row's pairs."""
    pairs = float(sum(n * n for n in lengths))
    mask = torch.empty(sum(lengths), seq_len, dtype=torch.bool)
    return lambda q, k, v: _Exact.apply(q, k, v, mask, pairs, tally)


def _blank(rows: int, seq_len: int, images: ImageTokenizer) -> Packed:
    def number() -> Tensor:
        return torch.zeros(rows, seq_len, dtype=torch.int64)

    latents = torch.zeros(rows, seq_len, 2 * images.latent_channels)
    positions = torch.zeros(rows, seq_len, 1 + len(images.grid), dtype=torch.int64)
    layout = Layout(number(), number(), number())
    residuals = latents[..., : images.latent_channels]
    return Packed(number(), latents, number(), number(), residuals, positions, layout)


class _Exact(torch.autograd.Function):
    """A fused kernel: two products of `pairs x D` forward, five backward (Dao et al. 2022, arXiv
    2205.14135, appendix B); it keeps its inputs and its output."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, pairs: float, tally: Tally
    ) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, mask, out)
        ctx.tally, ctx.product = tally, 2 * pairs * q.shape[-2] * q.shape[-1]
        tally.flops += 2 * ctx.product
        return out

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        ctx.tally.flops += 5 * ctx.product
        return *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None, None, None


def _compile_layers(model: Transformer, tally: Tally) -> None:
    """What `Transformer.compile_layers` compiles, with its memory."""
    numbers = (torch.float32, torch.bfloat16, torch.complex64)
    endless = {dtype: torch.empty(2**40, dtype=dtype) for dtype in numbers}  # beside the tally
    for attention, feed_forward in zip(model.attentions, model.feed_forwards, strict=True):
        attention.project = _compiled(attention.project, tally, endless)  # type: ignore
        feed_forward.forward = _compiled(feed_forward.forward, tally, endless)  # type: ignore


def _compiled(
    part: Callable[..., Any], tally: Tally, endless: dict[torch.dtype, Tensor]
) -> Callable[..., Any]:
    """A part of a layer that holds for its backward pass what torch.compile would.

    That is what goes into matrix products or comes out of them: all between is computed anew,
    inside the kernels that need it, as the library's min-cut partitioner decides.
    """

    def run(*given: Tensor) -> Any:
        kept: list[list[Tensor]] = []

        def keep(tensor: Tensor) -> list[Tensor]:
            kept.append([tensor])
            return kept[-1]

        tally.multiplied.clear()
        with saved_tensors_hooks(keep, lambda place: place[0]):
            out = part(*given)
        for place in kept:
            tensor = place[0]
            if tensor.untyped_storage()._cdata not in tally.multiplied:
                place[0] = endless[tensor.dtype].as_strided(tensor.shape, tensor.stride())
        return out

    return run
