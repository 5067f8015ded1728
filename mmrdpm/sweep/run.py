"""Runs a sweep: tokenisers, models, measurements, each once, whatever stopped it in between.

OUT/tokenizers/NAME          a run folder each; tokenizers.jsonl has their figures
OUT/runs/NAME-seed0          a run folder each, as `mmrdpm train` makes it
OUT/results.jsonl            a line per variant and seed, appended as they finish
OUT/NAME.md, NAME-*.svg      the sweep's table and plots, written anew after every line
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from mmrdpm import api, checkpoint, hub, machine, shipped, text_tokenizer
from mmrdpm import recipe as recipes
from mmrdpm.api import Model
from mmrdpm.errors import CheckpointError, UsageError
from mmrdpm.evaluation.figure import digest
from mmrdpm.model_recipe import ModelRecipe, Tokenizers
from mmrdpm.objective import loss
from mmrdpm.sampling.image import Guided
from mmrdpm.sweep import spec
from mmrdpm.sweep.records import Records
from mmrdpm.sweep.report import report
from mmrdpm.sweep.spec import Measures, Sweep, Variant
from mmrdpm.sweep.tokenizers import content_sha256, train_tokenizer
from mmrdpm.train_model import Trainer, train

Measure = Callable[[Model, Measures, dict[str, Any] | None], dict[str, Any]]
"""Gives the figures of a line; the last argument is a line of the same weights, if there is one."""

_BESIDE = ("tokenizers", "sampling", "samples", "checkpoint")  # told otherwise, or without effect
_COUNTED = 4  # batches that the FLOPs of an update are averaged over


def run_sweep(
    sweep: Sweep, out: Path, measure: Measure, say: Callable[[str], None], only: str | None = None
) -> Path | None:
    """Does what is left of a sweep; gives the path of its table, None if it was stopped.

    Raises:
        UsageError: no variant is called `only`.
        CheckpointError: `out` holds a sweep of other recipes.
    """
    chosen = chosen_of(sweep, only)
    out.mkdir(parents=True, exist_ok=True)
    seeds = sweep.seeds if sweep.model_recipe else sweep.seeds[:1]
    jobs = [(variant, seed) for seed in seeds for variant in chosen]  # a whole table first
    for number, (variant, seed) in enumerate(jobs, start=1):
        say(f"{number} of {len(jobs)}: {variant.name}, seed {seed}")
        if not _finish(sweep, variant, seed, out, measure, say):
            return None
    return report(sweep, out)


def chosen_of(sweep: Sweep, only: str | None) -> list[Variant]:
    """The variants that are called `only`, or all; UsageError where none is."""
    chosen = [v for v in sweep.variants if only in (None, v.name)]
    if not chosen:
        names = ", ".join(sweep.names)
        raise UsageError(f"--only {only}: the sweep has no such variant: choose one of {names}")
    return chosen


def _finish(
    sweep: Sweep, variant: Variant, seed: int, out: Path, measure: Measure, say: Callable
) -> bool:
    """One line of the results, trained and measured as far as it is not there; False if stopped."""
    images = None
    if sweep.tokenizer_recipe:
        images = train_tokenizer(sweep, variant, out, say)
        if images is None:
            return False
    if sweep.model_recipe is None:
        return True
    records = Records(out / "results.jsonl")
    identity = _identity(sweep, variant, seed, images)
    known = records.find(variant=variant.name, seed=seed)
    if known:
        _check_same(known, identity, records.path)
        return True
    run = train_run(sweep, variant, seed, out, images)
    if run is None:
        return False
    folder, trained = run
    model = replace(api.load(folder), sampling=spec.sampling(sweep, variant))
    beside = ("variant", "sampling")
    alike = records.find(**{k: v for k, v in identity.items() if k not in beside})
    records.append({**identity, **trained, **measure(model, sweep.measures, alike)})
    report(sweep, out)
    return True


def _identity(sweep: Sweep, variant: Variant, seed: int, images: Path | None) -> dict[str, Any]:
    """What a line of results belongs to: names and overrides, and what they mean by content."""
    recipe = spec.model_recipe(sweep, variant, steps=1, seed=0)
    tokenizer = images or shipped.resolve("tokenizers", recipe.tokenizers.image)
    return {
        "variant": variant.name,
        "seed": seed,
        "tokenizer": list(variant.tokenizer),
        "model": list(variant.model),
        "sampling": recipes.to_dict(spec.sampling(sweep, variant)),
        "tflops": variant.tflops or sweep.tflops,
        "measures": recipes.to_dict(sweep.measures),
        "recipe_sha256": recipe_sha256(recipe),
        "tokenizer_sha256": content_sha256(tokenizer),
    }


def recipe_sha256(recipe: ModelRecipe) -> str:
    """Of all that weights follow from besides the image tokeniser and the seed."""
    content = {k: v for k, v in recipes.to_dict(recipe).items() if k not in _BESIDE}
    # lines of before there were these keys go on counting: all was scored among all
    if not recipe.train.codes_apart:
        del content["train"]["codes_apart"]
    for source in content["data"]["sources"].values():
        if not source["revision"]:
            del source["revision"]
    if (text := recipe.tokenizers.text) not in ("", Tokenizers.text):
        folder = hub.resolve("tokenizers", text, text_tokenizer.FILES)
        content["text"] = text_tokenizer.load(folder).fingerprint()
    return digest(content)


def _check_same(known: dict[str, Any], identity: dict[str, Any], path: Path) -> None:
    of_then = recipes.from_dict(Guided, known.get("sampling") or {}, f"{path}: sampling")
    known = {**known, "sampling": recipes.to_dict(of_then)}  # keys of later have their defaults
    for key, value in identity.items():
        if known.get(key) != value:
            raise CheckpointError(
                f"{path}: variant {identity['variant']} was measured with {key}={known.get(key)},"
                f" not {value}: name another folder with --out, or remove its lines"
            )


def train_run(
    sweep: Sweep, variant: Variant, seed: int, out: Path, images: Path | None
) -> tuple[Path, dict[str, Any]] | None:
    """Trains the variant's weights within the budget, once; None if stopped.

    Gives the run folder and what to note of it: `steps`, `tflops_per_step`, `seconds` (None where
    the run was stopped in between, or had been there) and `parameters`.
    """
    run = out / "runs" / f"{spec.weights_owner(sweep, variant)}-seed{seed}"
    once = spec.model_recipe(sweep, variant, steps=1, seed=0, images=images)
    flops, parameters = count_flops(once)
    steps = max(1, round((variant.tflops or sweep.tflops) * 1e12 / flops))
    recipe = spec.model_recipe(sweep, variant, steps, seed, images)
    begun = (run / checkpoint.RECIPE_FILE).exists()
    clock = time.perf_counter()
    if not train(recipe, run, resume=begun):
        return None
    seconds = None if begun else time.perf_counter() - clock
    noted = {"steps": steps, "tflops_per_step": flops / 1e12, "parameters": parameters}
    return run, {**noted, "seconds": seconds}


def count_flops(recipe: ModelRecipe) -> tuple[float, int]:
    """FLOPs of one update's forward and backward pass, and the number of parameters.

    The mean over the first batches of the stream, on the CPU, where `sdpa` goes document by
    document in products that torch's counter knows: the same count on every machine.
    """
    machine.prepare(recipe.train.threads)
    plain = replace(
        recipe, train=replace(recipe.train, attention="sdpa", precision="fp32", compile=False)
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(plain, Path(folder))
        model = trainer.transformer.cpu()
        batches = [trainer.loader.batch().to("cpu") for _ in range(_COUNTED)]
        with FlopCounterMode(display=False) as counter:
            for packed in batches:
                made = loss(
                    *(model, packed),
                    text_weight=recipe.train.text_weight,
                    soft_labels=recipe.train.soft_labels,
                    codes_apart=recipe.train.codes_apart,
                )
                made.total.backward()
        parameters = sum(p.numel() for p in model.parameters())
    return counter.get_total_flops() / _COUNTED, parameters
