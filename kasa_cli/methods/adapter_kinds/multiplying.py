"""Adapters that multiply the weight: scaled and rotated inputs or outputs, reflections.

Shapes: o = out_features, i = in_features, r = rank, c = number of blocks, b = side of a block, j = rows of a block.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from kasa_cli.errors import InvalidInput
from kasa_cli.methods.adapter_kinds.change import Change, Map, right_factor, scaled_rows
from kasa_cli.methods.adapter_kinds.config_fields import (
    ANY,
    BIAS,
    COMMON,
    COUNT,
    FLAG,
    NAMES,
    NUMBER,
    one_of,
    rows,
    version_of,
)
from kasa_cli.methods.adapter_kinds.kind import (
    ConfigType,
    Inputs,
    Kind,
    Setting,
    Settings,
    Sizes,
    always,
    never,
    spec,
)
from kasa_cli.methods.adapter_kinds.lora import orthonormal

Columns = tuple[Float64[Tensor, " o"], Float64[Tensor, " o"]]
FIRST_NEUMANN = (0, 18)
"""The first PEFT whose Cayley-Neumann series is the formula here."""

# --- (IA)³ ---


def ia3(x: Inputs) -> Change:
    """(IA)³, arXiv 2205.05638:  W' = diag(l) W, b' = l b; of a feed-forward layer W' = W diag(l), b' = b."""
    gate = x["l"]
    is_output = gate.shape[1:] == (1,) and len(gate) == x.module.out_features
    return gated_output(gate[:, 0]) if is_output else gated_input(gate[0])


def gated_output(gate: Float64[Tensor, " o"]) -> Change:
    """W' = diag(l) W, b' = l b."""
    return Change(map=scaled_rows(gate), bias_map=lambda b: b * gate)


def gated_input(gate: Float64[Tensor, " i"]) -> Change:
    """W' = W diag(l)."""
    return Change(map=lambda X, first: X * gate)


