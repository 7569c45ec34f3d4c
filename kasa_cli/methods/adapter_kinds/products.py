"""Adapters made of products: Hadamard and Kronecker products, and MiSS's shards of one small matrix.

Shapes: o = out_features, i = in_features, r = rank, c = number of blocks.
"""

import math

import torch
from jaxtyping import Float64
from torch import Tensor

from kasa_cli.methods.adapter_kinds.change import Change, Term
from kasa_cli.methods.adapter_kinds.config_fields import (
    ANY,
    BIAS,
    COMMON,
    COUNT,
    FLAG,
    LYCORIS_FIELDS,
    RANKS,
    one_of,
    rows,
)
from kasa_cli.methods.adapter_kinds.kind import (
    ALPHA,
    ConfigType,
    Inputs,
    Kind,
    Setting,
    Settings,
    Sizes,
    alpha_over_rank,
    never,
    spec,
)

# --- HiRA ---


def hira(x: Inputs) -> Change:
    """HiRA (ICLR 2025):  W' = W + W ⊙ (B A), W as it was before any adapter. No scaling."""
    A, B, W = x["A"], x["B"], x.W
    return Change(dense=lambda start, stop: W[start:stop].to(torch.float64) * (B[start:stop] @ A))


HIRA = Kind(
    "hira",
    ConfigType(
        ("HIRA",),
        {**COMMON, "r": COUNT, "hira_dropout": ANY, "fan_in_fan_out": FLAG, "rank_pattern": RANKS},
        settings=("fan_in_fan_out",),
    ),
    {"A": spec("r i", "hira_A", "hira_embedding_A"), "B": spec("o r", "hira_B", "hira_embedding_B")},
    hira,
    {"r": Setting(int)},
    needs_weight=True,
    factors=("A", "B"),
    is_low_rank=never,
)

# --- LoHa ---


def loha(x: Inputs) -> Change:
    """LoHa, arXiv 2108.06098:  W' = W + alpha/r (B_1 A_1) ⊙ (B_2 A_2)."""
    B1, A1, B2, A2 = x.scaling * x["B1"], x["A1"], x["B2"], x["A2"]
    return Change(dense=lambda start, stop: (B1[start:stop] @ A1) * (B2[start:stop] @ A2))


LOHA = Kind(
    "loha",
    ConfigType(("LOHA",), LYCORIS_FIELDS, alpha="alpha"),
    {
        "B1": spec("o r", "hada_w1_a"),
        "A1": spec("r i", "hada_w1_b"),
        "B2": spec("o r", "hada_w2_a"),
        "A2": spec("r i", "hada_w2_b"),
    },
    loha,
    ALPHA,
    scaling=alpha_over_rank,
    is_low_rank=never,
)

# --- LoKr ---


def lokr(x: Inputs) -> Change:
    """LoKr, arXiv 2309.14859:  W' = W + alpha/r C ⊗ D, each of them whole or a product of two."""
    C = _whole_or_product(x, "C") * x.scaling
    D = _whole_or_product(x, "D")

    def product(start: int, stop: int) -> Tensor:
        index = torch.arange(start, stop, device=C.device)
        left, right = C[index // len(D)], D[index % len(D)]
        rows: Tensor = (left[:, :, None] * right[:, None, :]).flatten(1)
        return rows

    return Change(dense=product)


def _whole_or_product(x: Inputs, letter: str) -> Tensor:
    """A factor of LoKr, from one tensor or from two."""
    whole = x.get(letter)
    return torch.mm(x[f"{letter}_a"], x[f"{letter}_b"]) if whole is None else whole


def _lokr_sides(sizes: Sizes) -> tuple[int, int]:
    """The sides of the Kronecker product."""
    return sizes["a"] * sizes["b"], sizes["c"] * sizes["d"]


def _lokr_rule(sizes: Sizes, _settings: Settings) -> str | None:
    sides = _lokr_sides(sizes)
    shape = (sizes.get("o", sides[0]), sizes.get("i", sides[1]))
    return None if sides == shape else f"the product is {list(sides)}, the weight {list(shape)}"


LOKR = Kind(
    "lokr",
    ConfigType(("LOKR",), LYCORIS_FIELDS, alpha="alpha"),
    {
        "C": spec("a c", "lokr_w1", is_optional=True),
        "C_a": spec("a r", "lokr_w1_a", is_optional=True),
        "C_b": spec("r c", "lokr_w1_b", is_optional=True),
        "D": spec("b d", "lokr_w2", is_optional=True),
        "D_a": spec("b r", "lokr_w2_a", is_optional=True),
        "D_b": spec("r d", "lokr_w2_b", is_optional=True),
    },
    lokr,
    ALPHA,
    scaling=alpha_over_rank,
    groups=(
        ("lokr_w1", "lokr_w2"),
        ("lokr_w1", "lokr_w2_a", "lokr_w2_b"),
        ("lokr_w1_a", "lokr_w1_b", "lokr_w2"),
        ("lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"),
    ),
    rule=_lokr_rule,
    sides=_lokr_sides,
    is_low_rank=never,
)

# --- MiSS ---


def miss(x: Inputs) -> Change:
    """MiSS, arXiv 2409.15371:  W'[:, q] = W[:, q] + D[q mod r], D (r x o); in "mini" D repeats along the outputs."""
    D = x["D"]
    if D.ndim == 3:
        return _bat(D, x)
    r, width = D.shape
    o, i = x.module.out_features, x.module.in_features
    eyes = torch.eye(r, dtype=D.dtype, device=D.device).repeat(1, math.ceil(i / r))
    return Change(terms=(Term(D.repeat(1, o // width).T, eyes[:, :i]),))


def _bat(D: Float64[Tensor, "c r r"], x: Inputs) -> Change:
    """MiSS "bat":  X' = X + X D_c + D_c for each r x r block X of W in the c-th row of blocks."""
    r = D.shape[1]

    def moved(X: Tensor, first: int) -> Tensor:
        blocks = X.reshape(-1, r, X.shape[1] // r, r)
        D_here = D[first // r : (first + len(X)) // r]
        added = torch.einsum("carb,cbd->card", blocks, D_here) + D_here[:, :, None, :]
        return X + added.flatten(0, 1).flatten(1)

    return Change(map=moved, grain=r)


def _miss_shape(settings: Settings) -> str:
    return {"bat": "n r r", "mini": "r q"}.get(str(settings.get("init_weights")), "r o")


def _miss_rule(sizes: Sizes, settings: Settings) -> str | None:
    """Blocks divide the sides."""
    r, o, i, form = sizes["r"], sizes.get("o"), sizes.get("i"), settings.get("init_weights")
    if i is not None and r > i:
        return f"rank {r} for {i} inputs"
    if form == "mini" and (sizes["q"] != settings.get("mini_r") or (o is not None and o % sizes["q"])):
        return f"mini_r is {settings.get('mini_r')}, the tensor has {sizes['q']}, the weight {o}"
    if form == "bat" and o is not None and i is not None and (sizes["n"] * r != o or i % r):
        return f"blocks of {r} do not divide {o} and {i}"
    return None


MISS = Kind(
    "miss",
    ConfigType(
        ("MISS",),
        {
            **COMMON,
            **rows(COUNT, "r mini_r"),
            "miss_dropout": ANY,
            "bias": BIAS,
            "init_weights": one_of(True, False, "bat", "mini"),
        },
        settings=("mini_r", "init_weights"),
    ),
    {"D": spec(_miss_shape, "miss_block")},
    miss,
    {"r": Setting(int)},
    rule=_miss_rule,
    is_low_rank=lambda settings: settings.get("init_weights") != "bat",
)
