"""Adapters that add low-rank terms: LoRA and what is built on it. s = alpha / r, or alpha / √r with rsLoRA.

Shapes: o = out_features, i = in_features, r = adapter rank, n = rank found in a file, e = number of experts.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float64
from torch import Tensor

from kasa_cli.errors import InvalidInput, NumericalError
from kasa_cli.linalg.bottom import TIE, Ends, ends
from kasa_cli.linalg.frame import frame
from kasa_cli.linalg.gram import Gram
from kasa_cli.linalg.top import tops_of
from kasa_cli.methods import kasa
from kasa_cli.methods.adapter_kinds.change import Change, Term, row_blocks, scaled_rows, sums, transposed
from kasa_cli.methods.adapter_kinds.kind import Given, Kind, Module, Setting, Spec, given, spec

SMALLEST_NORM = 1e-4
"""DeLoRA's: a direction shorter than this counts as this long."""
SMALLEST_ROW = 1e-12
"""A row of V shorter than this stays what it is, where PEFT divides by zero."""
ADALORA_EPSILON = 1e-5
DEPENDENT = 1e-10
"""Columns count as linearly dependent below this share of the largest."""


def lora(x: Given) -> Change:
    """LoRA, arXiv 2106.09685:  W' = W + s B A,  b' = b + s b_B."""
    s = kasa.scaling(x.settings["alpha"], x.settings["r"], x.settings["use_rslora"])
    bias = x.get("bias")
    return Change(terms=(Term(s * x["B"], x["A"]),), shift=None if bias is None else s * bias)


def with_diagonal(x: Given) -> Change:
    """KaSA's adapter, arXiv 2412.06071: + s B diag(d) A. The first files held diag(d) whole, as an r x r core.

    What is cut from the base is no part of it: see `truncation`.
    """
    s = kasa.scaling(x.settings["alpha"], x.settings["r"], x.settings["use_rslora"])
    d = x["diag"]
    B = x["B"] * d if d.ndim == 1 else x["B"] @ d
    return Change(terms=(Term(s * B, x["A"]),))


def truncation(found: Ends) -> Change:
    """KaSA's cut, W - U_d S_d V_d^T: of the base, so once for all its adapters, and never weighted."""
    return Change(terms=(Term(*kasa.cut(found)),))


def pissa(x: Given) -> Change:
    """PiSSA, arXiv 2404.02948, on the base as it was:  W' = W - U_r S_r V_r^T + s B A."""
    return _on_start("pissa", x)


def olora(x: Given) -> Change:
    """OLoRA, arXiv 2406.01775, on the base as it was:  W' = W - s Q_r R_r + s B A,  W = Q R."""
    return _on_start("olora", x)


def _on_start(name: object, x: Given) -> Change:
    """LoRA after what PEFT takes off the base first: of linear weights only, never of embeddings."""
    plain = lora(x)
    taken = STARTS[name](x) if isinstance(name, str) and name in STARTS and not x.is_embedding else ()
    return replace(plain, terms=(*taken, *plain.terms))


def _largest(x: Given) -> tuple[Term, ...]:
    """PiSSA's start: s B_0 A_0 = U_r S_r V_r^T, the r largest components."""
    r = x.settings["r"]
    if r > min(x.W.shape):
        raise InvalidInput(f"PiSSA of rank {r} on a weight of rank {min(x.W.shape)}")
    found = tops_of(Gram(frame(x.W)), min(r + 1, *x.W.shape))
    if len(found.S) > r and found.S[r - 1] - found.S[r] <= TIE * found.S[r - 1]:
        raise NumericalError(f"PiSSA of rank {r} cuts between equal singular values: its start is not known")
    return (Term(found.U[:, :r] * -found.S[:r], found.V[:, :r].T),)


def _first_columns(x: Given) -> tuple[Term, ...]:
    """OLoRA's start: s Q_r R_r. Q_r spans the first r columns of W, so that their decomposition is enough."""
    if x.module.is_transposed:
        raise InvalidInput("PEFT's OLoRA decomposes the transpose of a Conv1D weight, and fits it no more")
    s = kasa.scaling(x.settings["alpha"], x.settings["r"], x.settings["use_rslora"])
    Q = orthonormal(x.W[:, : x.settings["r"]].to(torch.float64), "the first columns of the weight")
    R = Q.new_zeros(Q.shape[1], x.W.shape[1])
    for start, stop in row_blocks(x.W.shape, ()):
        R.addmm_(Q[start:stop].T, x.W[start:stop].to(torch.float64))
    return (Term(-s * Q, R),)


STARTS: dict[str, Callable[[Given], tuple[Term, ...]]] = {"pissa": _largest, "olora": _first_columns}
"""What an `init_lora_weights` takes off the base whenever PEFT loads the adapter; the others take nothing."""


