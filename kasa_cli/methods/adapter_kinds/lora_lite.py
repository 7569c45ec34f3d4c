"""The kinds of lora-lite's files (github.com/wassname/lora-lite), read at commit 19888fb. Here s = alpha / r.

Shapes: o = out_features, i = in_features, r = rank, c = number of blocks, b = side of a block.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

import torch
from jaxtyping import Float64
from torch import Tensor

from kasa_cli.errors import InvalidInput
from kasa_cli.methods.adapter_kinds.change import Change, Term
from kasa_cli.methods.adapter_kinds.config_fields import ANY, COUNT, LABEL, NUMBER, Field, one_of, rows
from kasa_cli.methods.adapter_kinds.kind import (
    ALPHA,
    BaseChange,
    ConfigType,
    Inputs,
    Kind,
    Setting,
    Settings,
    Sizes,
    alpha_over_rank,
    always,
    never,
    spec,
)
from kasa_cli.methods.adapter_kinds.lora import dora, lora
from kasa_cli.methods.adapter_kinds.low_rank import DELORA
from kasa_cli.methods.adapter_kinds.multiplying import (
    ROAD_COLUMNS,
    gated_input,
    gated_output,
    reflected,
    road,
    road_rule,
    skew,
)

SMALLEST_SQUARE = 1e-12
"""HRA's: the squared length of a direction counts as no less."""
NONE: Mapping[str, Field] = MappingProxyType({})


def lite_config(*variants: str, fields: Mapping[str, Field] = NONE, ignored: str = "") -> ConfigType:
    """lora-lite's configs of these variants. All have `r` and `alpha`; their own `fields` are needed and kept."""
    common = {
        **rows(ANY, f"target_roles target_names exclude_names layers {ignored}"),
        **rows(LABEL, "variant dtype"),
        "r": COUNT,
        "alpha": NUMBER,
    }
    own = tuple(fields)
    return ConfigType(
        variants, {**common, **fields}, alpha="alpha", required=own, settings=(*own, *ignored.split())
    )


def pissa(x: Inputs) -> Change:
    """PiSSA, arXiv 2404.02948:  W' = W - s B_0 A_0 + s B A, B_0 A_0 the initial product in the dtype of the file.

    The initialisation is not in the file. It was rounded before it was subtracted, so it is recomputed by the same
    float32 decomposition: a more exact one would round some entries otherwise.
    """
    r, s = x.settings["r"], x.scaling
    dtype = x.tensors["A"].dtype
    U, S, Vh = torch.linalg.svd(x.W.to(torch.float32), full_matrices=False)
    root = (S[:r] / s).sqrt()
    B, A = (U[:, :r] * root).to(dtype), (root[:, None] * Vh[:r]).to(dtype)
    subtracted = Term(-s * B.to(torch.float64), A.to(torch.float64))
    return Change(terms=(subtracted, *lora(x).terms))


def hra(x: Inputs) -> Change:
    """HRA, arXiv 2405.17484, on rows u_n:  W' = W Π_n (I - 2 u_n u_n^T / max(‖u_n‖², 1e-12))."""
    U = x["U"].T
    return reflected(U, 2 / U.square().sum(0).clamp_min(SMALLEST_SQUARE))


def antipasto(x: Inputs) -> Change:
    """AntiPaSTO, arXiv 2601.07473:  W' = W - U diag(S) V^T + U diag(S + δ) R V^T, or with U R^T and V^T.

    All of it from the file's own tensors: the directions may have been chosen by data.
    """
    U, S, Vh = x["U"], x["S"], x["Vh"]
    basis, angles = x.settings["rotate_basis"], x.get("rot_T")
    if (angles is None) != (basis == "none") or basis not in ROTATED:
        raise InvalidInput(f"rotate_basis is {basis!r}, which does not fit the tensors", "lora_rot_T")
    U_new, Vh_new = (U, Vh) if angles is None else ROTATED[basis](U, Vh, _rotations(angles, x))
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


