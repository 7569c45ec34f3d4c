"""What only lora-lite's files hold (github.com/wassname/lora-lite), read at commit 19888fb. Here s = alpha / r.

Shapes: o = out_features, i = in_features, r = rank, c = number of blocks, b = side of a block.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float64
from torch import Tensor

from kasa_cli.errors import InvalidInput
from kasa_cli.methods.adapter_kinds.change import Change, Term
from kasa_cli.methods.adapter_kinds.dense import gated_input, gated_output, reflected, road, skew
from kasa_cli.methods.adapter_kinds.kind import Given, Kind, Setting, spec
from kasa_cli.methods.adapter_kinds.lora import ALPHA, LORA_KINDS, lora

SMALLEST_SQUARE = 1e-12
"""HRA's: the squared length of a direction counts as no less."""


def pissa(x: Given) -> Change:
    """PiSSA, arXiv 2404.02948:  W' = W - s B_0 A_0 + s B A, B_0 A_0 the start in the dtype of the file.

    The start is not in the file. It was rounded before it was taken off, so it is found by the same float32
    decomposition: one that is closer to the truth rounds some entries otherwise.
    """
    r, s = x.settings["r"], x.settings["alpha"] / x.settings["r"]
    dtype = x.tensors["A"].dtype
    U, S, Vh = torch.linalg.svd(x.W.to(torch.float32), full_matrices=False)
    root = (S[:r] / s).sqrt()
    B, A = (U[:, :r] * root).to(dtype), (root[:, None] * Vh[:r]).to(dtype)
    taken = Term(-s * B.to(torch.float64), A.to(torch.float64))
    return Change(terms=(taken, *lora(_plain(x)).terms))


def plain_lora(x: Given) -> Change:
    """LoRA and EVA:  W' = W + s B A."""
    return lora(_plain(x))


def _plain(x: Given) -> Given:
    return replace(x, settings={**x.settings, "use_rslora": False})


def hra(x: Given) -> Change:
    """HRA, arXiv 2405.17484, on rows u_n:  W' = W Π_n (I - 2 u_n u_n^T / max(‖u_n‖², 1e-12))."""
    U = x["U"].T
    return reflected(U, 2 / U.square().sum(0).clamp_min(SMALLEST_SQUARE))


def antipasto(x: Given) -> Change:
    """AntiPaSTO, arXiv 2601.07473:  W' = W - U diag(S) V^T + U diag(S + δ) R V^T, or with U R^T and V^T.

    All of it from the file's own tensors: the directions may have been chosen by data.
    """
    U, S, Vh = x["U"], x["S"], x["Vh"]
    basis, angles = x.settings["rotate_basis"], x.get("rot_T")
    if (angles is None) != (basis == "none") or basis not in ROTATED:
        raise InvalidInput(f"rotate_basis is {basis!r}, which does not fit the tensors", "lora_rot_T")
    U_new, Vh_new = (U, Vh) if angles is None else ROTATED[basis](U, Vh, _rotations(angles, len(S), x))
    return Change(terms=(Term(U * -S, Vh), Term(U_new * (S + x["delta_s"]), Vh_new)))


def _turned_V(U: Tensor, Vh: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:  # noqa: N802
    return U, torch.bmm(R, Vh.reshape(*R.shape[:2], -1)).flatten(0, 1)


def _turned_U(U: Tensor, Vh: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:  # noqa: N802
    return torch.einsum("ocb,cdb->ocd", U.reshape(len(U), *R.shape[:2]), R).flatten(1), Vh


ROTATED: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "V": _turned_V,
    "U": _turned_U,
    "none": lambda U, Vh, R: (U, Vh),
}


def _rotations(angles: Float64[Tensor, "c n"], r: int, x: Given) -> Float64[Tensor, "c b b"]:
    """Cayley rotations (I - X)^-1 (I + X), X = A / 2, of skew-symmetric A that tanh keeps below an angle."""
    b = x.settings["block_size"]
    if (len(angles) * b, 2 * angles.shape[1]) != (r, b * (b - 1)):
        raise InvalidInput(
            f"{len(angles)} blocks of {angles.shape[1]} angles for {r} directions", "lora_rot_T"
        )
    limit = 2 * math.tan(x.settings["max_rotation_angle"] / 2)
    X = limit * torch.tanh(skew(angles, b) / (2 * limit)) / 2
    eye = torch.eye(b, dtype=X.dtype, device=X.device).expand_as(X)
    R: Tensor = torch.linalg.solve(eye - X, eye + X)
    return R


def lite_road(x: Given) -> Change:
    """RoAd under lora-lite's name of its variant."""
    return road(replace(x, settings={**x.settings, "variant": x.settings["road_variant"]}))


FACTORS = {"A": spec("r i", "lora_A"), "B": spec("o r", "lora_B")}
LITE_KINDS: dict[str, Kind] = {
    "lora": Kind(plain_lora, FACTORS, "low-rank terms", settings=ALPHA),
    "eva": Kind(plain_lora, FACTORS, "low-rank terms that began with the inputs' directions", settings=ALPHA),
    "pissa": Kind(
        pissa,
        FACTORS,
        "LoRA that took the largest components off the base",
        settings=ALPHA,
        needs_weight=True,
    ),
    "dora": LORA_KINDS["dora"],
    "delora": LORA_KINDS["delora"],
    "hra": Kind(hra, {"U": spec("r i", "lora_U")}, "Householder reflections", settings={"r": Setting(int)}),
    "ia3": Kind(lambda x: gated_output(x["g"]), {"g": spec("o", "lora_g")}, "outputs scaled"),
    "ia3_ff": Kind(lambda x: gated_input(x["g"]), {"g": spec("i", "lora_g")}, "inputs scaled"),
    "road": Kind(
        lite_road,
        {"theta": spec("n", "lora_road_theta"), "alpha": spec("n", "lora_road_alpha")},
        "rotations of pairs of outputs",
        settings={"road_variant": Setting(str, "road_1"), "group_size": Setting(int, 64)},
    ),
    "antipasto": Kind(
        antipasto,
        {
            "U": spec("o r", "lora_U"),
            "S": spec("r", "lora_S"),
            "Vh": spec("r i", "lora_Vh"),
            "delta_s": spec("r", "lora_delta_s"),
        },
        "the largest singular components, turned and stretched",
        {"rot_T": spec("c n", "lora_rot_T")},
        {
            "r": Setting(int),
            "block_size": Setting(int, 4),
            "max_rotation_angle": Setting(float, 0.5),
            "rotate_basis": Setting(str, "V"),
        },
    ),
}
