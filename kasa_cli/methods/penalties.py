"""KaSA's penalties, L2 on the diagonal and L3 on the factors, as the three sources have them: β L2 + γ L3.

L2 = Σ d² everywhere. They differ in L3 and in how they combine layers, so the same β and γ have different
effects.

Shapes: o = out_features, i = in_features, r = adapter rank; A (r x i), B (o x r).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kasa_cli.linalg import opposite_defect


@dataclass(frozen=True)
class Layer:
    """The quantities of one layer that the penalties need: L2, ‖A Aᵀ - I_r‖_F, ‖Bᵀ B - I_r‖_F, the shape and the
    rank."""

    l2: float
    defect_a: float
    defect_b: float
    shape: tuple[int, int]
    rank: int


@dataclass(frozen=True)
class Convention:
    """One source: its L3 of a layer, and whether it takes the mean over the layers or the sum."""

    l3: Callable[[Layer], float]
    is_mean: bool


@dataclass(frozen=True)
class Penalty:
    """The addition of a convention to the loss: `loss` = β `l2` + γ `l3`, each a sum or a mean over the layers."""

    l2: float
    l3: float
    loss: float


def paper(layer: Layer) -> float:
    """arXiv 2412.06071:  ‖Bᵀ B - I_r‖_F² + ‖A Aᵀ - I_r‖_F²."""
    return layer.defect_b**2 + layer.defect_a**2


def peft(layer: Layer) -> float:
    """PEFT, `LoraModel._get_kasa_loss`:  ‖Bᵀ B - I_r‖_F + ‖A Aᵀ - I_r‖_F."""
    return layer.defect_b + layer.defect_a


def reference(layer: Layer) -> float:
    """The published code, github.com/juyongjiang/KaSA:  ‖Aᵀ A - I_i‖_F + ‖B Bᵀ - I_o‖_F.

    The Gram matrices of the long sides: never less than √(i - r) + √(o - r).
    """
    o, i = layer.shape
    return opposite_defect(layer.defect_a, i, layer.rank) + opposite_defect(layer.defect_b, o, layer.rank)


CONVENTIONS: dict[str, Convention] = {
    "paper": Convention(paper, is_mean=False),
    "peft": Convention(peft, is_mean=False),
    "reference": Convention(reference, is_mean=True),
}


def penalties(layers: Sequence[Layer], beta: float, gamma: float) -> dict[str, Penalty]:
    """The penalty of these layers by each convention."""
    return {name: _penalty(convention, layers, beta, gamma) for name, convention in CONVENTIONS.items()}


def _penalty(convention: Convention, layers: Sequence[Layer], beta: float, gamma: float) -> Penalty:
    number = max(1, len(layers)) if convention.is_mean else 1
    l2 = sum(layer.l2 for layer in layers) / number
    l3 = sum(convention.l3(layer) for layer in layers) / number
    return Penalty(l2, l3, beta * l2 + gamma * l3)
