"""The table of adapter kinds, by name; which of them a config is; and the types of PEFT that are refused.

A new kind is a row in the file of its family, its name in one of the two lists here, and a case in the tests.
"""

import re
from collections.abc import Iterable, Mapping

from jaxtyping import Float
from torch import Tensor

from kasa_cli.errors import InvalidInput
from kasa_cli.methods.adapter_kinds.change import Change
from kasa_cli.methods.adapter_kinds.config_fields import COMMON, INDICES
from kasa_cli.methods.adapter_kinds.inputs import inputs_of
from kasa_cli.methods.adapter_kinds.kind import ConfigType, Initialisation, Kind, Module, Settings
from kasa_cli.methods.adapter_kinds.lora import DORA, KASA, LORA, OLORA, PISSA
from kasa_cli.methods.adapter_kinds.lora_lite import (
    LITE_ANTIPASTO,
    LITE_DELORA,
    LITE_DORA,
    LITE_HRA,
    LITE_IA3,
    LITE_IA3_FF,
    LITE_LORA,
    LITE_PISSA,
    LITE_ROAD,
)
from kasa_cli.methods.adapter_kinds.low_rank import ADALORA, DELORA, OSF, RANDLORA, VERA
from kasa_cli.methods.adapter_kinds.multiplying import HRA, IA3, OFT, ROAD
from kasa_cli.methods.adapter_kinds.products import HIRA, LOHA, LOKR, MISS

TOKENS = Kind(
    "trainable_tokens",
    ConfigType(
        ("TRAINABLE_TOKENS",),
        {**COMMON, "token_indices": INDICES},
        rank="",
        required=("token_indices",),
    ),
    {},
    lambda x: Change(),
)
"""Rows of embeddings held anew, and nothing else."""
NORMS = Kind("ln_tuning", ConfigType(("LN_TUNING",), COMMON, rank=""), {}, lambda x: Change())
"""Norms held anew, and nothing else."""

PEFT_KINDS = (
    *(LORA, DORA, KASA, PISSA, OLORA),
    *(ADALORA, DELORA, VERA, RANDLORA, OSF),
    *(IA3, HRA, OFT, ROAD),
    *(HIRA, LOHA, LOKR, MISS),
    *(TOKENS, NORMS),
)
LITE_KINDS = (
    *(LITE_LORA, LITE_PISSA, LITE_DORA, LITE_DELORA),
    *(LITE_HRA, LITE_IA3, LITE_IA3_FF, LITE_ROAD, LITE_ANTIPASTO),
)
KINDS: Mapping[str, Kind] = {kind.name: kind for kind in (*PEFT_KINDS, *LITE_KINDS)}


def _by_type(kinds: Iterable[Kind]) -> dict[str, tuple[Kind, ...]]:
    """The kinds of each type of config, the plain one first."""
    by_type: dict[str, tuple[Kind, ...]] = {}
    for kind in kinds:
        for name in kind.config.names:
            by_type[name] = (*by_type.get(name, ()), kind)
    return by_type


PEFT_TYPES = _by_type(PEFT_KINDS)
"""By `peft_type`."""
LITE_VARIANTS = {name: kinds[0] for name, kinds in _by_type(LITE_KINDS).items()}
"""By lora-lite's `variant`."""

PROMPTS = "it adds to the input, not to the weights"
ROUTED = "it chooses between adapters by the input"
NO_FORMULA = "kasa does not know how to merge it; PEFT may"
SIGNS = "its frozen factors depend on the signs of one SVD"
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"), PROMPTS),
    **dict.fromkeys(("CPT", "CARTRIDGE", "ADAPTION_PROMPT"), PROMPTS),
    **dict.fromkeys(("XLORA", "LILY"), ROUTED),
    "POLY": "it chooses between adapters by the task",
    **dict.fromkeys(("PSOFT", "TINYLORA"), SIGNS),
    "ADAMSS": "its clusters depend on one random decomposition",
    "FROD": "its basis is made of all layers of a type at once",
    **dict.fromkeys(("BEFT", "BOFT", "BONE", "C3A", "DEFT", "FOURIERFT", "GLORA", "GRALORA"), NO_FORMULA),
    **dict.fromkeys(("PEANUT", "PVERA", "SHADOW", "SHIRA", "SUPERTUNING", "UNILORA"), NO_FORMULA),
    **dict.fromkeys(("VBLORA", "WAVEFT"), NO_FORMULA),
}
"""Types of PEFT that are refused, and why."""


def initialisation_of(config: Settings) -> Initialisation | None:
    """The initialisation of a LoRA by its `init_lora_weights`; None if kasa does not know it."""
    value = str(config.get("init_lora_weights", True)).lower()
    known = KINDS["lora"].config.initialisations
    return next((row for row in known if re.fullmatch(row.values, value)), None)


def change_by_kind(
    name: str, tensors: Mapping[str, Tensor], module: Module, weight: Float[Tensor, "o i"] | None = None
) -> Change:
    """The change that an adapter of this kind makes to a module, from its tensors by their short names.

    `weight` is W as it was before any adapter, for kinds that need it (`Kind.needs_weight`).

    Raises:
        InvalidInput: the kind is unknown; a tensor or setting is missing, unknown or of the wrong shape.
        NumericalError: what PEFT recomputes from the weight is not unique.
    """
    if name not in KINDS:
        raise InvalidInput(f"unknown kind of adapter {name!r}", "", f"known: {', '.join(KINDS)}")
    kind = KINDS[name]
    return kind.change(inputs_of(kind, tensors, module, weight))
