"""The table of adapter kinds: what each does to a weight, and what cannot be merged at all.

A new kind is one function and one row, in the file of its family, and a case in tests/methods/test_adapter_kinds.py.
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor

from kasa_cli.errors import InvalidInput
from kasa_cli.methods.adapter_kinds.change import Change
from kasa_cli.methods.adapter_kinds.dense import DENSE_KINDS
from kasa_cli.methods.adapter_kinds.kind import Kind, Module, given
from kasa_cli.methods.adapter_kinds.lora import LORA_KINDS, experts, truncation
from kasa_cli.methods.adapter_kinds.lora_lite import LITE_KINDS

__all__ = ["KINDS", "REFUSED", "Kind", "Module", "change", "experts", "kind_of", "truncation"]

LITE = "lite-"
"""Before the name of what lora-lite writes."""
KINDS: dict[str, Kind] = {
    **LORA_KINDS,
    **DENSE_KINDS,
    **{f"{LITE}{name}": kind for name, kind in LITE_KINDS.items()},
}

BASE_IS_LOST = "its start was random or made from data, and the base it took it from is not in the file"
PROMPTS = "it adds to the prompt, not to a weight"
NOT_WRITTEN = "kasa has no formula for it yet; PEFT may have one"
REFUSED: dict[str, str] = {
    "pissa_niter": f"{BASE_IS_LOST}; save it with `path_initial_model_for_weight_conversion`",
    "corda": f"{BASE_IS_LOST}; save it with `path_initial_model_for_weight_conversion`",
    "lora_ga": f"{BASE_IS_LOST}; save it with `path_initial_model_for_weight_conversion`",
    "loftq": "it was trained on a quantized base, which is not in the file",
    "alora": "it acts from a token on, not on the whole input",
    "arrow": "it chooses between adapters token by token",
    "xlora": "it chooses between adapters by what goes in",
    "poly": "it chooses between adapters by the task",
    "lily": "it chooses between adapters by what goes in",
    "cartridge": PROMPTS,
    "prompt_tuning": PROMPTS,
    "prefix_tuning": PROMPTS,
    "p_tuning": PROMPTS,
    "multitask_prompt_tuning": PROMPTS,
    "adaption_prompt": PROMPTS,
    "cpt": PROMPTS,
    "layer_replication": "it repeats layers of the model, which the checkpoint has once",
    "qalora": "it pools the input of a quantized weight",
    "vera-unsaved": "its matrices are not in the file; save it with `save_projection=True`",
    "randlora-unsaved": "its matrices are not in the file; save it with `save_projection=True`",
    "kasa-pissa": "PEFT truncates a base that has lost its largest components, and adds them without the diagonal",
    "kasa-olora": "PEFT truncates a base that has lost part of itself, and adds it without the diagonal",
    "psoft": "its frozen factors depend on the signs that one SVD happened to give",
    "tinylora": "its frozen factors depend on the signs that one SVD happened to give",
    "adamss": "its clusters depend on one random decomposition",
    "frod": "its basis is made of all layers of a type at once",
    "bdlora": NOT_WRITTEN,
    "monteclora": NOT_WRITTEN,
    **dict.fromkeys(
        (
            *(
                "beft",
                "boft",
                "bone",
                "c3a",
                "deft",
                "fourierft",
                "glora",
                "gralora",
                "ln_tuning",
                "peanut",
                "pvera",
            ),
            *("shadow", "shira", "supertuning", "trainable_tokens", "unilora", "vblora", "waveft"),
        ),
        NOT_WRITTEN,
    ),
}
"""Kinds that are refused by name, and why."""

VARIANTS = {
    "layer_replication": "layer_replication",
    "alora_invocation_tokens": "alora",
    "arrow_config": "arrow",
    "use_qalora": "qalora",
    "use_bdlora": "bdlora",
    "monteclora_config": "monteclora",
    "kasa_config": "kasa",
    "use_dora": "dora",
}
"""Fields of PEFT's LoRA configuration that make it another kind, the first that is set."""
STARTS = ("pissa_niter", "pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` that take something off the base. All others leave it as it is."""
NEEDS_PROJECTION = ("vera", "randlora")


def kind_of(config: Mapping[str, Any]) -> str:
    """The kind, in `KINDS` or `REFUSED`, of a PEFT configuration, for a base that is as it was before.

    On a base without what the start took off, ask with `init_lora_weights` true. `kasa` leaves the truncation to
    the caller.

    >>> kind_of({"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"})
    'pissa_niter'
    >>> kind_of({"peft_type": "LORA", "use_dora": True, "init_lora_weights": "pissa"})
    'dora'
    >>> kind_of({"peft_type": "VERA", "save_projection": False}), kind_of({"peft_type": "HRA"})
    ('vera-unsaved', 'hra')
    """
    kind = str(config.get("peft_type", "")).lower()
    if kind == "lora":
        return _kind_of_lora(config)
    if kind in NEEDS_PROJECTION and not config.get("save_projection", True):
        return f"{kind}-unsaved"
    return kind


def _kind_of_lora(config: Mapping[str, Any]) -> str:
    variant = next((kind for field, kind in VARIANTS.items() if config.get(field)), "lora")
    init = str(config.get("init_lora_weights", True)).lower()
    begun = next((kind for kind in STARTS if init.startswith(kind)), None)
    if begun is None or variant in REFUSED:
        return variant
    if variant == "kasa" and f"kasa-{begun}" in REFUSED:
        return f"kasa-{begun}"
    return begun if begun in REFUSED or variant == "lora" else variant


def change(
    name: str, tensors: Mapping[str, Tensor], module: Module, weight: Float[Tensor, "o i"] | None = None
) -> Change:
    """What an adapter of this kind does to a module, from its tensors named as in the file, after the module's name.

    `weight` is W as it was before any adapter, for kinds that need it (`Kind.needs_weight`).

    Raises:
        InvalidInput: the kind is refused or unknown; a tensor or setting is missing, unknown or of the wrong shape.
        NumericalError: what PEFT recomputes from the weight is not unique.
    """
    if name in REFUSED:
        raise InvalidInput(f"an adapter of kind {name} cannot be merged", "", REFUSED[name])
    if name not in KINDS:
        raise InvalidInput(f"unknown kind of adapter {name!r}", "", f"known: {', '.join(KINDS)}")
    kind = KINDS[name]
    return kind.change(given(kind, tensors, module, weight))
