"""Caches the names of a checkpoint in the store: mapping them by transformers takes longer.

They are a function of config.json, of the names and shapes on disk, and of the versions of transformers and kasa.
"""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from kasa_cli import __version__
from kasa_cli.files import NAMES, Store, canonical_json
from kasa_cli.model_names.experts import Composition
from kasa_cli.model_names.names import ModuleKind, NameMap, Shapes, Slot, Weight

EDITION = 1
"""Increase it when `name_map` maps the same model differently."""
QUESTION = "names"


def names_of(config: Mapping[str, Any], shapes: Shapes, store: Store | None) -> NameMap:
    """The names from the store; or from transformers, and then stored.

    Raises:
        InvalidInput: the config does not describe these tensors.
    """
    shelf = store.shelf(NAMES) if store else None
    content, key = _about(config, shapes), _key()
    known = _read(shelf.get(content, QUESTION, key)) if shelf else None
    if known is not None:
        return known
    from kasa_cli.model_names.name_map import map_names

    names = map_names(config, shapes)
    if shelf and names.model_class is not None:  # an unknown class may be known after an install
        shelf.put(content, QUESTION, key, packed(names))
    return names


def packed(names: NameMap) -> bytes:
    """The names as JSON."""
    slots = [
        [name, slot.module, slot.parameter, slot.kind, slot.in_block, slot.tied_with]
        for name, slot in names.slots.items()
    ]
    weights = [[getattr(weight, field) for field in Weight.__dataclass_fields__] for weight in names.weights]
    content = [names.model_class, names.note, slots, names.linear_modules, weights]
    return json.dumps(content, separators=(",", ":")).encode()


def unpacked(payload: bytes) -> NameMap:
    """The names of a packed payload.

    Raises:
        KeyError, TypeError, ValueError: something else was.
    """
    model_class, note, slots, linear_modules, weights = json.loads(payload)
    return NameMap(
        model_class,
        note,
        {
            name: Slot(module, parameter, ModuleKind(kind), in_block, tied)
            for name, module, parameter, kind, in_block, tied in slots
        },
        tuple(linear_modules),
        tuple(_weight(*fields) for fields in weights),
    )


def _weight(label: str, shape: list[int], kind: str, *rest: Any) -> Weight:
    is_module, is_linear, in_block, tied_with, (sources, operations) = rest
    made_of = Composition(tuple(map(tuple, sources)), tuple(operations))
    return Weight(label, tuple(shape), ModuleKind(kind), is_module, is_linear, in_block, tied_with, made_of)


def _read(payload: bytes | None) -> NameMap | None:
    try:
        return None if payload is None else unpacked(payload)
    except (KeyError, TypeError, ValueError):
        return None


def _about(config: Mapping[str, Any], shapes: Shapes) -> str:
    """The hash of the config and the shapes, in their order."""
    question = json.dumps([dict(config), [[name, *shape] for name, shape in shapes.items()]])
    return hashlib.sha256(question.encode()).hexdigest()


def _key() -> str:
    known = {"edition": EDITION, "kasa": __version__, "transformers": version("transformers")}
    return hashlib.sha256(canonical_json(known)).hexdigest()[:16]
