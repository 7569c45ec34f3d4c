"""Rounds an exact sum to the stored dtype once: to the nearest, or so that the truncation survives.

Shapes: o = out_features, i = in_features, t = components dropped, j = columns of a block.
"""

import math
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

BLOCK_BYTES = 512 << 10
"""Float64 bytes of a block of the exact sum: bounds the memory, and fits the cache of one core."""
COLUMNS = 128
"""Columns in a block of `preserve`, whatever their length."""
BITS: dict[torch.dtype, torch.dtype] = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
LOOK = 1024
"""Entries searched together for one that is halfway."""
HALFWAY = torch.iinfo(torch.int16).min
"""The low 16 bits of a float32 that lies halfway between two bfloat16 numbers. The high 16 bits have this value only
in -0 and the smallest negative denormals, for which the second pass costs time and changes nothing."""
CAUTION = 1.0
"""Price of rounding error outside the dropped directions, relative to error inside them.

On a 2048 x 2048 Gaussian in bfloat16, t = 16: at 1 the error inside falls 31 times for 1.5 times the error
outside; at 0.25, 40 times for 1.7; at 4, 15 times for 1.4 (benchmarks/realised.py --caution).
"""

Rounding = Callable[["ExactSum", Float64[Tensor, "i t"], torch.dtype], Float[Tensor, "o i"]]


class ExactSum:
    """The exact sum W + L R before rounding, in float64, a block of rows or columns at a time."""

    def __init__(self, W: Float[Tensor, "o i"], L: Float64[Tensor, "o t"], R: Float64[Tensor, "t i"]) -> None:
        self.W, self.L, self.R = W, L, R

    def columns(self, start: int, stop: int) -> Float64[Tensor, "o j"]:
        """Columns [start, stop) of the sum."""
        return torch.addmm(self.W[:, start:stop].to(torch.float64), self.L, self.R[:, start:stop])

    def rows(self, start: int, stop: int) -> Float64[Tensor, "j i"]:
        """Rows [start, stop) of the sum."""
        return torch.addmm(self.W[start:stop].to(torch.float64), self.L[start:stop], self.R)


def nearest(target: ExactSum, V: Float64[Tensor, "i t"], dtype: torch.dtype) -> Float[Tensor, "o i"]:
    """Each entry to the nearest representable number, ties to even."""
    Q = torch.empty(target.W.shape, dtype=dtype, device=target.W.device)
    for start, stop in blocks(*Q.shape):
        Q[start:stop] = rounded(target.rows(start, stop), dtype)
    return Q


def preserve(target: ExactSum, V: Float64[Tensor, "i t"], dtype: torch.dtype) -> Float[Tensor, "o i"]:
    """Each entry to one of its two neighbours, so that the rounding error stays out of the directions V.

    Column by column, each row carries e = (Q - T) V and takes the neighbour with the smaller
    |e + δ v|² + λ δ², δ being the error of that entry, v the row of V and λ = CAUTION · t / i. A row that
    does not improve on rounding to nearest keeps the nearest values: no row is worse in the dropped directions.
    """
    Q = nearest(target, V, dtype)
    greedy = torch.empty_like(Q)
    e = V.new_zeros(len(Q), V.shape[1])
    e_nearest = torch.zeros_like(e)
    price = V.square().sum(1) + CAUTION * V.shape[1] / len(V)
    for start, stop in blocks(len(V), len(Q), COLUMNS):
        T = target.columns(start, stop)
        near = Q[:, start:stop]
        e_nearest += (near.to(torch.float64) - T) @ V[start:stop]
        greedy[:, start:stop] = _choose(T, near, V[start:stop], price[start:stop], e)
    is_better = e.square().sum(1) < e_nearest.square().sum(1)
    return torch.where(is_better[:, None], greedy, Q)


ROUNDINGS: dict[str, Rounding] = {"nearest": nearest, "preserve": preserve}