def _ia3_side(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The shape tells whether inputs are scaled."""
    shape = shapes.get("ia3_l")
    return {} if shape is None else {"feedforward": shape[:1] == (1,) and shape != (1, 1)}


def _ia3_contradiction(config: Settings, module: str, settings: Settings) -> str | None:
    """The config says the side too. A pattern is not matched: the shape is enough."""
    listed = config.get("feedforward_modules")
    if "feedforward" not in settings or isinstance(listed, str):
        return None
    is_listed = any(module.endswith(end) for end in listed or ())
    problem = "ia3_l is of the other side than feedforward_modules says"
    return None if settings["feedforward"] == is_listed else problem


IA3 = Kind(
    "ia3",
    ConfigType(
        ("IA3",),
        {**COMMON, "fan_in_fan_out": FLAG, "feedforward_modules": NAMES, "init_ia3_weights": ANY},
        rank="",
        settings=("fan_in_fan_out",),
    ),
    {"l": spec("o 1|1 i", "ia3_l")},
    ia3,
    read_settings=_ia3_side,
    contradiction=_ia3_contradiction,
    is_low_rank=never,
    changes_bias=lambda settings: not settings.get("feedforward"),
)

# --- HRA ---


def hra(x: Inputs) -> Change:
    """HRA, arXiv 2405.17484:  W' = W Π_n (I - 2 u_n u_n^T / ‖u_n‖²), or W (I - 2 Q Q^T) with Gram-Schmidt."""
    U = x["U"]
    if x.settings["apply_GS"]:
        Q = orthonormal(U, "the vectors of hra_u")
        return right_factor(2 * Q, Q)
    lengths = U.norm(dim=0)
    if not (lengths > 0).all():
        raise InvalidInput("a direction of length zero", "hra_u")
    return reflected(U / lengths, torch.full_like(lengths, 2.0))


def reflected(U: Float64[Tensor, "i r"], tau: Float64[Tensor, " r"]) -> Change:
    """W' = W Π_n (I - τ_n u_n u_n^T) = W - W U T U^T, T triangular (Schreiber and Van Loan, 1989)."""
    T = torch.diag(tau)
    products = U.T @ U
    for n in range(1, len(tau)):
        T[:n, n] = -tau[n] * (T[:n, :n] @ products[:n, n])
    return right_factor(U @ T, U)


HRA = Kind(
    "hra",
    ConfigType(("HRA",), {**COMMON, "r": COUNT, "bias": BIAS, "apply_GS": FLAG}, settings=("apply_GS",)),
    {"U": spec("i r", "hra_u")},
    hra,
    {"r": Setting(int), "apply_GS": Setting(bool, False)},
)

# --- OFT ---


def oft(x: Inputs) -> Change:
    """OFT, arXiv 2306.07280 and 2506.19847:  W' = W R^T, R of orthogonal blocks from skew-symmetric ones.

    In an embedding it turns the embedding, which is W's output: W' = R^T W.
    """
    side = x.module.out_features if x.is_embedding else x.module.in_features
    angles, settings = (x["R_embedding"] if x.is_embedding else x["R"]), x.settings
    b = block_side(angles.shape[1])
    Q = skew(angles, b)
    if settings["coft"]:
        Q = _constrained(Q, settings["eps"])
    is_series = settings["use_cayley_neumann"]
    turn = _neumann(Q, settings["num_cayley_neumann_terms"]) if is_series else _cayley(Q)
    turn = turn.expand(side // b, b, b)
    return Change(map=_turned_rows(turn), grain=b) if x.is_embedding else Change(map=_turned_columns(turn))


def skew(v: Float64[Tensor, "c n"], b: int) -> Float64[Tensor, "c b b"]:
    """Skew-symmetric matrices from their upper triangles, row after row."""
    upper = v.new_zeros(len(v), b, b)
    above, right = torch.triu_indices(b, b, 1)
    upper[:, above, right] = v
    return upper - upper.transpose(1, 2)


def _constrained(Q: Float64[Tensor, "c b b"], eps: float) -> Float64[Tensor, "c b b"]:
    """COFT: no block longer than eps / √c."""
    longest = eps / math.sqrt(len(Q))
    lengths = Q.norm(dim=(1, 2), keepdim=True)
    return torch.where(lengths <= longest, Q, Q * (longest / lengths))


def _cayley(Q: Float64[Tensor, "c b b"]) -> Float64[Tensor, "c b b"]:
    """(I - Q) (I + Q)^-1."""
    eye = torch.eye(Q.shape[1], dtype=Q.dtype, device=Q.device).expand_as(Q)
    R: Tensor = torch.linalg.solve(eye + Q, eye - Q, left=False)
    return R


def _neumann(Q: Float64[Tensor, "c b b"], num_terms: int) -> Float64[Tensor, "c b b"]:
    """I + 2 Q + 2 Q² + … + Q^n, PEFT's approximation of (I + Q) (I - Q)^-1: the inverse of what `_cayley` gives.

    n is one less than the number of terms, but 3 for three of them as for four.
    """
    R = torch.eye(Q.shape[1], dtype=Q.dtype, device=Q.device).expand_as(Q)
    highest = max(3, num_terms - 1) if num_terms > 2 else num_terms - 1
    power = R
    for n in range(1, highest + 1):
        power = power @ Q
        R = R + power * (1 if n == highest and num_terms > 2 else 2)
    return R


def _turned_columns(turn: Float64[Tensor, "c b b"]) -> Map:
    """X R^T, block by block."""
    blocks = turn.transpose(1, 2)
    return lambda X, first: torch.einsum(
        "jcb,cbd->jcd", X.reshape(len(X), *blocks.shape[:2]), blocks
    ).flatten(1)


def _turned_rows(turn: Float64[Tensor, "c b b"]) -> Map:
    """R^T X, block by block."""
    b = turn.shape[1]

    def turned(X: Tensor, first: int) -> Tensor:
        blocks = turn[first // b : (first + len(X)) // b].transpose(1, 2)
        return torch.bmm(blocks, X.reshape(-1, b, X.shape[1])).flatten(0, 1)

    return turned


def block_side(num_entries: int) -> int:
    """The side of a skew-symmetric matrix with that many free entries; 0 if there is none.

    >>> block_side(28), block_side(27)
    (8, 0)
    """
    side = (1 + math.isqrt(1 + 8 * num_entries)) // 2
    return side if side * (side - 1) // 2 == num_entries else 0


def _oft_rule(sizes: Sizes, settings: Settings) -> str | None:
    """Blocks of one size cover the inputs, or the outputs of an embedding."""
    b, side = block_side(sizes["e"]), sizes.get("o" if "m" in sizes else "i")
    if not b:
        return f"{sizes['e']} entries make no rotation"
    if side is None:
        return None
    count, num_blocks = sizes.get("m", sizes.get("n")), 1 if settings.get("block_share") else side // b
    return None if side % b == 0 and count == num_blocks else f"{count} blocks of {b} for {side} inputs"


def _oft_block(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    rotation = next(iter(shapes.values()))
    return {"oft_block_size": block_side(rotation[-1]) if rotation else 0}


def _oft_contradiction(config: Settings, _module: str, _settings: Settings) -> str | None:
    if config.get("use_cayley_neumann") and version_of(config) < FIRST_NEUMANN:
        return "the Cayley-Neumann series of a PEFT before 0.18 has another formula: merge it with that PEFT"
    return None


OFT = Kind(
    "oft",
    ConfigType(
        ("OFT",),
        {
            **COMMON,
            **rows(FLAG, "fan_in_fan_out coft block_share use_cayley_neumann"),
            **rows(NUMBER, "r eps num_cayley_neumann_terms oft_block_size"),
            "module_dropout": ANY,
            "bias": BIAS,
        },
        rank="",
        required=("oft_block_size", "use_cayley_neumann", "num_cayley_neumann_terms"),
        settings=(
            "fan_in_fan_out",
            "coft",
            "eps",
            "block_share",
            "use_cayley_neumann",
            "num_cayley_neumann_terms",
        ),
    ),
    {
        "R": spec("n e", "oft_R.weight", is_optional=True),
        "R_embedding": spec("m e", "oft_embedding_R.weight", is_optional=True),
    },
    oft,
    {
        "coft": Setting(bool, False),
        "eps": Setting(float, 6e-5),
        "use_cayley_neumann": Setting(bool, True),
        "num_cayley_neumann_terms": Setting(int, 5),
    },
    groups=(("oft_R.weight",), ("oft_embedding_R.weight",)),
    rule=_oft_rule,
    read_settings=_oft_block,
    contradiction=_oft_contradiction,
    is_low_rank=never,
)

# --- RoAd ---


def road(x: Inputs) -> Change:
    """RoAd, arXiv 2409.00119:  W' = R W, b' = R b, R turning and stretching pairs of outputs of one group."""
    group, variant = x.settings["group_size"], x.settings["variant"]
    along, across = ROAD_COLUMNS[variant](x["theta"], x["alpha"], group)

    def turned(X: Tensor, first: int) -> Tensor:
        halves = X.reshape(-1, 2, group // 2, X.shape[1])
        other = torch.stack((-halves[:, 1], halves[:, 0]), dim=1).flatten(0, 2)
        here = slice(first, first + len(X))
        return X * along[here, None] + other * across[here, None]

    return Change(map=turned, grain=group, bias_map=lambda b: turned(b[:, None], 0)[:, 0])


def _road_1(theta: Tensor, alpha: Tensor, group: int) -> Columns:
    """One angle and one length a pair."""
    theta, alpha = (v.reshape(-1, group // 2).repeat_interleave(2, dim=0).flatten() for v in (theta, alpha))
    return alpha * theta.cos(), alpha * theta.sin()


def _road_2(theta: Tensor, alpha: Tensor, group: int) -> Columns:
    """One angle and one length an output."""
    return alpha * theta.cos(), alpha * theta.sin()


def _road_4(theta: Tensor, alpha: Tensor, group: int) -> Columns:
    """One angle and one length an entry of R."""
    theta, alpha = (v.reshape(-1, 2, group) for v in (theta, alpha))
    return (alpha[:, 0] * theta[:, 0].cos()).flatten(), (alpha[:, 1] * theta[:, 1].sin()).flatten()


ROAD_COLUMNS: dict[str, Callable[[Tensor, Tensor, int], Columns]] = {
    "road_1": _road_1,
    "road_2": _road_2,
    "road_4": _road_4,
}


def road_rule(sizes: Sizes, settings: Settings) -> str | None:
    """Angles for pairs of outputs, in groups."""
    o = sizes.get("o")
    if o is None:
        return None
    counts = {"road_1": o // 2, "road_2": o, "road_4": 2 * o}
    variant, group = str(settings.get("road_variant") or settings.get("variant")), settings["group_size"]
    is_right = sizes["s"] == counts.get(variant) and group % 2 == 0 and o % group == 0
    return None if is_right else f"{sizes['s']} angles of {variant} in groups of {group} for {o} outputs"


ROAD = Kind(
    "road",
    ConfigType(
        ("ROAD",),
        {**COMMON, "group_size": COUNT, "variant": one_of(*ROAD_COLUMNS)},
        rank="",
        required=("group_size", "variant"),
        settings=("group_size", "variant"),
    ),
    {"theta": spec("s", "road_theta"), "alpha": spec("s", "road_alpha")},
    road,
    {"variant": Setting(str, "road_1"), "group_size": Setting(int, 64)},
    rule=road_rule,
    is_low_rank=never,
    changes_bias=always,
)
