"""lora-lite's adapters: one safetensors file, the config as JSON in its header, modules named as in memory."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from kasa_cli.adapters.adapter import Adapter, Patch, require_floats, require_group, unconsumed
from kasa_cli.adapters.config_fields import (
    ANY,
    COUNT,
    LABEL,
    NUMBER,
    Field,
    check_fields,
    check_object,
    one_of,
    rows,
)
from kasa_cli.adapters.peft_types import groups
from kasa_cli.adapters.tensor_shapes import bound
from kasa_cli.checkpoint.safetensors_file import Container, read_header
from kasa_cli.errors import InvalidInput
from kasa_cli.files.untrusted import enumerated, parse_json, quote

COMMON = {
    **rows(ANY, "target_roles target_names exclude_names layers"),
    **rows(LABEL, "variant dtype"),
    "r": COUNT,
    "alpha": NUMBER,
}


class Variant(NamedTuple):
    """One of lora-lite's adapters: its kind here, the fields it has more, and the tensors of a module.

    `base_start`: what its start takes off the base.
    """

    kind: str
    tensors: str
    fields: Mapping[str, Field] = MappingProxyType({})
    is_scaled: bool = False
    base_start: str = "kept"


ROAD = {"road_variant": one_of("road_1", "road_2", "road_4"), "group_size": COUNT}
ANTIPASTO = {"block_size": COUNT, "max_rotation_angle": NUMBER, "rotate_basis": one_of("V", "U", "none")}

VARIANTS: Mapping[str, Variant] = {
    "lora": Variant("lite-lora", "lora_A lora_B", is_scaled=True),
    "eva": Variant("lite-lora", "lora_A lora_B", is_scaled=True),
    "pissa": Variant("lite-pissa", "lora_A lora_B", is_scaled=True, base_start="pissa"),
    "dora": Variant("lite-dora", "lora_A lora_B lora_m", is_scaled=True),
    "delora": Variant("lite-delora", "lora_A lora_B lora_lambda lora_wnorm", {"lambda0": ANY}),
    "hra": Variant("lite-hra", "lora_U"),
    "ia3": Variant("lite-ia3", "lora_g"),
    "ia3_ff": Variant("lite-ia3_ff", "lora_g"),
    "road": Variant("lite-road", "lora_road_theta lora_road_alpha", ROAD),
    "antipasto": Variant(
        "lite-antipasto", "lora_U lora_S lora_Vh lora_delta_s", ANTIPASTO, base_start="its own factors"
    ),
}
"""By the `variant` of the config. AntiPaSTO's base lacks what the file's own U, S and Vh make."""


def open_lite(path: Path) -> Adapter:
    """Read a lora-lite file. Nothing of it but names, shapes and the config is looked at."""
    container = read_header(path)
    text = container.metadata.get("cfg")
    if text is None:
        what = "no adapter: neither a folder that PEFT wrote nor a lora-lite file (no cfg in its header)"
        raise InvalidInput(what, str(path))
    config = parse_json(text.encode(), path)
    check_object(config, path)
    variant = variant_of(config, path)
    patches = tuple(patches_of(container, config, variant))
    if not patches:
        raise InvalidInput("an adapter without tensors", str(path))
    return Adapter(path, variant.kind, container, MappingProxyType(config), patches, (), ())


def variant_of(config: Mapping[str, Any], path: Path) -> Variant:
    """The row of a config, every field checked."""
    name = config.get("variant")
    variant = VARIANTS.get(name) if isinstance(name, str) else None
    if variant is None:
        known = ", ".join(VARIANTS)
        raise InvalidInput(f"lora-lite variant {quote(str(name))} is not known", str(path), f"known: {known}")
    check_fields(config, {**COMMON, **variant.fields}, path)
    missing = [
        field for field in ("r", "alpha", *variant.fields) if config.get(field) is None and field != "lambda0"
    ]
    if missing:
        raise InvalidInput(f"{enumerated(missing)} is missing", str(path))
    return variant


def patches_of(container: Container, config: Mapping[str, Any], variant: Variant) -> list[Patch]:
    """One patch a module, complete and of the right shapes."""
    of_module: defaultdict[str, dict[str, str]] = defaultdict(dict)
    has_rotation = variant.kind == "lite-antipasto" and config["rotate_basis"] != "none"
    wanted = groups(f"{variant.tensors} lora_rot_T" if has_rotation else variant.tensors)
    for name in container.tensors:
        module, _, short = name.rpartition(".")
        if not module or short not in wanted[0]:
            raise unconsumed([name], container)
        of_module[module][short] = name
    for module, tensors in of_module.items():
        require_group(container, module, tensors, wanted)
    return [patch(container, module, tensors, config, variant) for module, tensors in of_module.items()]


def patch(
    container: Container, module: str, tensors: dict[str, str], config: Mapping[str, Any], variant: Variant
) -> Patch:
    """One module's patch."""
    r, alpha = config["r"], config["alpha"]
    settings = {
        **{field: config.get(field) for field in variant.fields},
        "variant": config["variant"],
        "r": r,
        "alpha": alpha,
        "scaling": alpha / r if variant.is_scaled else None,
        "base_start": variant.base_start,
    }
    require_floats(container, tensors)
    shapes = {short: container.tensors[name].shape for short, name in tensors.items()}
    bound(variant.kind, settings, shapes, {"r": r}, tensors)
    return Patch(module, "weight", variant.kind, MappingProxyType(tensors), MappingProxyType(settings))
