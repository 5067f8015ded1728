"""Sets the figures of two evaluations side by side, where they were got in the same way."""

from __future__ import annotations

from collections.abc import Iterator

from mmrdpm.errors import UsageError
from mmrdpm.evaluation.figure import Figure, Protocol
from mmrdpm.evaluation.results import Results


def compare(a: Results, b: Results) -> Iterator[str]:
    """A table, a line a figure that both have; then what only one has.

    Raises:
        UsageError: they have no figure in common, or figures of one name with different
            protocols; it names the keys that differ and both values.
    """
    first, second = ({figure.name: figure for figure in r.figures} for r in (a, b))
    common = [name for name in first if name in second]
    if not common:
        raise UsageError("the two evaluations have no figure in common: run the same suite on both")
    for name in common:
        differing = differences(first[name].protocol, second[name].protocol)
        if differing:
            raise UsageError(
                f"{name}: different protocols, not comparable: {'; '.join(differing)}: evaluate"
                " both by one protocol"
            )
    return _table(a, b, [(first[name], second[name]) for name in common])


def differences(a: Protocol, b: Protocol) -> list[str]:
    """`key (a's value, b's value)` of every key that differs."""
    return [
        f"{key} ({_short(a.get(key))}, {_short(b.get(key))})"
        for key in sorted({*a, *b})
        if a.get(key) != b.get(key)
    ]


def _table(a: Results, b: Results, pairs: list[tuple[Figure, Figure]]) -> Iterator[str]:
    width = max(len(x.name) for x, _ in pairs)
    first, second = (f"{r.model} {r.weights_sha256[:8]}" for r in (a, b))
    yield f"{'':{width}}  A {first:<26}B {second}"
    for x, y in pairs:
        apart = x.interval[1] < y.interval[0] or y.interval[1] < x.interval[0]
        mark = "  intervals apart" if apart else ""
        yield f"{x.name:{width}}  {_cell(x):<28}{_cell(y):<28}{x.unit}{mark}".rstrip()
    common = {x.name for x, _ in pairs}
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
