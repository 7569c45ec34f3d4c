"""Reads an adapter from its files as plain data, without PEFT, without the base, and without values of weights.

PEFT silently drops tensors that it does not know. Here each tensor is part of a patch of one module, a replaced
parameter, or the trained rows of an embedding; any other tensor is an error that names it.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kasa_cli.adapters.adapter import (
    UNKNOWN_PARAMETER,
    Adapter,
    Patch,
    Replacement,
    TokenRows,
    require_floats,
    require_group,
    unconsumed,
)
from kasa_cli.adapters.config import read_config
from kasa_cli.adapters.lora_lite import open_lite
from kasa_cli.adapters.module_settings import Resolver, resolver_of
from kasa_cli.adapters.peft import CONFIG, WEIGHTS
from kasa_cli.adapters.saved_parameters import EMBEDDINGS, NORM, TOKENS, replacements, token_rows
from kasa_cli.adapters.tensor_names import Place, ends_with, parse
from kasa_cli.checkpoint import Container, read_header, require_inside
from kasa_cli.errors import InvalidInput, UnsafeInput
from kasa_cli.files import enumerated, quote
from kasa_cli.methods.adapter_kinds import BaseChange, is_absent, sizes_of

__all__ = ["Adapter", "Patch", "Replacement", "TokenRows", "open_adapter"]

PICKLE = "adapter_model.bin"
FIRST_NUMBER = re.compile(r"[^.]+(?:\.[^.]+)*?\.[^.]+\.([0-9]{1,9})\.")
"""PEFT's number of a layer: the first number with two names before it."""


def open_adapter(path: Path, *, hub_cache: Path | None = None) -> Adapter:
    """Read the config and the header of a PEFT folder, or of one lora-lite file.

    `hub_cache` is the cache that kasa itself resolved a Hub id into; links that stay inside it are trusted.

    Raises:
        InvalidInput: a field, a name or a shape is not understood, or does not fit the others.
        UnsafeInput: the weights are a pickle, or a link leads out of the folder.
    """
    if not path.is_dir():
        return open_lite(path)
    require_files(path)
    for name in (CONFIG, WEIGHTS):
        require_inside(path, name, hub_cache)
    config = read_config(path)
    resolver = resolver_of(config, path / CONFIG)
    return assembled(path, read_header(path / WEIGHTS), resolver)


def require_files(path: Path) -> None:
    """Refuse a folder that is not an adapter, with an error that says what is missing."""
    if not (path / CONFIG).exists():
        inside = [name for name in ("adapter", "tail") if (path / name / CONFIG).exists()]
        remedy = f"name {' or '.join(str(path / name) for name in inside)}" if inside else ""
        raise InvalidInput(f"no adapter: {CONFIG} is missing", str(path), remedy)
    if (path / WEIGHTS).exists():
        return
    if (path / PICKLE).exists():
        remedy = "if you trust it, load it with PEFT and save it as safetensors"
        raise UnsafeInput(f"weights in a pickle, {PICKLE}", str(path), remedy)
    raise InvalidInput(f"no adapter: {WEIGHTS} is missing", str(path))


def assembled(path: Path, container: Container, resolver: Resolver) -> Adapter:
    """The adapter, with the tensors of its file sorted by use."""
    places = parsed(container, resolver.kind.names | {TOKENS, NORM})
    shared = {p.short: name for name, p in places.items() if p.is_shared and p.short in resolver.kind.shared}
    parts = {
        name: p
        for name, p in places.items()
        if p.short and p.short not in (TOKENS, NORM) and name not in shared.values()
    }
    rest = {name: p for name, p in places.items() if name not in parts and name not in shared.values()}
    patches = patches_of(container, resolver, parts, shared)
    rows = tuple(token_rows(container, resolver.config, rest))
    replaced = tuple(replacements(resolver.config, container, rest, patches))
    require_targets(resolver, patches, replaced)
    require_targeted(resolver, patches)
    if not rows and not is_absent(resolver.config.get("trainable_token_indices")):
        raise InvalidInput("trainable_token_indices without trained rows", str(container.path))
    if not patches and not replaced and not rows:
        raise InvalidInput("an adapter without tensors", str(container.path))
    patches = tuple(on_own_base(patch, replaced) for patch in patches)
    return Adapter(path, resolver.kind.name, container, resolver.config, patches, replaced, rows)


def on_own_base(patch: Patch, replaced: Iterable[Replacement]) -> Patch:
    """The patch of a weight that is also in the file, with the changes of the initialisation."""
    has_base = any(
        replacement.parameter == f"{patch.module}.weight" and replacement.why == "base layer"
        for replacement in replaced
    )
    if not has_base or "init_lora_weights" not in patch.settings:
        return patch
    settings = MappingProxyType({**patch.settings, "init_lora_weights": True})
    kind = patch.row.on_changed_base or patch.kind
    return replace(patch, kind=kind, settings=settings, base_change=BaseChange.IN_FILE)


def parsed(container: Container, shorts: frozenset[str]) -> dict[str, Place]:
    """The place of every tensor. Two tensors at one place are refused, and so are several adapters in one file."""
    places, adapters = {}, set()
    owners: dict[tuple[str, str, int], str] = {}
    for name in container.tensors:
        place = parse(name, shorts)
        if place is None or not (place.module or place.is_shared):
            raise unconsumed([name], container)
        before = owners.setdefault((place.module, place.short, place.depth if place.short else 0), name)
        if before != name:
            raise InvalidInput(f"{quote(before)} and {quote(name)} are the same tensor", str(container.path))
        places[name] = place
        adapters.add(place.adapter)
    if len(adapters - {""}) > 1:
        raise InvalidInput(
            f"several adapters in one file: {enumerated(sorted(adapters - {''}))}", str(container.path)
        )
    return places