def rounded(T: Float64[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "..."]:
    """A cast that rounds once.

    >>> rounded(torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64), torch.bfloat16)
    tensor([1.0078], dtype=torch.bfloat16)
    """
    return T.to(dtype) if dtype.itemsize > 2 else on_the_way(T, dtype).to(dtype)


def on_the_way(
    T: Float64[Tensor, "..."], dtype: torch.dtype, near: Tensor | None = None
) -> Float32[Tensor, "..."]:
    """A float32 near T which torch rounds to half precision as T itself would round; written to `near` if given.

    torch casts float64 to half precision by way of float32, and two roundings to nearest can end on the farther
    neighbour. Rounding to odd first keeps the bit that the second rounding needs (Boldo and Melquiond, 2008).
    """
    near = torch.empty(T.shape, dtype=torch.float32, device=T.device) if near is None else near
    near.copy_(T)
    if dtype != torch.bfloat16:
        return near.copy_(rounded_to_odd(T, near))
    # The first rounding misleads the second only where it ends halfway between two neighbours: 1 in 65536.
    width = math.gcd(T.numel(), LOOK)
    flat, exact = near.view(-1, width), T.reshape(-1, width)
    misled = (flat.view(torch.int16).amin(1) == HALFWAY).nonzero()[:, 0]
    flat[misled] = rounded_to_odd(exact[misled], flat[misled])
    return near


def rounded_to_odd(T: Float64[Tensor, "..."], near: Float32[Tensor, "..."]) -> Float32[Tensor, "..."]:
    """The float32 neighbour of T whose last bit is 1, or T itself if it is a float32; `near` is the nearest."""
    back = near.to(torch.float64)
    bits = near.view(torch.int32) - (back.abs() > T.abs()).to(torch.int32)
    return (bits | (back != T).to(torch.int32)).view(torch.float32)


def blocks(length: int, width: int, least: int = 16) -> Iterator[tuple[int, int]]:
    """Bounds of consecutive slices of `length` rows, each row of `width` float64 numbers.

    >>> list(blocks(100, 1 << 11))
    [(0, 32), (32, 64), (64, 96), (96, 100)]
    """
    step = max(least, BLOCK_BYTES // (8 * max(width, 1)))
    return ((start, min(start + step, length)) for start in range(0, length, step))


def other_neighbour(Q: Float[Tensor, "..."], T: Float64[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The representable number on the other side of T, for Q the nearest to it; Q where Q = T.

    Steps through the bit pattern, whose magnitude orders as the numbers do; neither to infinity nor back from it.

    >>> other_neighbour(torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.001], dtype=torch.float64))
    tensor([1.0078], dtype=torch.bfloat16)
    """
    bits = Q.contiguous().view(BITS[Q.dtype])
    sign = torch.iinfo(bits.dtype).min
    gap = T - Q.to(torch.float64)
    is_zero = Q == 0
    outward = (gap > 0) == (Q > 0)
    stepped = torch.where(outward, bits + 1, bits - 1)
    smallest = torch.where(gap > 0, 1, sign + 1).to(bits.dtype)
    other = torch.where(is_zero, smallest, stepped).view(Q.dtype)
    return torch.where((gap == 0) | ~torch.isfinite(other) | ~torch.isfinite(Q), Q, other)


def _choose(T: Tensor, near: Tensor, V: Tensor, price: Tensor, e: Tensor) -> Tensor:
    """Round the columns of T in turn; e, the error carried in the dropped directions, is updated in place."""
    far = other_neighbour(near, T)
    d_near = (near.to(torch.float64) - T).T.contiguous()
    d_far = (far.to(torch.float64) - T).T.contiguous()
    # |e + δ v|² + λ δ² = |e|² + 2 δ (e·v) + δ² (|v|² + λ): compare the two by their difference.
    slope = 2 * (d_far - d_near)
    level = (d_far.square() - d_near.square()) * price[:, None]
    takes_far = torch.empty_like(d_near, dtype=torch.bool)
    for j in range(len(V)):
        takes = torch.addcmul(level[j], slope[j], e @ V[j]) < 0
        takes_far[j] = takes
        e.addr_(torch.where(takes, d_far[j], d_near[j]), V[j])
    return torch.where(takes_far.T, far, near)
