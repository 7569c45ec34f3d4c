"""The rules for the fields of adapter configs, which are untrusted.

A field that changes the result and is not understood stops the run, where PEFT warns and goes on. So every field has
a rule: any value if only training reads it, a type if kasa reads it, a reason if the adapter cannot be merged once it
is set.
"""

import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

MAX_COUNT = 1 << 31
FIRST_WITH_VERSION = (0, 18)
"""The first PEFT that writes its version into the config."""


class Field(NamedTuple):
    """A rule for the values of a field; errors quote `expects`."""

    holds: Callable[[Any], bool]
    expects: str


def is_absent(value: Any) -> bool:
    """Whether a value is null, false or empty, which is the same as no field. 0 is a value."""
    return value is None or value is False or value in ("", [], {})


def is_count(value: Any) -> bool:
    """Whether a value is a whole number above 0; `true` is not."""
    return type(value) is int and 0 < value < MAX_COUNT


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that float64 can hold; `true` is not."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def are_names(value: Any) -> bool:
    """Whether a value is null, a regular expression (never matched here), or a list of names."""
    return (
        value is None
        or isinstance(value, str)
        or (isinstance(value, list) and all(isinstance(name, str) for name in value))
    )


def map_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A test for null, or a JSON object whose values all pass."""
    return lambda value: value is None or (isinstance(value, dict) and all(map(holds, value.values())))


def unset(reason: str) -> Field:
    """The rule of a field that makes the adapter impossible to merge once it is set."""
    return Field(is_absent, f"must be unset: {reason}")


def one_of(*values: Any) -> Field:
    """The rule of a field with a few values, each of its own type: 1 is not `true`."""
    known = {(type(value), value) for value in values}
    listed = ", ".join(str(value) for value in values)
    return Field(
        lambda value: isinstance(value, str | bool) and (type(value), value) in known,
        f"must be one of {listed}",
    )


ANY = Field(lambda _: True, "anything")
FLAG = Field(lambda value: value is None or isinstance(value, bool), "must be true or false")
COUNT = Field(is_count, "must be a whole number above 0")
NUMBER = Field(is_number, "must be a finite number")
NAMES = Field(are_names, "must be a string or a list of strings")
LIST = Field(
    lambda value: value is None or (isinstance(value, list) and are_names(value)), "must be a list of strings"
)
RANKS = Field(map_of(is_count), "must map patterns to whole numbers above 0")
ALPHAS = Field(map_of(is_number), "must map patterns to finite numbers")
BIAS = Field(
    lambda value: isinstance(value, str) and (value in ("none", "all") or value.endswith("_only")),
    "must be none, all or …_only",
)
VERSION = Field(
    lambda value: (
        value is None or (isinstance(value, str) and re.match(r"\d{1,4}\.\d{1,4}", value) is not None)
    ),
    "must be a version",
)
SAVED = Field(lambda value: value is True, "must be true: PEFT's random projections are not drawn again")
LABEL = Field(lambda value: value is None or isinstance(value, str), "must be a string")


def rows(field: Field, names: str) -> dict[str, Field]:
    """The same rule for several names."""
    return dict.fromkeys(names.split(), field)


LAYERS = Field(
    lambda value: (
        value is None or all(type(layer) is int for layer in (value if isinstance(value, list) else [value]))
    ),
    "must be a number or a list of numbers",
)
KASA = Field(map_of(is_number), "must map beta and gamma to numbers")
INDICES = Field(
    lambda value: value is None or isinstance(value, list | dict), "must be a list, or map layers to lists"
)

COMMON = {
    **rows(ANY, "task_type auto_mapping inference_mode layers_pattern init_weights"),
    **rows(LABEL, "peft_type base_model_name_or_path revision"),
    **rows(NAMES, "target_modules exclude_modules modules_to_save"),
    "layers_to_transform": LAYERS,
    "peft_version": VERSION,
}
"""The fields of every config of PEFT."""

LORA_FIELDS = {
    **COMMON,
    **rows(COUNT, "r"),
    **rows(NUMBER, "lora_alpha"),
    **rows(ANY, "lora_dropout megatron_core qalora_group_size runtime_config loftq_config eva_config"),
    **rows(ANY, "corda_config lora_ga_config init_lora_weights"),
    **rows(FLAG, "fan_in_fan_out use_rslora use_dora lora_bias ensure_weight_tying"),
    "bias": BIAS,
    "rank_pattern": RANKS,
    "alpha_pattern": ALPHAS,
    "trainable_token_indices": INDICES,
    "target_parameters": LIST,
    "kasa_config": KASA,
    "alora_invocation_tokens": unset("aLoRA depends on the input"),
    "arrow_config": unset("Arrow depends on the input"),
    "use_qalora": unset("QALoRA belongs to a quantized base"),
    "layer_replication": unset("it copies layers of the base"),
    "megatron_config": unset("Megatron has other names"),
    "use_bdlora": unset("BD-LoRA is block-diagonal"),
    "velora_config": unset("VeLoRA is not read"),
    "monteclora_config": unset("MonteCLoRA is not read"),
}
"""The fields of LoRA and of what PEFT builds on it."""

LYCORIS_FIELDS = {
    **COMMON,
    **rows(COUNT, "r"),
    **rows(NUMBER, "alpha"),
    **rows(ANY, "rank_dropout module_dropout use_effective_conv2d decompose_both decompose_factor"),
    **rows(ANY, "rank_dropout_scale"),
    "rank_pattern": RANKS,
    "alpha_pattern": ALPHAS,
}
"""The fields of LoHa and LoKr."""


def version_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """The PEFT that wrote an adapter; a config without a version is from before the first PEFT that writes it."""
    text = config.get("peft_version")
    match = re.match(r"(\d+)\.(\d+)", text) if isinstance(text, str) else None
    return (int(match[1]), int(match[2])) if match else (0, FIRST_WITH_VERSION[1] - 1)
