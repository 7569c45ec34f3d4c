"""Matches an adapter with its base: finds the tensors that it changes and checks that the base is the right one."""

from kasa_cli.pipeline.adapter_on_base import provenance
from kasa_cli.pipeline.adapter_on_base.match import AdapterOnBase, base_changes, on_base, read_adapter
from kasa_cli.pipeline.adapter_on_base.patches import (
    change_of,
    changes_of,
    expert_changes,
    is_stack,
    label,
    module_of,
    needs_weight,
    weight_under,
)
from kasa_cli.pipeline.adapter_on_base.provenance import BASES, ORIGINAL, TRUNCATED, Origin
from kasa_cli.pipeline.adapter_on_base.truncated_part import Truncations, known_truncations

__all__ = [
    "BASES",
    "ORIGINAL",
    "TRUNCATED",
    "AdapterOnBase",
    "Origin",
    "Truncations",
    "base_changes",
    "change_of",
    "changes_of",
    "expert_changes",
    "is_stack",
    "known_truncations",
    "label",
    "module_of",
    "needs_weight",
    "on_base",
    "provenance",
    "read_adapter",
    "weight_under",
]
