"""The row of figures and the curve of one weight, from all its singular values."""

import numpy as np
from torch import Tensor

from kasa_cli.linalg import EPS, quantities
from kasa_cli.pipeline.measuring import Bench
from kasa_cli.report import Curve, SpectrumRow, by_module_type

RANKS = (1, 8, 16, 32, 64, 128, 256)
SKETCH = 24
CURVE = 128


def spectrum_row(bench: Bench, module: str, module_type: str) -> tuple[SpectrumRow, Tensor]:
    """The figures of one weight, and all its singular values."""
    weight, spectrum, extremes = bench.weight, bench.values(), bench.extremes()
    S = spectrum.S
    edge = quantities.marchenko_pastur(S, weight.shape)
    tail = quantities.power_law(S)
    row = SpectrumRow(
        name=weight.name,
        module=module,
        module_type=module_type,
        shape=weight.shape,
        dtype=weight.dtype,
        sigma_max=extremes.sigma_max,
        sigma_min=extremes.sigma_min,
        kappa=extremes.kappa,
        frobenius=extremes.frobenius,
        nuclear=quantities.nuclear(S),
        stable_rank=quantities.stable_rank(S),
        effective_rank=quantities.effective_rank(S),
        entropy=quantities.entropy(S),
        numerical_rank=quantities.numerical_rank(S, weight.shape, EPS),
        energy={str(rank): quantities.energy(S, rank) for rank in RANKS if rank < len(S)},
        mp_sigma=edge.sigma,
        mp_edge=edge.upper,
        mp_above=edge.above,
        power_law_alpha=tail.alpha if tail else None,
        power_law_xmin=tail.xmin if tail else None,
        power_law_tail=tail.tail if tail else None,
        solver=spectrum.solver,
        sketch=tuple(float(S[index]) for index in spread(len(S), SKETCH)),
    )
    return row, S


def curve(name: str, S: Tensor) -> Curve:
    """Some of the values, at indices that are evenly spaced on a log axis from both ends."""
    indices = curve_indices(len(S))
    return Curve(name, tuple(index + 1 for index in indices), tuple(float(S[index]) for index in indices))


def spread(count: int, num_points: int) -> list[int]:
    """At most `num_points` indices of a list, at equal steps from the first to the last.

    >>> spread(100, 4), spread(2, 4)
    ([0, 33, 66, 99], [0, 1])
    """
    return sorted({round(float(step)) for step in np.linspace(0, count - 1, min(num_points, count))})


def curve_indices(count: int) -> list[int]:
    """Indices dense at both ends, where a spectrum bends.

    >>> curve_indices(3)
    [0, 1, 2]
    """
    from_top = {round(float(x)) - 1 for x in np.geomspace(1, count, min(CURVE // 2, count))}
    return sorted(from_top | {count - 1 - index for index in from_top})


def best_and_worst(rows: list[SpectrumRow]) -> dict[str, tuple[str, str]]:
    """The names of the smallest and the largest κ of each module type that has several."""
    groups = by_module_type(rows)
    ordered = {
        kind: sorted(group, key=lambda row: row.kappa) for kind, group in groups.items() if len(group) > 1
    }
    return {kind: (group[0].name, group[-1].name) for kind, group in ordered.items()}
