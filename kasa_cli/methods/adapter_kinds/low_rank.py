"""Adapters that add other low-rank terms than LoRA's.

Shapes: o = out_features, i = in_features, r = adapter rank, n = rank found in a file.
"""

import torch

from kasa_cli.errors import InvalidInput
from kasa_cli.linalg import ends
from kasa_cli.methods import kasa
from kasa_cli.methods.adapter_kinds.change import Change, Term
from kasa_cli.methods.adapter_kinds.config_fields import (
    ANY,
    BIAS,
    COMMON,
    COUNT,
    FLAG,
    LORA_FIELDS,
    NUMBER,
    RANKS,
    SAVED,
    Field,
    map_of,
    rows,
    unset,
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
    spec,
)

SMALLEST_NORM = 1e-4
"""DeLoRA's: a direction shorter than this counts as this long."""
ADALORA_EPSILON = 1e-5

# --- AdaLoRA ---


def adalora(x: Inputs) -> Change:
    """AdaLoRA, arXiv 2303.10512:  W' = W + alpha / (r + 1e-5) B diag(E) A, r the rank it began with."""
    return Change(terms=(Term(x.scaling * x["B"] * x["E"].T, x["A"]),))


def _adalora_scaling(settings: Settings) -> float:
    r, alpha = settings["r"], settings["alpha"]
    return float((alpha if alpha > 0 else r) / (r + ADALORA_EPSILON))


def _kept_components(config: Settings, module: str) -> Sizes:
    """The number of components that AdaLoRA kept of a module, from its `rank_pattern`: PEFT saves no others."""
    mask = (config.get("rank_pattern") or {}).get(f"{module}.lora_E")
    return {"n": sum(flag is True for flag in mask) if isinstance(mask, list) else int(config["init_r"])}


ADALORA = Kind(
    "adalora",
    ConfigType(
        ("ADALORA",),
        {
            **LORA_FIELDS,
            **rows(ANY, "target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step"),
            "init_r": COUNT,
            "rank_pattern": Field(map_of(lambda v: isinstance(v, list)), "must map tensors to lists"),
            **rows(unset("PEFT has none for AdaLoRA"), "use_dora lora_bias target_parameters kasa_config"),
        },
        rank="init_r",
        alpha="lora_alpha",
        settings=("fan_in_fan_out",),
        has_patterns=False,
    ),
    {"A": spec("n i", "lora_A"), "B": spec("o n", "lora_B"), "E": spec("n 1", "lora_E")},
    adalora,
    ALPHA,
    scaling=_adalora_scaling,
    read_sizes=_kept_components,
    factors=("A", "B"),
    diagonal="E",
)

# --- DeLoRA ---


def delora(x: Inputs) -> Change:
    """DeLoRA, arXiv 2503.18225:  W' = W + λ/r B diag(1 / (‖a‖ ‖b‖)) A diag(w), w the norms of the columns of W."""
    A, B = x["A"], x["B"]
    lengths = A.norm(dim=1).clamp_min(SMALLEST_NORM) * B.norm(dim=0).clamp_min(SMALLEST_NORM)
    L = B * (x["lambda"].reshape(()) / x.settings["r"] / lengths)
    return Change(terms=(Term(L, A * x["w"]),))


DELORA = Kind(
    "delora",
    ConfigType(
        ("DELORA",),
        {
            **COMMON,
            **rows(ANY, "delora_lambda module_dropout lambda_pattern"),
            "r": COUNT,
            "bias": BIAS,
            "rank_pattern": RANKS,
        },
    ),
    {
        "A": spec("r i", "delora_A"),
        "B": spec("o r", "delora_B"),
        "lambda": spec("1", "delora_lambda"),
        "w": spec("i", "delora_w_norm"),
    },
    delora,
    {"r": Setting(int)},
    learned_scaling="lambda",
    factors=("A", "B"),
)

# --- VeRA ---


def vera(x: Inputs) -> Change:
    """VeRA, arXiv 2310.11454:  W' = W + diag(b) B diag(d) A, A and B cut from what all modules share."""
    o, i = x.module.out_features, x.module.in_features
    A, B = x.tensors["A"][:, :i].to(torch.float64), x.tensors["B"][:o].to(torch.float64)
    return Change(terms=(Term(x["b"][:, None] * B, x["d"][:, None] * A),))


def _vera_rule(sizes: Sizes, _settings: Settings) -> str | None:
    """The shared projections are at least as large as the weight."""
    i, o, p, q = sizes.get("i", 0), sizes["o"], sizes.get("p"), sizes.get("q")
    if (p is not None and i > p) or (q is not None and o > q):
        return f"projections for {p} inputs and {q} outputs are too small"
    return None


