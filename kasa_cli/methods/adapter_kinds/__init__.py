"""Adapter kinds: one row each."""

from kasa_cli.methods.adapter_kinds import learned, table
from kasa_cli.methods.adapter_kinds.as_lora import Compact, Limit, of_terms, of_weight
from kasa_cli.methods.adapter_kinds.change import (
    Change,
    Term,
    applied_to,
    apply,
    apply_bias,
    factors,
    grain_of,
    row_blocks,
    rows,
    transposed,
    weighted,
)
from kasa_cli.methods.adapter_kinds.config_fields import Field, is_absent, version_of
from kasa_cli.methods.adapter_kinds.kind import (
    BaseChange,
    ConfigType,
    Initialisation,
    Kind,
    Module,
    is_of_embedding,
)
from kasa_cli.methods.adapter_kinds.learned import Factors, Svd, Update
from kasa_cli.methods.adapter_kinds.lora import BIAS, truncation
from kasa_cli.methods.adapter_kinds.lora_experts import experts
from kasa_cli.methods.adapter_kinds.shapes import sizes_of
from kasa_cli.methods.adapter_kinds.table import (
    KINDS,
    LITE_VARIANTS,
    PEFT_TYPES,
    REFUSED,
    change_by_kind,
    initialisation_of,
)

__all__ = [
    "BIAS",
    "KINDS",
    "LITE_VARIANTS",
    "PEFT_TYPES",
    "REFUSED",
    "BaseChange",
    "Change",
    "Compact",
    "ConfigType",
    "Factors",
    "Field",
    "Initialisation",
    "Kind",
    "Limit",
    "Module",
    "Svd",
    "Term",
    "Update",
    "applied_to",
    "apply",
    "apply_bias",
    "change_by_kind",
    "experts",
    "factors",
    "grain_of",
    "initialisation_of",
    "is_absent",
    "is_of_embedding",
    "learned",
    "of_terms",
    "of_weight",
    "row_blocks",
    "rows",
    "sizes_of",
    "table",
    "transposed",
    "truncation",
    "version_of",
    "weighted",
]
