"""LoRA, its initialisations, and what PEFT configures as LoRA: KaSA, PiSSA, OLoRA, DoRA. s = alpha / r (or / √r).

Shapes: o = out_features, i = in_features, r = adapter rank.
"""

from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float64
from torch import Tensor

from kasa_cli.errors import InvalidInput, NumericalError
from kasa_cli.linalg import TIE, Ends, Gram, frame_of, tops_of
from kasa_cli.methods import kasa
from kasa_cli.methods.adapter_kinds.change import Change, Term, row_blocks, scaled_rows, sums
from kasa_cli.methods.adapter_kinds.config_fields import LORA_FIELDS
from kasa_cli.methods.adapter_kinds.kind import (
    SCALING,
    BaseChange,
    ConfigType,
    Initialisation,
    Inputs,
    Kind,
    Setting,
    Settings,
    never,
    spec,
)

SMALLEST_ROW = 1e-12
"""A row of V shorter than this stays as it is, where PEFT divides by zero."""
DEPENDENT = 1e-10
"""Columns count as linearly dependent below this share of the largest."""


def scaling(settings: Settings) -> float:
    """alpha / r, or alpha / √r with rsLoRA."""
    return kasa.scaling(settings["alpha"], settings["r"], bool(settings.get("use_rslora")))


def lora(x: Inputs) -> Change:
    """LoRA, arXiv 2106.09685:  W' = W + s B A,  b' = b + s b_B."""
    bias = x.get("bias")
    return Change(terms=(Term(x.scaling * x["B"], x["A"]),), shift=None if bias is None else x.scaling * bias)


def with_diagonal(x: Inputs) -> Change:
    """KaSA's adapter, arXiv 2412.06071: + s B diag(d) A. The first files held diag(d) whole, as an r x r core.

    The truncation of the base is not part of it: see `truncation`.
    """
    d = x["diag"]
    B = x["B"] * d if d.ndim == 1 else x["B"] @ d
    return Change(terms=(Term(x.scaling * B, x["A"]),))


def truncation(bottom: Ends) -> Change:
    """KaSA's truncation, W - U_d S_d V_d^T: of the base, so once for all its adapters, and never weighted."""
    return Change(terms=(Term(*kasa.truncation(bottom)),))


# --- initialisations ---


def _largest(x: Inputs) -> tuple[Term, ...]:
    """PiSSA, arXiv 2404.02948: s B_0 A_0 = U_r S_r V_r^T, the r largest components."""
    r = x.settings["r"]
    if r > min(x.W.shape):
        raise InvalidInput(f"PiSSA of rank {r} on a weight of rank {min(x.W.shape)}")
    top = tops_of(Gram(frame_of(x.W)), min(r + 1, *x.W.shape))
    if len(top.S) > r and top.S[r - 1] - top.S[r] <= TIE * top.S[r - 1]:
        raise NumericalError(
            f"PiSSA of rank {r} splits equal singular values: its initialisation is not known"
        )
    return (Term(top.U[:, :r] * -top.S[:r], top.V[:, :r].T),)


def _first_columns(x: Inputs) -> tuple[Term, ...]:
    """OLoRA, arXiv 2406.01775: s Q_r R_r of W = Q R. Q_r spans the first r columns: their decomposition is enough."""
    if x.module.is_transposed:
        raise InvalidInput("PEFT's OLoRA decomposes the transpose of a Conv1D weight, which does not fit it")
    Q = orthonormal(x.W[:, : x.settings["r"]].to(torch.float64), "the first columns of the weight")
    R = Q.new_zeros(Q.shape[1], x.W.shape[1])
    for start, stop in row_blocks(x.W.shape, ()):
        R.addmm_(Q[start:stop].T, x.W[start:stop].to(torch.float64))
    return (Term(-x.scaling * Q, R),)


def orthonormal(X: Float64[Tensor, "o r"], what: str) -> Float64[Tensor, "o r"]:
    """An orthonormal basis of the columns.

    Raises:
        NumericalError: they are dependent, so that there are many.
    """
    Q: Tensor
    Q, R = torch.linalg.qr(X)
    sizes = R.diagonal().abs()
    if len(sizes) < X.shape[1] or not (sizes > DEPENDENT * sizes.max()).all():
        raise NumericalError(f"{what} are linearly dependent: their basis is not known")
    return Q