def dora(x: Given) -> Change:
    """DoRA, arXiv 2402.09353:  W' = diag(m / ‖V‖) V,  V = W + s B A, ‖V‖ the norms of the rows of V.

    With other adapters before it the norms are still those of W + s B A, as in PEFT. Embeddings alike, by transposes.
    """
    plain = _on_start(x.settings["init_lora_weights"], x)
    norms = [V.norm(dim=1) for V in sums(x.W, plain.terms)]
    return replace(plain, map=scaled_rows(x["m"] / torch.cat(norms).clamp_min(SMALLEST_ROW)))


def adalora(x: Given) -> Change:
    """AdaLoRA, arXiv 2303.10512:  W' = W + alpha / (r + 1e-5) B diag(E) A, r the rank it began with."""
    r, alpha = x.settings["r"], x.settings["alpha"]
    s = (alpha if alpha > 0 else r) / (r + ADALORA_EPSILON)
    return Change(terms=(Term(s * x["B"] * x["E"].T, x["A"]),))


def delora(x: Given) -> Change:
    """DeLoRA, arXiv 2503.18225:  W' = W + λ/r B diag(1 / (‖a‖ ‖b‖)) A diag(w), w the norms of the columns of W."""
    A, B = x["A"], x["B"]
    lengths = A.norm(dim=1).clamp_min(SMALLEST_NORM) * B.norm(dim=0).clamp_min(SMALLEST_NORM)
    L = B * (x["lambda"].reshape(()) / x.settings["r"] / lengths)
    return Change(terms=(Term(L, A * x["w"]),))


def vera(x: Given) -> Change:
    """VeRA, arXiv 2310.11454:  W' = W + diag(b) B diag(d) A, A and B cut from what all modules share."""
    o, i = x.module.out_features, x.module.in_features
    if x.tensors["A"].shape[1] < i or x.tensors["B"].shape[0] < o:
        raise InvalidInput(f"shared matrices too small for a weight of {o} x {i}", "vera_A, vera_B")
    A, B = x.tensors["A"][:, :i].to(torch.float64), x.tensors["B"][:o].to(torch.float64)
    return Change(terms=(Term(x["b"][:, None] * B, x["d"][:, None] * A),))


def randlora(x: Given) -> Change:
    """RandLoRA, arXiv 2502.00987: W' = W + s B A with n bases of rank r side by side, A scaled by Λ and Γ.

    A belongs to the shorter side of W, which is the output for a wide one: then both are transposed.
    """
    short, long = sorted((x.module.out_features, x.module.in_features))
    n, r = x["lambda"].shape[1], x.settings["r"]
    shared_A, shared_B = x.tensors["A"], x.tensors["B"]
    is_enough = shared_A.shape[2] >= short and shared_B.shape[0] >= long and shared_B.shape[1] >= n
    if not is_enough or n * r < short or x["gamma"].shape[1] != short:
        raise InvalidInput(f"{n} bases of rank {r} do not fit a side of {short}", "randlora_gamma")
    A = x["lambda"][:, :, None] * shared_A[:, :1, :short].to(torch.float64) * x["gamma"][None]
    B = shared_B[:long, :n].to(torch.float64).flatten(1) * (x.settings["alpha"] / r)
    R = A.flatten(end_dim=1)
    is_tall = short == x.module.in_features
    return Change(terms=(Term(B, R) if is_tall else Term(R.T.contiguous(), B.T.contiguous()),))


def osf(x: Given) -> Change:
    """OSF, arXiv 2504.07097: the n smallest components of W are replaced by U diag(S) V."""
    n = x.tensors["S"].shape[0]
    if n >= min(x.W.shape):
        raise InvalidInput(f"{n} of {min(x.W.shape)} components trained", "osf_svd_params.S_low")
    return Change(terms=(Term(*kasa.cut(ends(x.W, n))), Term(x["U"] * x["S"], x["V"])))


def experts(
    tensors: Mapping[str, Tensor], module: Module, num_experts: int, peft_version: str
) -> list[Change]:
    """LoRA on a parameter of fused experts, a change for each; `module` is one expert, W its (out x in) view.

    A (e r x i) holds one expert after another, B (o x r e) one rank after another:
    W_k' = W_k + s B[:, k::e] A[k r : (k + 1) r]. See `are_sides_swapped` for files of PEFT before 0.19.
    """
    A_name, B_name = (_the_name(tensors, LORA[letter]) for letter in "AB")
    sides = tensors[A_name].shape[-1], tensors[B_name].shape[0]
    is_swapped = are_sides_swapped(sides, module, peft_version)
    if is_swapped:
        module = replace(module, out_features=module.in_features, in_features=module.out_features)
    x = given(STACKED, tensors, module, None)
    r = x.settings["r"]
    if len(x.tensors["A"]) != num_experts * r:
        raise InvalidInput(f"{len(x.tensors['A'])} rows for {num_experts} experts of rank {r}", A_name)
    A, B = x.tensors["A"].reshape(num_experts, r, -1), x.tensors["B"].reshape(-1, r, num_experts)
    each = (lora(replace(x, tensors={"A": A[k], "B": B[:, :, k]})) for k in range(num_experts))
    return [transposed(one) if is_swapped else one for one in each]


