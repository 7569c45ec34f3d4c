"""Adapters that are no low-rank term: products with the weight, rotations, Hadamard and Kronecker products.

Shapes: o = out_features, i = in_features, r = rank, c = number of blocks, b = side of a block, j = rows of a block.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float64
from torch import Tensor

from kasa_cli.errors import InvalidInput
from kasa_cli.methods.adapter_kinds.change import Change, Map, Term, right_factor, scaled_rows
from kasa_cli.methods.adapter_kinds.kind import Given, Kind, Setting, spec
from kasa_cli.methods.adapter_kinds.lora import ALPHA, orthonormal

Columns = tuple[Float64[Tensor, " o"], Float64[Tensor, " o"]]


def ia3(x: Given) -> Change:
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


def hra(x: Given) -> Change:
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


def oft(x: Given) -> Change:
    """OFT, arXiv 2306.07280 and 2506.19847:  W' = W R^T, R of orthogonal blocks from skew-symmetric ones.

    In an embedding it turns the embedding, which is W's output: W' = R^T W.
    """
    side = x.module.out_features if x.is_embedding else x.module.in_features
    angles, settings = x["R"], x.settings
    num_free = angles.shape[1]
    b = (1 + math.isqrt(8 * num_free + 1)) // 2
    c = side // b
    if c * b != side or len(angles) not in (1, c) or num_free != b * (b - 1) // 2:
        raise InvalidInput(
            f"{len(angles)} blocks of {num_free} angles do not turn {side} numbers", "oft_R.weight"
        )
    Q = skew(angles, b)
    if settings["coft"]:
        Q = _constrained(Q, settings["eps"])
    is_series = settings["use_cayley_neumann"]
    turn = _neumann(Q, settings["num_cayley_neumann_terms"]) if is_series else _cayley(Q)
    turn = turn.expand(c, b, b)
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


def road(x: Given) -> Change:
    """RoAd, arXiv 2409.00119:  W' = R W, b' = R b, R turning and stretching pairs of outputs of one group."""
    group, variant = x.settings["group_size"], x.settings["variant"]
    o = x.module.out_features
    if variant not in ROAD_COLUMNS or group % 2 or o % group:
        raise InvalidInput(f"{variant} in groups of {group} does not turn {o} outputs", "group_size")
    sizes = {"road_1": o // 2, "road_2": o, "road_4": 2 * o}
    if len(x["theta"]) != sizes[variant]:
        raise InvalidInput(f"{len(x['theta'])} angles where {variant} has {sizes[variant]}", "road_theta")
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


def hira(x: Given) -> Change:
    """HiRA (ICLR 2025):  W' = W + W ⊙ (B A), W as it was before any adapter. No scaling."""
    A, B, W = x["A"], x["B"], x.W
    return Change(dense=lambda start, stop: W[start:stop].to(torch.float64) * (B[start:stop] @ A))


def loha(x: Given) -> Change:
    """LoHa, arXiv 2108.06098:  W' = W + alpha/r (B_1 A_1) ⊙ (B_2 A_2)."""
    s = x.settings["alpha"] / x.settings["r"]
    B1, A1, B2, A2 = s * x["B1"], x["A1"], x["B2"], x["A2"]
    return Change(dense=lambda start, stop: (B1[start:stop] @ A1) * (B2[start:stop] @ A2))


