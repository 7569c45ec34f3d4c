"""The format of PEFT: `adapter_config.json` and tensor names. kasa adds nothing of its own."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PEFT_VERSION = "0.21.2"
"""The release with this format."""

TEXT_TO_TEXT = ("T5", "Bart", "Pegasus", "M2M100", "Blenderbot")
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    **{f"{family}ForConditionalGeneration": "SEQ_2_SEQ_LM" for family in TEXT_TO_TEXT},
}
"""PEFT's task, by the end of a class name. Other classes get no task: PEFT 0.21 would call speech and vision models
like text models, and with a classification task it fails unless the adapter holds a head (`modules_to_save`)."""

EXPERT_NAMES = {
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ("gate", "w1", "w2", "w3"),
}
"""Last names that PEFT 0.21 mistakes for routed experts (peft#3711), by the layout of a family's files."""
MAMBA_NAMES = ("out_proj", "conv1d")
MAMBA_FAMILIES = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
"""Last names that PEFT 0.21 refuses in these families."""


def lora_config(
    chosen: Sequence[str],
    *,
    rank: int,
    alpha: float,
    modules: Iterable[str],
    base: tuple[str | None, str | None],
    model_class: str | None,
) -> dict[str, Any]:
    """The config of a plain LoRA on exactly the `chosen` modules. `base` is (Hub id, commit), or None if local."""
    config = plain_config(target_modules(chosen, modules), rank, base, model_class)
    return {**config, "lora_alpha": alpha}


def plain_config(
    modules: Sequence[str], rank: int, base: tuple[str | None, str | None], model_class: str | None
) -> dict[str, Any]:
    """The config of a plain LoRA of scaling 1 on the modules that PEFT matches with these names or this pattern."""
    repo, commit = base
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": repo,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": rank,
        "rank_pattern": {},
        "revision": commit,
        "target_modules": modules,
        "target_parameters": None,
        "task_type": next((task for end, task in TASKS.items() if (model_class or "").endswith(end)), None),
        "use_dora": False,
        "use_rslora": False,
    }


def kasa_config(lora: Mapping[str, Any], *, beta: float, gamma: float, use_rslora: bool) -> dict[str, Any]:
    """The config with KaSA's two loss weights: without this field PEFT silently drops `lora_diag`."""
    return {**lora, "kasa_config": {"beta": beta, "gamma": gamma}, "use_rslora": use_rslora}


def target_modules(chosen: Sequence[str], modules: Iterable[str]) -> list[str] | str:
    """Names, or a pattern, that PEFT matches with exactly these modules. PEFT matches a list by the ends of names.

    >>> target_modules(["layers.0.fc"], ["layers.0.fc", "layers.1.fc"])
    ['layers.0.fc']
    >>> target_modules(["layers.0.fc"], ["layers.0.fc", "vision.layers.0.fc"])
    '(layers\\\\.0\\\\.fc)'
    """
    chosen_modules = set(chosen)
    for module in set(modules) - chosen_modules:
        parts = module.split(".")
        if any(".".join(parts[start:]) in chosen_modules for start in range(1, len(parts))):
            return f"({'|'.join(re.escape(name) for name in chosen)})"
    return list(chosen)


def tensor_names(module: str) -> dict[str, str]:
    """PEFT's name of each tensor of a KaSA module."""
    return {
        "A": f"{PREFIX}{module}.lora_A.weight",
        "B": f"{PREFIX}{module}.lora_B.weight",
        "diag": f"{PREFIX}{module}.lora_diag",
    }


def named(modules: Sequence[str], last_names: Iterable[str]) -> list[str]:
    """The modules among them whose last name is one of these."""
    return [module for module in modules if module.split(".")[-1] in set(last_names)]


def expert_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Last names that PEFT 0.21 mistakes, in this family, for routed experts (peft#3711)."""
    from transformers.conversion_mapping import (
        _MODEL_TO_CONVERSION_PATTERN,  # the table that PEFT itself reads
    )

    family = str(config.get("model_type", ""))
    layout = "mixtral" if family == "mixtral" else _MODEL_TO_CONVERSION_PATTERN.get(family, "")
    return EXPERT_NAMES.get(layout, ())


def taken_for_experts(modules: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    """The modules among them that PEFT 0.21 would replace by the routed experts of the model."""
    return named(modules, expert_names(config))


def by_parameter(lora: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """The config with these modules in `target_parameters`, where PEFT does not replace them (but refuses KaSA)."""
    if not modules or isinstance(lora["target_modules"], str):
        return dict(lora)
    others = [module for module in lora["target_modules"] if module not in set(modules)]
    return {**lora, "target_modules": others, "target_parameters": [f"{module}.weight" for module in modules]}


def difficulties(modules: Sequence[str], config: Mapping[str, Any], *, has_conv1d: bool = False) -> list[str]:
    """Notes on targets where PEFT 0.21 refuses or misreads a KaSA adapter."""
    notes = []
    if has_conv1d:
        notes.append(
            "PEFT refuses KaSA on Conv1D layers: load tail/ on the original base, or train a plain LoRA on base/"
        )
    if experts := taken_for_experts(modules, config):
        notes.append(
            f"PEFT 0.21 mistakes {experts[0]} for routed experts (peft#3711) and refuses the adapter: "
            f"{_excludes(experts)}, or train on base/ with other targets"
        )
    return notes


def refused_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Last names that PEFT 0.21 refuses in this family."""
    return MAMBA_NAMES if config.get("model_type") in MAMBA_FAMILIES else ()


def refusals(modules: Sequence[str], config: Mapping[str, Any]) -> list[str]:
    """The targets on which PEFT 0.21 refuses any LoRA, KaSA or plain."""
    mamba = named(modules, refused_names(config))
    return [f"PEFT 0.21 refuses any LoRA on {mamba[0]}: {_excludes(mamba)}"] if mamba else []


def _excludes(modules: Iterable[str]) -> str:
    """The flags that exclude modules of these last names."""
    return " ".join(f"--exclude {name}" for name in sorted({module.split(".")[-1] for module in modules}))