VERA = Kind(
    "vera",
    ConfigType(
        ("VERA",),
        {
            **COMMON,
            **rows(ANY, "projection_prng_key vera_dropout d_initial"),
            "r": COUNT,
            "bias": BIAS,
            "fan_in_fan_out": FLAG,
            "save_projection": SAVED,
        },
        settings=("fan_in_fan_out",),
    ),
    {
        "b": spec("o", "vera_lambda_b"),
        "d": spec("r", "vera_lambda_d"),
        "A": spec("r p", "vera_A", is_shared=True),
        "B": spec("q r", "vera_B", is_shared=True),
    },
    vera,
    {"r": Setting(int)},
    rule=_vera_rule,
    factors=("A", "B"),
    diagonal="d",
)

# --- RandLoRA ---


def randlora(x: Inputs) -> Change:
    """RandLoRA, arXiv 2502.00987: W' = W + s B A with n bases of rank r side by side, A scaled by Λ and Γ.

    A belongs to the shorter side of W, which is the output for a wide one: then both are transposed.
    """
    short, long = sorted((x.module.out_features, x.module.in_features))
    n = x["lambda"].shape[1]
    shared_A, shared_B = x.tensors["A"], x.tensors["B"]
    A = x["lambda"][:, :, None] * shared_A[:, :1, :short].to(torch.float64) * x["gamma"][None]
    B = shared_B[:long, :n].to(torch.float64).flatten(1) * x.scaling
    R = A.flatten(end_dim=1)
    is_tall = short == x.module.in_features
    return Change(terms=(Term(B, R) if is_tall else Term(R.T.contiguous(), B.T.contiguous()),))


def _randlora_rule(sizes: Sizes, _settings: Settings) -> str | None:
    """As many bases as a full rank needs, on the shorter side."""
    if "o" not in sizes or "i" not in sizes:
        return None
    short, long = sorted((sizes["o"], sizes["i"]))
    num_bases = -(-short // sizes["r"])
    is_right = sizes["m"] == short and sizes["n"] == num_bases
    covers = sizes.get("p", short) >= short and sizes.get("q", long) >= long
    has_all = sizes.get("c", num_bases) >= num_bases
    return None if is_right and covers and has_all else "the bases are of another weight"


RANDLORA = Kind(
    "randlora",
    ConfigType(
        ("RANDLORA",),
        {
            **COMMON,
            **rows(ANY, "projection_prng_key randlora_dropout sparse very_sparse"),
            "r": COUNT,
            "randlora_alpha": NUMBER,
            "bias": BIAS,
            "fan_in_fan_out": FLAG,
            "save_projection": SAVED,
        },
        alpha="randlora_alpha",
        settings=("fan_in_fan_out",),
    ),
    {
        "lambda": spec("r n", "randlora_lambda"),
        "gamma": spec("n m", "randlora_gamma"),
        "A": spec("r 1 p", "randlora_A", is_shared=True),
        "B": spec("q c r", "randlora_B", is_shared=True),
    },
    randlora,
    ALPHA,
    scaling=alpha_over_rank,
    groups=(
        ("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"),
        ("randlora_lambda", "randlora_gamma"),
    ),
    rule=_randlora_rule,
    factors=("A", "B"),
)

# --- OSF ---


def osf(x: Inputs) -> Change:
    """OSF, arXiv 2504.07097: the n smallest components of W are replaced by U diag(S) V."""
    n = x.tensors["S"].shape[0]
    if n >= min(x.W.shape):
        raise InvalidInput(f"{n} of {min(x.W.shape)} components trained", "osf_svd_params.S_low")
    return Change(terms=(Term(*kasa.truncation(ends(x.W, n))), Term(x["U"] * x["S"], x["V"])))


def _osf_rule(sizes: Sizes, _settings: Settings) -> str | None:
    """No more components than the weight has."""
    k, small = sizes["k"], min(sizes["o"], sizes["i"])
    return None if k <= small else f"{k} components of {small}"


OSF = Kind(
    "osf",
    ConfigType(
        ("OSF",),
        {**COMMON, "effective_rank": ANY, "rank_pattern": ANY, "target_svd_config": ANY},
        rank="",
        has_patterns=False,
    ),
    {
        "U": spec("o k", "osf_svd_params.U_low"),
        "S": spec("k", "osf_svd_params.S_low"),
        "V": spec("k i", "osf_svd_params.V_low"),
    },
    osf,
    needs_weight=True,
    rule=_osf_rule,
    factors=("V", "U"),
    diagonal="S",
)
