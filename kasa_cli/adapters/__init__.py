"""Adapter files: read, check, place on a base, write."""

from kasa_cli.adapters import peft, writing
from kasa_cli.adapters.adapter import (
    UNKNOWN_PARAMETER,
    Adapter,
    Patch,
    Replacement,
    TokenRows,
    consumed,
    unconsumed,
)
from kasa_cli.adapters.base import BaseIndex, require_known_rows
from kasa_cli.adapters.fused_experts import expert_factors, stack_entry, wrapper_names
from kasa_cli.adapters.parameter_placement import PlacedValue, placed_values
from kasa_cli.adapters.peft import PEFT_VERSION
from kasa_cli.adapters.placement import Placed, holds_experts_in_out, placed
from kasa_cli.adapters.reading import open_adapter
from kasa_cli.adapters.tied import PlacedItem, TiedItems, tied_items
from kasa_cli.adapters.writing import FLAVOURS, ConfigFacts, FactorEntry, Flavour

__all__ = [
    "FLAVOURS",
    "PEFT_VERSION",
    "UNKNOWN_PARAMETER",
    "Adapter",
    "BaseIndex",
    "ConfigFacts",
    "FactorEntry",
    "Flavour",
    "Patch",
    "Placed",
    "PlacedItem",
    "PlacedValue",
    "Replacement",
    "TiedItems",
    "TokenRows",
    "consumed",
    "expert_factors",
    "holds_experts_in_out",
    "open_adapter",
    "peft",
    "placed",
    "placed_values",
    "require_known_rows",
    "stack_entry",
    "tied_items",
    "unconsumed",
    "wrapper_names",
    "writing",
]
