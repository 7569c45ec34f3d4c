"""The large end of a spectrum: the dominant singular triplets of a weight.

Shapes: o = out_features, i = in_features, k = short side, t = components, p ≥ t.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from kasa_cli.errors import NumericalError
from kasa_cli.linalg import kernels
from kasa_cli.linalg.bottom import oriented
from kasa_cli.linalg.gram import Gram
from kasa_cli.linalg.lanczos import dominant, start_block
from kasa_cli.linalg.solvers import DENSE_SIDE, PADDING, subspace_doubt

STEPS = 24


@dataclass(frozen=True)
class Tops:
    """The t largest singular triplets, largest first, with canonical signs (see `ends`)."""

    U: Float64[Tensor, "o t"]
    S: Float64[Tensor, " t"]
    V: Float64[Tensor, "i t"]


def tops_of(gram: Gram, t: int) -> Tops:
    """The t largest singular triplets: directions from the Gram matrix, values from the weight itself.

    Raises:
        NumericalError: t is above min(o, i).
    """
    M = gram.frame
    if t > M.num_short:
        raise NumericalError(f"{t} components of {M.num_short}: at most the shorter side")
    Z = _directions(gram, t)
    X, S, Rh = torch.linalg.svd(M.transposed_product(Z), full_matrices=False)
    U, V = oriented(M, (Z @ Rh.T)[:, :t], X[:, :t])
    return Tops(U, S[:t] * M.scale, V)


def _directions(gram: Gram, t: int) -> Float64[Tensor, "k p"]:
    """An orthonormal basis of the dominant directions, with padding."""
    k = gram.frame.num_short
    b, G = min(t + PADDING, k), gram.lend()
    Z: Tensor
    if k <= DENSE_SIDE:
        Z = torch.linalg.eigh(G)[1]
        return Z[:, -b:].flip(1)
    if b * STEPS <= k:
        ritz = dominant(
            lambda X: kernels.symmetric_product(G, X), start_block(k, b, G), b, STEPS, subspace_doubt(t)
        )
        if ritz.has_settled:
            Z = torch.linalg.qr(ritz.vectors)[0]
            return Z
    return kernels.top_pairs(G, b)[1].flip(1)
