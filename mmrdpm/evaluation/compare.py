"""Sets the figures of two evaluations side by side, where they were got in the same way."""

from __future__ import annotations

from collections.abc import Iterator

from mmrdpm.errors import UsageError
from mmrdpm.evaluation.figure import Figure, Protocol
from mmrdpm.evaluation.results import Results


def compare(a: Results, b: Results) -> Iterator[str]:
    """A table, a line a figure that both have by one protocol; then what only one has.

    Raises:
        UsageError: they have no figure in common; or, after the table of the others, some of one
            name have different protocols: it names them, the keys that differ and both values.
    """
    first, second = ({figure.name: figure for figure in r.figures} for r in (a, b))
    common = [name for name in first if name in second]
    if not common:
        raise UsageError("the two evaluations have no figure in common: run the same suite on both")
    differing: dict[str, list[str]] = {}  # what differs -> the names of the figures
    for name in common:
        if keys := differences(first[name].protocol, second[name].protocol):
            differing.setdefault("; ".join(keys), []).append(name)
    refused = {name for names in differing.values() for name in names}
    equal = [(first[name], second[name]) for name in common if name not in refused]
    if equal:
        yield from _table(a, b, equal, refused)
    if differing:
        listed = "; and ".join(f"{', '.join(names)}: {keys}" for keys, names in differing.items())
        raise UsageError(
            f"different protocols, not comparable: {listed}: evaluate both by one protocol"
        )


def differences(a: Protocol, b: Protocol) -> list[str]:
    """`key (a's value, b's value)` of every key that differs."""
    return [
        f"{key} ({_short(a.get(key))}, {_short(b.get(key))})"
        for key in sorted({*a, *b})
        if a.get(key) != b.get(key)
    ]


def _table(
    a: Results, b: Results, pairs: list[tuple[Figure, Figure]], refused: set[str]
) -> Iterator[str]:
    width = max(len(x.name) for x, _ in pairs)
    first, second = (f"{r.model} {r.weights_sha256[:8]}" for r in (a, b))
    yield f"{'':{width}}  A {first:<26}B {second}"
    for x, y in pairs:
        apart = x.interval[1] < y.interval[0] or y.interval[1] < x.interval[0]
        mark = "  intervals apart" if apart else ""
        yield f"{x.name:{width}}  {_cell(x):<28}{_cell(y):<28}{x.unit}{mark}".rstrip()
    common = {x.name for x, _ in pairs} | refused
    for label, results in (("A", a), ("B", b)):
        for figure in results.figures:
            if figure.name not in common:
                yield f"only {label} has {figure.name}"
        for left_out in results.not_computed:
            yield f"{label} did not compute {left_out.part}: {left_out.why}"


def _cell(figure: Figure) -> str:
    value, (low, high) = figure.value, figure.interval
    if figure.unit == "share":
        return f"{value:.1%} [{low:.1%}, {high:.1%}]"
    return f"{value:.4g} [{low:.4g}, {high:.4g}]"


def _short(value: object) -> str:
    text = str(value)
    return text[:8] if len(text) == 64 and " " not in text else text