def are_sides_swapped(sides: tuple[int, int], module: Module, peft_version: str) -> bool:
    """Whether A has the outputs and B the inputs of an expert, (sides of A, of B) being given.

    PEFT before 0.19 took every parameter for one that is stored (e, in, out). The shapes tell, unless square.

    >>> are_sides_swapped((8, 4), Module(4, 8), "0.18.1"), are_sides_swapped((4, 8), Module(4, 8), "0.18.1")
    (False, True)
    >>> [are_sides_swapped((8, 8), Module(8, 8), version) for version in ("0.18.1", "0.19.0", "0.21.2.dev0")]
    [True, False, False]
    >>> are_sides_swapped((8, 8), Module(8, 8, is_transposed=True), "0.18.1")
    False
    """
    if module.in_features != module.out_features:
        return sides == (module.out_features, module.in_features)
    if module.is_transposed:
        return False
    release = peft_version.split(".")[:2]
    if len(release) < 2 or not all(part.isdecimal() for part in release):
        raise InvalidInput("square experts, and which side is which depends on the release", "peft_version")
    return tuple(map(int, release)) < (0, 19)


def _the_name(tensors: Mapping[str, Tensor], wanted: Spec) -> str:
    name = next((name for name in wanted.names if name in tensors), None)
    if name is None or tensors[name].ndim != 2:
        raise InvalidInput("a matrix is missing", wanted.names[0])
    return name


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


ALPHA = {"r": Setting(int), "alpha": Setting(float)}
SCALING = {**ALPHA, "use_rslora": Setting(bool, False)}
LORA = {
    "A": spec("r i", "lora_A.weight", "lora_embedding_A", "lora_A"),
    "B": spec("o r", "lora_B.weight", "lora_embedding_B", "lora_B"),
}
BIAS = {"bias": spec("o", "lora_B.bias")}
STACKED = Kind(
    lora, {"A": spec("n i", *LORA["A"].names), "B": spec("o n", *LORA["B"].names)}, "", settings=SCALING
)

LORA_KINDS: dict[str, Kind] = {
    "lora": Kind(lora, LORA, "low-rank terms, also rsLoRA and what only starts elsewhere", BIAS, SCALING),
    "kasa": Kind(
        with_diagonal,
        {**LORA, "diag": spec("r|r r", "lora_diag")},
        "low-rank terms with a diagonal, on a truncated base",
        settings=SCALING,
    ),
    "pissa": Kind(
        pissa, LORA, "LoRA that took the largest components off the base", BIAS, SCALING, needs_weight=True
    ),
    "olora": Kind(
        olora,
        LORA,
        "LoRA that took a part of a QR decomposition off the base",
        BIAS,
        SCALING,
        needs_weight=True,
    ),
    "dora": Kind(
        dora,
        {**LORA, "m": spec("o", "lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_m")},
        "LoRA, then rows of a learned length",
        settings={**SCALING, "init_lora_weights": Setting(object, True)},
        needs_weight=True,
    ),
    "adalora": Kind(
        adalora,
        {"A": spec("n i", "lora_A"), "B": spec("o n", "lora_B"), "E": spec("n 1", "lora_E")},
        "LoRA with a diagonal and a rank that was cut; r is the rank it began with",
        settings=ALPHA,
    ),
    "delora": Kind(
        delora,
        {
            "A": spec("r i", "delora_A", "lora_A"),
            "B": spec("o r", "delora_B", "lora_B"),
            "lambda": spec("1|", "delora_lambda", "lora_lambda"),
            "w": spec("i", "delora_w_norm", "lora_wnorm"),
        },
        "LoRA of a learned length",
        settings={"r": Setting(int)},
    ),
    "vera": Kind(
        vera,
        {
            "A": spec("r p", "vera_A"),
            "B": spec("q r", "vera_B"),
            "b": spec("o", "vera_lambda_b"),
            "d": spec("r", "vera_lambda_d"),
        },
        "two learned diagonals around matrices that all modules share",
        settings={"r": Setting(int)},
    ),
    "randlora": Kind(
        randlora,
        {
            "A": spec("r q p", "randlora_A"),
            "B": spec("m c r", "randlora_B"),
            "lambda": spec("r n", "randlora_lambda"),
            "gamma": spec("n k", "randlora_gamma"),
        },
        "many scaled bases that all modules share",
        settings=ALPHA,
    ),
    "osf": Kind(
        osf,
        {
            "U": spec("o n", "osf_svd_params.U_low"),
            "S": spec("n", "osf_svd_params.S_low"),
            "V": spec("n i", "osf_svd_params.V_low"),
        },
        "the small singular components replaced",
        needs_weight=True,
    ),
}
