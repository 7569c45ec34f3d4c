"""Names of tensors on disk and of modules in memory, by transformers."""

from kasa_cli.model_names.experts import Composition, NotAssembled, is_turned, matrices, shapes_of
from kasa_cli.model_names.name_cache import names_of
from kasa_cli.model_names.names import (
    Group,
    ModuleKind,
    NameMap,
    Shapes,
    Slot,
    UnknownFamily,
    Weight,
    split_name,
)

__all__ = [
    "Composition",
    "Group",
    "ModuleKind",
    "NameMap",
    "NotAssembled",
    "Shapes",
    "Slot",
    "UnknownFamily",
    "Weight",
    "is_turned",
    "matrices",
    "names_of",
    "shapes_of",
    "split_name",
]

LATE = ("meta_model", "name_map", "tied_weights")
"""Modules of the face that are imported where they are used, since they import transformers, which takes seconds."""