def lokr(x: Given) -> Change:
    """LoKr, arXiv 2309.14859:  W' = W + alpha/r C ⊗ D, each of them whole or a product of two."""
    C = _whole_or_product(x, "C") * (x.settings["alpha"] / x.settings["r"])
    D = _whole_or_product(x, "D")
    if (len(C) * len(D), C.shape[1] * D.shape[1]) != (x.module.out_features, x.module.in_features):
        raise InvalidInput(
            f"{tuple(C.shape)} times {tuple(D.shape)} is not the shape of the weight", "lokr_w1, lokr_w2"
        )

    def product(start: int, stop: int) -> Tensor:
        index = torch.arange(start, stop, device=C.device)
        left, right = C[index // len(D)], D[index % len(D)]
        made: Tensor = (left[:, :, None] * right[:, None, :]).flatten(1)
        return made

    return Change(dense=product)


def _whole_or_product(x: Given, letter: str) -> Tensor:
    """A factor of LoKr, from one tensor or from two."""
    whole: Tensor | None
    left: Tensor | None
    right: Tensor | None
    whole, left, right = (x.get(name) for name in (letter, f"{letter}_a", f"{letter}_b"))
    if whole is not None and left is None and right is None:
        return whole
    if whole is None and left is not None and right is not None:
        return torch.mm(left, right)
    raise InvalidInput("a factor must be there whole or as a product of two", LOKR[letter].names[0])


def miss(x: Given) -> Change:
    """MiSS, arXiv 2409.15371:  W'[:, q] = W[:, q] + D[q mod r], D (r x o); in "mini" D repeats along the outputs."""
    D = x["D"]
    if D.ndim == 3:
        return _bat(D, x)
    r, width = D.shape
    o, i = x.module.out_features, x.module.in_features
    if not width or o % width:
        raise InvalidInput(f"{width} columns do not fill {o}", "miss_block")
    eyes = torch.eye(r, dtype=D.dtype, device=D.device).repeat(1, math.ceil(i / r))
    return Change(terms=(Term(D.repeat(1, o // width).T, eyes[:, :i]),))


def _bat(D: Float64[Tensor, "c r r"], x: Given) -> Change:
    """MiSS "bat":  X' = X + X D_c + D_c for each r x r block X of W in the c-th row of blocks."""
    c, r = D.shape[:2]
    if (c * r, x.module.in_features % r) != (x.module.out_features, 0):
        raise InvalidInput(f"blocks of {r} do not fill the weight", "miss_block")

    def moved(X: Tensor, first: int) -> Tensor:
        blocks = X.reshape(-1, r, X.shape[1] // r, r)
        D_here = D[first // r : (first + len(X)) // r]
        added = torch.einsum("carb,cbd->card", blocks, D_here) + D_here[:, :, None, :]
        return X + added.flatten(0, 1).flatten(1)

    return Change(map=moved, grain=r)


GATE = "o 1|1 i"
OFT = {
    "coft": Setting(bool, False),
    "eps": Setting(float, 6e-5),
    "use_cayley_neumann": Setting(bool, True),
    "num_cayley_neumann_terms": Setting(int, 5),
}
LOKR = {
    "C": spec("c1 c2", "lokr_w1"),
    "C_a": spec("c1 r", "lokr_w1_a"),
    "C_b": spec("r c2", "lokr_w1_b"),
    "D": spec("d1 d2", "lokr_w2"),
    "D_a": spec("d1 r", "lokr_w2_a"),
    "D_b": spec("r d2", "lokr_w2_b"),
}

DENSE_KINDS: dict[str, Kind] = {
    "ia3": Kind(ia3, {"l": spec(GATE, "ia3_l")}, "inputs or outputs scaled"),
    "hra": Kind(
        hra,
        {"U": spec("i r", "hra_u")},
        "Householder reflections of the input",
        settings={"r": Setting(int), "apply_GS": Setting(bool, False)},
    ),
    "oft": Kind(
        oft,
        {"R": spec("c n", "oft_R.weight", "oft_embedding_R.weight")},
        "rotations of blocks of the input",
        settings=OFT,
    ),
    "road": Kind(
        road,
        {"theta": spec("n", "road_theta"), "alpha": spec("n", "road_alpha")},
        "rotations of pairs of outputs",
        settings={"variant": Setting(str, "road_1"), "group_size": Setting(int, 64)},
    ),
    "hira": Kind(
        hira,
        {"A": spec("r i", "hira_A", "hira_embedding_A"), "B": spec("o r", "hira_B", "hira_embedding_B")},
        "Hadamard product of the weight and low-rank terms",
        settings={"r": Setting(int)},
        needs_weight=True,
    ),
    "loha": Kind(
        loha,
        {
            "B1": spec("o r", "hada_w1_a"),
            "A1": spec("r i", "hada_w1_b"),
            "B2": spec("o r", "hada_w2_a"),
            "A2": spec("r i", "hada_w2_b"),
        },
        "Hadamard product of two low-rank terms",
        settings=ALPHA,
    ),
    "lokr": Kind(lokr, {}, "Kronecker product", LOKR, ALPHA),
    "miss": Kind(
        miss,
        {"D": spec("r k|c r r", "miss_block")},
        "shards of one small matrix",
        settings={"r": Setting(int)},
    ),
}