def _rotations(angles: Float64[Tensor, "c n"], x: Inputs) -> Float64[Tensor, "c b b"]:
    """Cayley rotations (I - X)^-1 (I + X), X = A / 2, of skew-symmetric A that tanh keeps below an angle."""
    b = x.settings["block_size"]
    limit = 2 * math.tan(x.settings["max_rotation_angle"] / 2)
    X = limit * torch.tanh(skew(angles, b) / (2 * limit)) / 2
    eye = torch.eye(b, dtype=X.dtype, device=X.device).expand_as(X)
    R: Tensor = torch.linalg.solve(eye - X, eye + X)
    return R


def _antipasto_rule(sizes: Sizes, settings: Settings) -> str | None:
    """Rotations in blocks that cover the rank."""
    if "e" not in sizes:
        return None
    side = settings["block_size"]
    is_right = sizes["e"] == side * (side - 1) // 2 and sizes["n"] * side == sizes["r"]
    return None if is_right else f"{sizes['n']} blocks of {side} for rank {sizes['r']}"


def _has_rotation(config: Settings) -> bool:
    return config.get("rotate_basis") != "none"


def lite_road(x: Inputs) -> Change:
    """RoAd under lora-lite's name of its variant."""
    return road(replace(x, settings={**x.settings, "variant": x.settings["road_variant"]}))


# --- rows ---

FACTORS = {"A": spec("r i", "lora_A"), "B": spec("o r", "lora_B")}
RANK = {"r": Setting(int)}

LITE_LORA = Kind(
    "lite-lora",
    lite_config("lora", "eva"),
    FACTORS,
    lora,
    ALPHA,
    scaling=alpha_over_rank,
    factors=("A", "B"),
)
LITE_PISSA = replace(
    LITE_LORA,
    name="lite-pissa",
    config=lite_config("pissa"),
    change=pissa,
    needs_weight=True,
    base=BaseChange.RECOMPUTED,
)
LITE_DORA = replace(
    LITE_LORA,
    name="lite-dora",
    config=lite_config("dora"),
    tensors={**FACTORS, "m": spec("o", "lora_m")},
    change=dora,
    settings={**ALPHA, "init_lora_weights": Setting(object, True)},
    needs_weight=True,
    is_low_rank=never,
)
LITE_DELORA = replace(
    DELORA,
    name="lite-delora",
    config=lite_config("delora", ignored="lambda0"),
    tensors={**FACTORS, "lambda": spec("", "lora_lambda"), "w": spec("i", "lora_wnorm")},
)
LITE_HRA = Kind("lite-hra", lite_config("hra"), {"U": spec("r i", "lora_U")}, hra, RANK)
LITE_IA3 = Kind(
    "lite-ia3",
    lite_config("ia3"),
    {"g": spec("o", "lora_g")},
    lambda x: gated_output(x["g"]),
    is_low_rank=never,
    changes_bias=always,
)
LITE_IA3_FF = Kind(
    "lite-ia3_ff",
    lite_config("ia3_ff"),
    {"g": spec("i", "lora_g")},
    lambda x: gated_input(x["g"]),
    is_low_rank=never,
)
LITE_ROAD = Kind(
    "lite-road",
    lite_config("road", fields={"road_variant": one_of(*ROAD_COLUMNS), "group_size": COUNT}),
    {"theta": spec("s", "lora_road_theta"), "alpha": spec("s", "lora_road_alpha")},
    lite_road,
    {"road_variant": Setting(str, "road_1"), "group_size": Setting(int, 64)},
    rule=road_rule,
    is_low_rank=never,
    changes_bias=always,
)
LITE_ANTIPASTO = Kind(
    "lite-antipasto",
    lite_config(
        "antipasto",
        fields={"block_size": COUNT, "max_rotation_angle": NUMBER, "rotate_basis": one_of(*ROTATED)},
    ),
    {
        "U": spec("o r", "lora_U"),
        "S": spec("r", "lora_S"),
        "Vh": spec("r i", "lora_Vh"),
        "delta_s": spec("r", "lora_delta_s"),
        "rot_T": spec("n e", "lora_rot_T", is_optional=True, when=_has_rotation),
    },
    antipasto,
    {
        **RANK,
        "block_size": Setting(int, 4),
        "max_rotation_angle": Setting(float, 0.5),
        "rotate_basis": Setting(str, "V"),
    },
    rule=_antipasto_rule,
    factors=("Vh", "U"),
    diagonal="delta_s",  # a change of singular values
    base=BaseChange.IN_FACTORS,
)
