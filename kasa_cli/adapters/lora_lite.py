"""lora-lite's adapters: one safetensors file, the config as JSON in its header, modules named as in memory."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kasa_cli.adapters.adapter import Adapter, Patch, require_floats, require_group, unconsumed
from kasa_cli.adapters.config import check_fields, check_object
from kasa_cli.checkpoint import Container, read_header
from kasa_cli.errors import InvalidInput
from kasa_cli.files import parse_json, quote
from kasa_cli.methods.adapter_kinds import LITE_VARIANTS, Kind, sizes_of


def open_lite(path: Path) -> Adapter:
    """Read the names, the shapes and the config of a lora-lite file."""
    container = read_header(path)
    text = container.metadata.get("cfg")
    if text is None:
        problem = "no adapter: neither a folder that PEFT wrote nor a lora-lite file (no cfg in its header)"
        raise InvalidInput(problem, str(path))
    config = parse_json(text.encode(), path)
    check_object(config, path)
    kind = kind_of(config, path)
    patches = tuple(patches_of(container, config, kind))
    if not patches:
        raise InvalidInput("an adapter without tensors", str(path))
    return Adapter(path, kind.name, container, MappingProxyType(config), patches, (), ())


def kind_of(config: Mapping[str, Any], path: Path) -> Kind:
    """Check every field of a config; returns the kind that it describes."""
    name = config.get("variant")
    kind = LITE_VARIANTS.get(name) if isinstance(name, str) else None
    if kind is None:
        known = ", ".join(LITE_VARIANTS)
        raise InvalidInput(f"lora-lite variant {quote(str(name))} is not known", str(path), f"known: {known}")
    check_fields(config, kind.config, path)
    return kind


def patches_of(container: Container, config: Mapping[str, Any], kind: Kind) -> list[Patch]:
    """One patch for each module, checked to be complete and of the right shapes."""
    of_module: defaultdict[str, dict[str, str]] = defaultdict(dict)
    groups = kind.groups_for(config)
    for name in container.tensors:
        module, _, short = name.rpartition(".")
        if not module or short not in groups[0]:
            raise unconsumed([name], container)
        of_module[module][short] = name
    for module, tensors in of_module.items():
        require_group(container, module, tensors, groups)
    settings = settings_of(config, kind)
    return [patch(container, module, tensors, settings, kind) for module, tensors in of_module.items()]


def settings_of(config: Mapping[str, Any], kind: Kind) -> Mapping[str, Any]:
    """The settings of every module: lora-lite has no patterns."""
    settings = {field: config.get(field) for field in (*kind.config.settings, "variant", "r", "alpha")}
    return MappingProxyType({**settings, "scaling": kind.scaling(settings) if kind.scaling else None})


def patch(
    container: Container, module: str, tensors: dict[str, str], settings: Mapping[str, Any], kind: Kind
) -> Patch:
    """One module's patch."""
    require_floats(container, tensors)
    shapes = {short: container.tensors[name].shape for short, name in tensors.items()}
    sizes_of(kind, settings, shapes, {"r": settings["r"]}, tensors)
    return Patch(module, "weight", kind.name, MappingProxyType(tensors), settings, base_change=kind.base)
