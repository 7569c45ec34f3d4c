"""What PEFT reads: an `adapter_config.json` and tensor names. Nothing of kasa's own goes in there."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kasa_cli.report import Target

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
PEFT_VERSION = "0.21.2"
"""The release whose format this is."""

TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}

SPLITTING = ("gate_proj", "up_proj", "down_proj", "gate")
"""Last names that PEFT 0.21 takes for those of routed experts, in the families below (peft#3711)."""
SPLITTING_FAMILIES = (
    "deepseek",
    "qwen3_moe",
    "qwen3_next",
    "glm4_moe",
    "olmoe",
    "ernie4_5_moe",
    "dots1",
    "hunyuan",
)


def lora_config(
    targets: Sequence[Target],
    *,
    rank: int,
    alpha: float,
    linear_modules: Iterable[str],
    base: tuple[str | None, str | None],
    model_class: str | None,
) -> dict[str, Any]:
    """A plain LoRA on exactly these modules. `base` is (Hub id, commit), None for a local model."""
    repo, commit = base
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": repo,
        "bias": "none",
        "exclude_modules": None,
        "fan_in_fan_out": any(target.is_transposed for target in targets),
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": rank,
        "rank_pattern": {},
        "revision": commit,
        "target_modules": target_modules([target.module for target in targets], linear_modules),
        "target_parameters": None,
        "task_type": next((task for end, task in TASKS.items() if (model_class or "").endswith(end)), None),
        "use_dora": False,
        "use_rslora": False,
    }


def kasa_config(lora: Mapping[str, Any], *, beta: float, gamma: float, use_rslora: bool) -> dict[str, Any]:
    """The same with KaSA's two loss weights: without this field PEFT drops `lora_diag` in silence."""
    return {**lora, "kasa_config": {"beta": beta, "gamma": gamma}, "use_rslora": use_rslora}


def target_modules(chosen: Sequence[str], linear_modules: Iterable[str]) -> list[str] | str:
    """Names that PEFT, which matches a list by the end of a name, takes for exactly these modules.

    >>> target_modules(["layers.0.fc"], ["layers.0.fc", "layers.1.fc"])
    ['layers.0.fc']
    >>> target_modules(["layers.0.fc"], ["layers.0.fc", "vision.layers.0.fc"])
    '(layers\\\\.0\\\\.fc)'
    """
    wanted = set(chosen)
    for module in set(linear_modules) - wanted:
        parts = module.split(".")
        if any(".".join(parts[start:]) in wanted for start in range(1, len(parts))):
            return f"({'|'.join(re.escape(name) for name in chosen)})"
    return list(chosen)


def tensor_names(module: str) -> dict[str, str]:
    """PEFT's name of each tensor of a KaSA module."""
    return {
        "A": f"{PREFIX}{module}.lora_A.weight",
        "B": f"{PREFIX}{module}.lora_B.weight",
        "diag": f"{PREFIX}{module}.lora_diag",
    }


def difficulties(targets: Sequence[Target], config: Mapping[str, Any]) -> list[str]:
    """What PEFT 0.21 makes of this adapter, where that is not what one would expect."""
    found = []
    if any(target.is_transposed for target in targets):
        found.append(
            "PEFT refuses KaSA on Conv1D layers: load tail/ on the original base, or train a plain LoRA on base/"
        )
    family = str(config.get("model_type", ""))
    rewritten = [target.module for target in targets if target.module.split(".")[-1] in SPLITTING]
    if rewritten and family.startswith(SPLITTING_FAMILIES):
        found.append(
            f"PEFT 0.21 takes {rewritten[0]} for routed experts (peft#3711) and refuses the adapter: "
            "--exclude gate_proj --exclude up_proj --exclude down_proj, or train on base/ with other targets"
        )
    return found
