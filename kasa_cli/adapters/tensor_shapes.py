"""What shape every tensor of an adapter must have, in the letters of the module it belongs to.

Letters: r = rank, i and o = the sides of PEFT's product (in_features, out_features); others bind to what they meet.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from kasa_cli.errors import InvalidInput

Shapes = Mapping[str, tuple[int, ...]]
Letters = dict[str, int]
Settings = Mapping[str, Any]
Problem = str | None

FACTORS = {"lora_A": "r i", "lora_B": "o r"}
LORA = {
    **FACTORS,
    "lora_B.bias": "o",
    "lora_diag": "r|r r",  # a dense core in what the published code wrote for a while
    "lora_magnitude_vector": "o",
    "lora_embedding_A": "r i",
    "lora_embedding_B": "o r",
}

SIDES: Mapping[str, Mapping[str, str]] = {
    **dict.fromkeys(("lora", "dora", "kasa", "pissa", "olora"), LORA),
    "adalora": {"lora_A": "n i", "lora_B": "o n", "lora_E": "n 1"},
    "ia3": {"ia3_l": "o 1"},
    "ia3 feedforward": {"ia3_l": "1 i"},
    "hra": {"hra_u": "i r"},
    "delora": {"delora_A": "r i", "delora_B": "o r", "delora_lambda": "1", "delora_w_norm": "i"},
    "loha": {"hada_w1_a": "o r", "hada_w1_b": "r i", "hada_w2_a": "o r", "hada_w2_b": "r i"},
    "lokr": {
        "lokr_w1": "a c",
        "lokr_w1_a": "a r",
        "lokr_w1_b": "r c",
        "lokr_w2": "b d",
        "lokr_w2_a": "b r",
        "lokr_w2_b": "r d",
    },
    "oft": {"oft_R.weight": "n e", "oft_embedding_R.weight": "n e"},
    "vera": {"vera_lambda_b": "o", "vera_lambda_d": "r", "vera_A": "r I", "vera_B": "O r"},
    "randlora": {
        "randlora_lambda": "r n",
        "randlora_gamma": "n m",
        "randlora_A": "r 1 M",
        "randlora_B": "X N r",
    },
    "hira": {"hira_A": "r i", "hira_B": "o r", "hira_embedding_A": "r i", "hira_embedding_B": "o r"},
    "miss": {"miss_block": "r o"},
    "miss bat": {"miss_block": "n r r"},
    "miss mini": {"miss_block": "r q"},
    "osf": {
        "osf_svd_params.U_low": "o k",
        "osf_svd_params.S_low": "k",
        "osf_svd_params.V_low": "k i",
    },
    "road": {"road_theta": "s", "road_alpha": "s"},
    **dict.fromkeys(("lite-lora", "lite-pissa"), FACTORS),
    "lite-dora": {**FACTORS, "lora_m": "o"},
    "lite-delora": {**FACTORS, "lora_lambda": "", "lora_wnorm": "i"},
    "lite-hra": {"lora_U": "r i"},
    "lite-ia3": {"lora_g": "o"},
    "lite-ia3_ff": {"lora_g": "i"},
    "lite-road": {"lora_road_theta": "s", "lora_road_alpha": "s"},
    "lite-antipasto": {
        "lora_U": "o r",
        "lora_S": "r",
        "lora_Vh": "r i",
        "lora_delta_s": "r",
        "lora_rot_T": "n e",
    },
}
"""The sides of each tensor, by kind and, where it has several forms, form."""

TRANSPOSED = frozenset({"lora_embedding_A", "hira_embedding_A", "oft_embedding_R.weight"})
"""Tensors of adapters whose product is the transpose of an embedding: its rows are the columns of A."""

MAY_BE_ZERO = frozenset("ne")
"""Letters that may stand for nothing: all components of an AdaLoRA pruned, blocks of one entry that cannot turn."""


def form_of(kind: str, settings: Settings) -> str:
    """The row of `SIDES` that holds for a module."""
    if settings.get("feedforward"):
        return f"{kind} feedforward"
    init = settings.get("init_weights")
    return f"{kind} {init}" if kind == "miss" and isinstance(init, str) else kind


def bound(
    kind: str, settings: Settings, shapes: Shapes, known: Mapping[str, int], names: Mapping[str, str]
) -> Letters:
    """What the letters stand for, with `known` ones given.

    Raises:
        InvalidInput: a tensor that does not fit, by its name in the file.
    """
    letters: Letters = dict(known)
    for short, sides in SIDES[form_of(kind, settings)].items():
        if short in shapes:
            forms = [form.split() for form in sides.split("|")]
            fitting = [form for form in forms if len(form) == len(shapes[short])]
            bind(letters, (fitting or forms)[0], shapes[short], names[short])
    empty = [letter for letter, side in letters.items() if not side and letter not in MAY_BE_ZERO]
    problem = f"{empty[0]} is 0" if empty else RULES.get(kind, no_rule)(letters, settings)
    if problem:
        raise InvalidInput(f"does not fit: {problem}", next(iter(names.values())))
    return letters


def bind(letters: Letters, sides: list[str], shape: tuple[int, ...], name: str) -> None:
    """Give the letters of one tensor their values, or find that they have others."""
    wanted = [int(s) if s.isdecimal() else letters.get(s) for s in sides]
    if len(sides) != len(shape) or any(
        w is not None and w != side for w, side in zip(wanted, shape, strict=False)
    ):
        expected = ", ".join(
            s if w is None or s == str(w) else f"{s} = {w}" for s, w in zip(sides, wanted, strict=True)
        )
        raise InvalidInput(f"shape {list(shape)}, expected ({expected})", name)
    letters.update({s: side for s, side in zip(sides, shape, strict=True) if not s.isdecimal()})
    if len({*zip(sides, shape, strict=True)}) != len({*sides}):  # one letter, two values in the same tensor
        raise InvalidInput(f"shape {list(shape)}, expected ({', '.join(sides)})", name)


# --- what letters alone do not say: each rule holds where the sides are known ---


def no_rule(_letters: Letters, _settings: Settings) -> Problem:
    """Nothing more to ask."""
    return None


def lokr(letters: Letters, _settings: Settings) -> Problem:
    """The Kronecker product has the sides of the weight."""
    made = (letters["a"] * letters["b"], letters["c"] * letters["d"])
    wanted = (letters.get("o", made[0]), letters.get("i", made[1]))
    return None if made == wanted else f"the product is {list(made)}, the weight {list(wanted)}"


def block_size(num_entries: int) -> int:
    """The side of a skew-symmetric matrix with that many free entries; 0 if there is none.

    >>> block_size(28), block_size(27)
    (8, 0)
    """
    side = (1 + math.isqrt(1 + 8 * num_entries)) // 2
    return side if side * (side - 1) // 2 == num_entries else 0


def oft(letters: Letters, settings: Settings) -> Problem:
    """Blocks of one size cover the inputs."""
    side, i = block_size(letters["e"]), letters.get("i")
    if not side:
        return f"{letters['e']} entries make no rotation"
    if i is None:
        return None
    num_blocks = 1 if settings.get("block_share") else i // side
    fits = i % side == 0 and letters["n"] == num_blocks
    return None if fits else f"{letters['n']} blocks of {side} for {i} inputs"


def vera(letters: Letters, _settings: Settings) -> Problem:
    """The shared projections are at least as large as the weight."""
    if letters.get("i", 0) > letters.get("I", letters.get("i", 0)) or letters["o"] > letters.get(
        "O", letters["o"]
    ):
        return f"projections for {letters.get('I')} inputs and {letters.get('O')} outputs are too small"
    return None


def randlora(letters: Letters, _settings: Settings) -> Problem:
    """As many bases as a full rank needs, on the smaller side."""
    if "o" not in letters or "i" not in letters:
        return None
    small, large = sorted((letters["o"], letters["i"]))
    num_bases = -(-small // letters["r"])
    fits = letters["m"] == small and letters["n"] == num_bases
    covers = letters.get("M", small) >= small and letters.get("X", large) >= large
    return (
        None
        if fits and covers and letters.get("N", num_bases) >= num_bases
        else "the bases are of another weight"
    )


def miss(letters: Letters, settings: Settings) -> Problem:
    """Blocks divide the sides."""
    r, o, i, form = letters["r"], letters.get("o"), letters.get("i"), settings.get("init_weights")
    if i is not None and r > i:
        return f"rank {r} for {i} inputs"
    if form == "mini" and (letters["q"] != settings.get("mini_r") or (o is not None and o % letters["q"])):
        return f"mini_r is {settings.get('mini_r')}, the tensor has {letters['q']}, the weight {o}"
    if form == "bat" and o is not None and i is not None and (letters["n"] * r != o or i % r):
        return f"blocks of {r} do not divide {o} and {i}"
    return None


def osf(letters: Letters, _settings: Settings) -> Problem:
    """No more components than the weight has."""
    k, small = letters["k"], min(letters["o"], letters["i"])
    return None if k <= small else f"{k} components of {small}"


def road(letters: Letters, settings: Settings) -> Problem:
    """Angles for pairs of outputs, in groups."""
    o = letters.get("o")
    if o is None:
        return None
    sizes = {"road_1": o // 2, "road_2": o, "road_4": 2 * o}
    variant, group = str(settings.get("road_variant") or settings.get("variant")), settings["group_size"]
    fits = letters["s"] == sizes.get(variant) and group % 2 == 0 and o % group == 0
    return None if fits else f"{letters['s']} angles of {variant} in groups of {group} for {o} outputs"


def antipasto(letters: Letters, settings: Settings) -> Problem:
    """Rotations in blocks of the rank."""
    if "e" not in letters:
        return None
    side = settings["block_size"]
    fits = letters["e"] == side * (side - 1) // 2 and letters["n"] * side == letters["r"]
    return None if fits else f"{letters['n']} blocks of {side} for rank {letters['r']}"


RULES: Mapping[str, Callable[[Letters, Settings], Problem]] = {
    "lokr": lokr,
    "oft": oft,
    "vera": vera,
    "randlora": randlora,
    "miss": miss,
    "osf": osf,
    "road": road,
    "lite-road": road,
    "lite-antipasto": antipasto,
}