NO_BASE = "the initialisation of this adapter subtracted a random or data-driven part of its base"
CONVERT = "save it from PEFT with `path_initial_model_for_weight_conversion`"
INITIALISATIONS = (
    Initialisation("true|false|gaussian|eva|orthogonal|mica"),
    Initialisation("pissa", BaseChange.RECOMPUTED, "pissa", _largest),
    Initialisation("olora", BaseChange.RECOMPUTED, "olora", _first_columns),
    Initialisation(r"pissa_niter_\d+", BaseChange.LOST, "pissa", None, NO_BASE, CONVERT),
    Initialisation("corda|lora_ga", BaseChange.LOST, "", None, NO_BASE, CONVERT),
    Initialisation(
        "loftq",
        BaseChange.LOST,
        refusal="this adapter was trained on the quantized base that LoftQ made",
        remedy="save that base dequantized, and merge into it with init_lora_weights true in the config",
    ),
)
"""What the values of `init_lora_weights` do to the base; an unknown value is refused."""
SUBTRACTED = {row.values: row.subtracted for row in INITIALISATIONS if row.subtracted}


def _initialised(init: object, x: Inputs) -> Change:
    """LoRA after PEFT has subtracted its initialisation: from linear weights only, never from embeddings."""
    plain, subtracted = lora(x), SUBTRACTED.get(str(init))
    return (
        plain
        if subtracted is None or x.is_embedding
        else replace(plain, terms=(*subtracted(x), *plain.terms))
    )


def dora(x: Inputs) -> Change:
    """DoRA, arXiv 2402.09353:  W' = diag(m / ‖V‖) V,  V = W + s B A, ‖V‖ the norms of the rows of V.

    With other adapters before it the norms are still those of W + s B A, as in PEFT. Embeddings alike, by transposes.
    """
    plain = _initialised(x.settings["init_lora_weights"], x)
    norms = [V.norm(dim=1) for V in sums(x.W, plain.terms)]
    return replace(plain, map=scaled_rows(x["m"] / torch.cat(norms).clamp_min(SMALLEST_ROW)))


# --- rows ---

LORA_CONFIG = ConfigType(
    ("LORA",),
    LORA_FIELDS,
    alpha="lora_alpha",
    settings=("use_rslora", "fan_in_fan_out", "lora_bias"),
    initialisations=INITIALISATIONS,
)
FACTORS = {"A": spec("r i", "lora_A", "lora_embedding_A"), "B": spec("o r", "lora_B", "lora_embedding_B")}
BIAS = "lora_B.bias"
WITH_BIAS = {
    **FACTORS,
    "bias": spec("o", BIAS, is_optional=True, when=lambda config: config.get("lora_bias") is True),
}

LORA = Kind(
    "lora",
    LORA_CONFIG,
    WITH_BIAS,
    lora,
    SCALING,
    scaling=scaling,
    factors=("A", "B"),
    holds_experts=True,
)
KASA = Kind(
    "kasa",
    LORA_CONFIG,
    {
        **FACTORS,
        "diag": spec("r|r r", "lora_diag"),
    },  # r x r in files that the published code wrote for a while
    with_diagonal,
    SCALING,
    is_named=lambda config: config.get("kasa_config") is not None,
    scaling=scaling,
    factors=("A", "B"),
    diagonal="diag",
    truncates_base=True,
)
PISSA = replace(
    LORA,
    name="pissa",
    change=partial(_initialised, "pissa"),
    needs_weight=True,
    base=BaseChange.RECOMPUTED,
    on_changed_base="lora",
    holds_experts=False,
)
OLORA = replace(PISSA, name="olora", change=partial(_initialised, "olora"))
DORA = Kind(
    "dora",
    LORA_CONFIG,
    {**FACTORS, "m": spec("o", "lora_magnitude_vector")},
    dora,
    {**SCALING, "init_lora_weights": Setting(object, True)},
    needs_weight=True,
    is_named=lambda config: config.get("use_dora") is True,
    scaling=scaling,
    factors=("A", "B"),
    is_low_rank=never,
)