# --- patches ---


def patches_of(
    container: Container, resolver: Resolver, parts: Mapping[str, Place], shared: Mapping[str, str]
) -> tuple[Patch, ...]:
    """The tensors grouped by module, checked to be complete and of the right shapes."""
    of_module: defaultdict[tuple[str, int], dict[str, str]] = defaultdict(dict)
    for name, place in parts.items():
        if place.is_shared:
            raise unconsumed([name], container)
        of_module[place.module, place.depth][place.short] = name
    for (module, _), tensors in of_module.items():
        require_group(container, module, tensors, resolver.kind.groups_for(resolver.config))
    absent = [short for short in resolver.kind.shared if of_module and short not in shared]
    if absent:
        raise InvalidInput(f"{enumerated(absent)} is missing", str(container.path))
    if shared and not of_module:
        raise unconsumed(shared.values(), container)
    return tuple(patch(container, resolver, key, own, shared) for key, own in of_module.items())


def patch(
    container: Container,
    resolver: Resolver,
    key: tuple[str, int],
    own: dict[str, str],
    shared: Mapping[str, str],
) -> Patch:
    """The patch of one module."""
    module, depth = key
    is_open = may_be_parameter(resolver.config, module, depth)
    if depth and not is_open:
        raise unconsumed(own.values(), container)
    tensors = {**own, **shared}
    require_floats(container, tensors)
    shapes = {short: container.tensors[name].shape for short, name in tensors.items()}
    settings = {**resolver.settings(module), **resolver.kind.read_settings(shapes)}
    if problem := resolver.kind.contradiction(resolver.config, module, settings):
        raise InvalidInput(f"{quote(module)}: {problem}", str(container.path))
    sizes_of(
        resolver.kind, settings, shapes, {} if is_open else known_sizes(resolver, module, settings), tensors
    )
    copies = {short: name for short, name in own.items() if short in shared}
    return Patch(
        module,
        UNKNOWN_PARAMETER if is_open else "weight",
        resolver.kind.name,
        MappingProxyType(tensors),
        MappingProxyType(settings),
        depth,
        MappingProxyType(copies),
        resolver.initialisation.base,
    )


def known_sizes(resolver: Resolver, module: str, settings: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of a module's tensors that the config gives."""
    rank = {"r": settings["r"]} if "r" in settings else {}
    return {**rank, **resolver.kind.read_sizes(resolver.config, module)}


def may_be_parameter(config: Mapping[str, Any], module: str, depth: int) -> bool:
    """Whether a module's tensors may be for a parameter that only the base determines: no target names the module."""
    if not config.get("target_parameters"):
        return False
    listed = config.get("target_modules")
    is_module = isinstance(listed, list) and any(ends_with(module, target) for target in listed)
    return depth > 0 or not is_module


def require_targets(resolver: Resolver, patches: Iterable[Patch], replaced: Iterable[Replacement]) -> None:
    """Check that the file has every target with a number in its name: such a target is a single module."""
    listed = resolver.config.get("target_modules")
    if not isinstance(listed, list) or not is_absent(resolver.config.get("exclude_modules")):
        return
    numbered = [target for target in listed if any(part.isdecimal() for part in target.split("."))]
    modules = {patch.module for patch in patches} | {
        replacement.parameter.rpartition(".")[0] for replacement in replaced
    }
    ends = {end for module in modules for end in endings(module)} if numbered else set()
    absent = [quote(target) for target in numbered if target not in ends]
    if absent:
        raise InvalidInput(f"targets without tensors: {enumerated(absent, 3)}", str(resolver.path))


def require_targeted(resolver: Resolver, patches: Iterable[Patch]) -> None:
    """Check that the config targets every module that the file patches: PEFT drops the others."""
    listed = resolver.config.get("target_modules")
    if not isinstance(listed, list) or not listed or resolver.config.get("target_parameters"):
        return
    for patch in patches:
        if not is_targeted(resolver.config, patch.module, listed):
            problem = f"tensors of {quote(patch.module)}, which the config does not target"
            raise InvalidInput(problem, str(resolver.path), "PEFT would drop them: correct the config")


def is_targeted(config: Mapping[str, Any], module: str, listed: list[str]) -> bool:
    """Whether a list of targets names a module that nothing excludes, or one that may be tied with it."""
    if config.get("ensure_weight_tying") and module.rpartition(".")[2] in EMBEDDINGS:
        return True
    excluded = config.get("exclude_modules")
    if isinstance(excluded, list) and any(ends_with(module, end) for end in excluded):
        return False
    return any(ends_with(module, end) for end in listed) and is_in_layers(config, module, listed)


def is_in_layers(config: Mapping[str, Any], module: str, listed: Iterable[str]) -> bool:
    """Whether a module is in `layers_to_transform`. Untrusted patterns are not matched."""
    layers = config.get("layers_to_transform")
    if layers in (None, []) or module in listed or not is_absent(config.get("layers_pattern")):
        return True
    number = FIRST_NUMBER.match(module)
    return number is not None and int(number[1]) in (layers if isinstance(layers, list) else [layers])


def endings(path: str) -> Iterator[str]:
    """A path, and its ends without the first parts.

    >>> list(endings("a.b.c"))
    ['a.b.c', 'b.c', 'c']
    """
    while path:
        yield path
        path = path.partition(".")[2]
