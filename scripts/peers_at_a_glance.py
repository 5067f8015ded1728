"""Every row of "At a glance" in docs/peers.md, from nothing: tokenisers, runs, judging, one table.

    python scripts/peers_at_a_glance.py runs/glance [key=value ...]

Rows differ in the codes that they draw, so each is a `mmrdpm bench peers` in a folder of its own,
some 15 to 30 minutes of two quiet CPU cores a run. Stopped, the same command goes on. Overrides
hold for all, as `budget.flops=1e10 judging.concepts=20` for a trial, which needs another folder:
what has been judged in one is kept.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

RECIPE, BASE = "recipes/peers/emoji.yaml", "recipes/ablations/tokenizer.yaml"
FOUR = ("num_timesteps=4", "codebook_size=4096")
FIVE = ("num_timesteps=5", "codebook_size=4096")
NO_NOISE = ("trajectory=residual", "num_timesteps=3", "codebook_size=8192")
FIXED = (  # what has a use only where the noise is new at every sight
    *("ours.ffn=364", "ours.noise_pool=1", "ours.preconditioning=false", "ours.places=false"),
    *("ours.soft_labels=0", "ours.steps_per_image=4", "ours.batch_size=32"),
    *("ours.sees_start_noise=true", "ours.expected_steps=0", "ours.codes_apart=false"),
)
OF_4096 = "ours.ffn=592"  # the table of 4,096 codes takes from the layers
SEEN, DRAWN = "ours.sees_start_noise=true", "ours.expected_steps=0"
AMONG_ALL = "ours.codes_apart=false"


def grid(scales: str, temperatures: str = "0.4") -> tuple[str, str]:
    """What a row is judged at."""
    return f"judging.guidance_scales=[{scales}]", f"judging.temperatures=[{temperatures}]"


# name: peer, codes of its own or None, and what it is learned and judged with
ROWS: dict[str, tuple[str, tuple[str, ...] | None, tuple[str, ...]]] = {
    "masked": ("masked", None, grid("1.0,1.5,2.0")),
    "ours-apart-four": ("ours", FOUR, (OF_4096, *grid("1.0,1.25,1.5"))),
    "ours-seen-four": ("ours", FOUR, (OF_4096, AMONG_ALL, SEEN, *grid("1.0,1.25,1.5"))),
    "ours-blind-four": ("ours", FOUR, (OF_4096, AMONG_ALL, *grid("1.0,1.25,1.5"))),
    "scales-four-levels": ("scales", None, ("equal.levels=4", *grid("1.0,1.5,2.0", "0.2,0.4"))),
    "ours-blind-five": (
        *("ours", FIVE),
        (OF_4096, AMONG_ALL, "ours.expected_steps=3", *grid("1.0,1.5,2.0", "0.2")),
    ),
    "ours-no-noise-three": ("ours", NO_NOISE, (*FIXED, *grid("1.0,1.5", "0.2,0.4"))),
    "causal-flow": ("causal_flow", None, ("causal_flow.steps=[10]", *grid("1.5,2.0,4.0"))),
    "raster-four-levels": ("raster", None, ("equal.levels=4", *grid("1.0,1.5", "0.1,0.2"))),
    "raster": ("raster", None, grid("1.0,1.5", "0.1,0.2,0.4")),
    "flow": ("flow", None, ("flow.steps=[10]", *grid("1.5,2.0,4.0"))),
    "ours-blind-ten": ("ours", None, (AMONG_ALL, *grid("1.0,1.25,1.5"))),
    "ours-seen-five-drawn": (
        *("ours", FIVE),
        (OF_4096, AMONG_ALL, SEEN, DRAWN, *grid("1.5,2.0", "0.2,0.4")),
    ),
    "ours-seen-ten-drawn": ("ours", None, (AMONG_ALL, SEEN, DRAWN, *grid("1.5,2.0", "0.2,0.4"))),
    "transfusion": ("transfusion", None, ("transfusion.steps=[50]", *grid("1.5,2.0,4.0"))),
}


def main(out: Path, overrides: list[str]) -> None:
    for name, (peer, codes, how) in ROWS.items():
        settings = [*how, *overrides]
        if codes:
            settings.append(f"tokenizers.image={tokenizer(out, codes)}")
        print(f"== {name}", file=sys.stderr)
        called(
            "-m", "mmrdpm", "bench", "peers", RECIPE, "--out", out / name, "--only", peer, *settings
        )
        judged = out / name / "held-out.jsonl"
        if not judged.exists():
            script = "scripts/peer_held_out.py"
            lines = called(script, out / name, peer, *how, *overrides, keep=True)
            partial = judged.with_suffix(".partial")
            partial.write_text(lines, encoding="utf-8")
            partial.replace(judged)
    print(table(out))


def tokenizer(out: Path, codes: tuple[str, ...]) -> Path:
    """The folder of one with these codes, fitted if it is not there."""
    folder = out / "tokenizers" / "-".join(code.partition("=")[2] for code in codes)
    if not (folder / "tokenizer.safetensors").exists():
        resume = ["--resume"] if (folder / "recipe.yaml").exists() else []
        keys = [f"tokenizer.{code}" for code in codes]
        called("-m", "mmrdpm", "tokenizer", "train", BASE, "--run", folder, *resume, *keys)
    return folder


def called(*command: Any, keep: bool = False) -> str:
    """Runs Python with these arguments; ends with its status where it fails."""
    pipe = subprocess.PIPE if keep else sys.stderr
    done = subprocess.run([sys.executable, *map(str, command)], stdout=pipe, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def table(out: Path) -> str:
    """Markdown, a row each, best first: at what named most training concepts, then lowest KID."""
    lines = []
    for name, (peer, _, _) in ROWS.items():
        results = json.loads((out / name / peer / "results.json").read_text(encoding="utf-8"))
        text = (out / name / "held-out.jsonl").read_text(encoding="utf-8")
        judged = [json.loads(line) for line in text.splitlines()]
        ways = [line for line in judged if line["split"] == "train"]
        best = min(ways, key=lambda way: (-way["top10"], way["kid"]))
        settings = ("steps", "guidance_scale", "temperature")
        (tones,) = (
            line
            for line in judged
            if line["split"] == "held_out_tone" and all(line[k] == best[k] for k in settings)
        )
        cells = [
            name,
            f"{best['top10']:.1%} / {best['top1']:.1%}",
            f"{1000 * best['kid']:.0f}",
            f"{tones['top10']:.1%}, {1000 * tones['kid']:.0f}",
            f"{results['parameters'] / 1e6:.2f}M",
            f"{results['tokens_per_image']}, {best['steps']}",
        ]
        lines.append((-best["top10"], best["kid"], "| " + " | ".join(cells) + " |"))
    head = "| row | named | KID | held-out tones, KID | parameters | tokens, passes |\n"
    return head + "|---|" + "---|" * 5 + "\n" + "\n".join(line for *_, line in sorted(lines))


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), sys.argv[2:])
