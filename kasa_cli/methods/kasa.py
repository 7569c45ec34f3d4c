"""KaSA, arXiv 2412.06071:  W' = W - U_d S_d V_d^T,  h = W' x + (alpha/r) B diag(d) A x.

The t smallest singular components of W are dropped; A (r x i), d (r) and B (o x r) are trained.

Shapes: o = out_features, i = in_features, k = min(o, i), r = adapter rank, t = components dropped.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from kasa_cli.linalg import Ends


@dataclass(frozen=True)
class InitialAdapter:
    """A KaSA adapter before its first training step, as PEFT stores it: float32."""

    A: Float32[Tensor, "r i"]
    B: Float32[Tensor, "o r"]
    diag: Float32[Tensor, " r"]


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters on which the initialisation of an adapter depends."""

    rank: int
    scaling: float
    seed: int


DiagInit = Callable[[Ends, Recipe, torch.Generator], InitialAdapter]


def scaling(alpha: int | float, rank: int, use_rslora: bool) -> float:
    """The factor before B diag(d) A: alpha / r, or alpha / √r with rsLoRA (arXiv 2312.03732).

    >>> scaling(32, 16, use_rslora=False), scaling(32, 16, use_rslora=True)
    (2.0, 8.0)
    """
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def initialise(ends: Ends, recipe: Recipe, init: str, module: str) -> InitialAdapter:
    """The adapter of one module; its random numbers depend on the seed and the module's name alone."""
    return DIAG_INITS[init](ends, recipe, generator_for(recipe.seed, module))


def generator_for(seed: int, name: str) -> torch.Generator:
    """A generator for each name, so that order and selection do not change the values of a tensor."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def randn(ends: Ends, recipe: Recipe, generator: torch.Generator) -> InitialAdapter:
    """The initialisation of PEFT and of the published code: A Kaiming-uniform (a = √5), B zero, d standard normal."""
    A, B = _lora(ends, recipe.rank, generator)
    return InitialAdapter(A, B, torch.randn(recipe.rank, generator=generator, dtype=torch.float32))


def ones(ends: Ends, recipe: Recipe, generator: torch.Generator) -> InitialAdapter:
    """A plain LoRA at the first step: d = 1."""
    A, B = _lora(ends, recipe.rank, generator)
    return InitialAdapter(A, B, torch.ones(recipe.rank, dtype=torch.float32))


def residual(ends: Ends, recipe: Recipe, generator: torch.Generator) -> InitialAdapter:
    """Initialise with the dropped components: A = V_d^T, B = U_d, d = S_d / scaling, the largest r of the t.

    Then W' + scaling B diag(d) A = W when r = t: the model computes what it did before the truncation, and A and B
    are orthonormal. Where fewer than r were dropped (a rule of `COMPATS`), the rest of the rank is initialised as by
    `ones`.
    """
    num_fresh = max(0, recipe.rank - len(ends.S))
    r = recipe.rank - num_fresh
    A, B = _lora(ends, num_fresh, generator)
    return InitialAdapter(
        torch.cat([ends.V.T[:r].to(torch.float32), A]),
        torch.cat([ends.U[:, :r].to(torch.float32), B], dim=1),
        torch.cat(
            [(ends.S[:r] / recipe.scaling).to(torch.float32), torch.ones(num_fresh, dtype=torch.float32)]
        ),
    )


DIAG_INITS: dict[str, DiagInit] = {"randn": randn, "ones": ones, "residual": residual}


def _peft_rank(t: int, out_features: int, in_features: int) -> int:
    """PEFT keeps the min(o, i) - t largest components."""
    return t


def _reference_rank(t: int, out_features: int, in_features: int) -> int:
    """The published code keeps i - t components, so that a wide layer (i ≥ o + t) keeps everything.

    >>> _reference_rank(4, 48, 64), _reference_rank(4, 64, 48), _reference_rank(4, 62, 64)
    (0, 4, 2)
    """
    return max(0, min(out_features, in_features) - (in_features - t))


COMPATS: dict[str, Callable[[int, int, int], int]] = {"peft": _peft_rank, "reference": _reference_rank}
"""Number of components that a rule drops, from (t, out_features, in_features)."""


def tail(ends: Ends) -> tuple[Float32[Tensor, "t i"], Float32[Tensor, "o t"]]:
    """The truncation as a plain LoRA of rank t and scaling 1 on the untouched base: A = V_d^T, B = -U_d S_d."""
    A = ends.V.T.to(torch.float32).contiguous()
    return A, (ends.U * -ends.S).to(torch.float32).contiguous()


def truncation(ends: Ends) -> tuple[Float64[Tensor, "o t"], Float64[Tensor, "t i"]]:
    """The term of the truncation: W' = W + L R with L = -U_d S_d and R = V_d^T."""
    return ends.U * -ends.S, ends.V.T


def _lora(
    ends: Ends, rank: int, generator: torch.Generator
) -> tuple[Float[Tensor, "r i"], Float[Tensor, "o r"]]:
    """LoRA's initialisation: A uniform in ±1/√i (Kaiming with a = √5), B zero."""
    in_features = len(ends.V)
    A = (
        torch.rand(rank, in_features, generator=generator, dtype=torch.float32)
        .mul_(2)
        .sub_(1)
        .div_(math.sqrt(in_features))
    )
    return A, torch.zeros(len(ends.U), rank, dtype=torch.float32)
