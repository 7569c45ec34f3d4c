"""Parameters that an adapter replaces: whole ones, biases, resized embeddings, trained rows of embeddings."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kasa_cli.adapters.adapter import Patch, Replacement, TokenRows, unconsumed
from kasa_cli.adapters.tensor_names import Place, ends_with
from kasa_cli.checkpoint import Container
from kasa_cli.errors import InvalidInput
from kasa_cli.files import quote

TOKENS, NORM = "trainable_tokens_delta", "ln_tuning_layers"
WRAPPER = ".token_adapter"
"""PEFT's wrapper of an embedding with trained rows."""
PARTS = ("modules_to_save", "original_module")
"""The parts of PEFT's wrapper of a saved module: the trained one, and the original one."""
EMBEDDINGS = frozenset(
    {"embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared", "proj_out"}
)
"""Modules that PEFT saves completely after the vocabulary was resized, though no config declares them."""


def token_rows(
    container: Container, config: Mapping[str, Any], rest: Mapping[str, Place]
) -> Iterator[TokenRows]:
    """The trained rows of embeddings, with their indices."""
    listed = config.get("trainable_token_indices") or config.get("token_indices")
    for name, place in rest.items():
        if place.short != TOKENS:
            continue
        module = place.module.removesuffix(WRAPPER)
        indices = indices_of(listed, module)
        shape = container.tensors[name].shape
        if indices is None or len(shape) != 2 or len(indices) != shape[0]:
            count = "no" if indices is None else len(indices)
            raise InvalidInput(
                f"{quote(name)} has shape {list(shape)}, the config {count} sound indices",
                str(container.path),
            )
        yield TokenRows(f"{module}.weight", name, indices)


def indices_of(listed: Any, module: str) -> tuple[int, ...] | None:
    """The rows that the config lists for a module; None unless they are distinct whole numbers."""
    if isinstance(listed, dict):
        listed = next((rows for end, rows in listed.items() if ends_with(module, end)), None)
    if not isinstance(listed, list) or not all(type(row) is int and row >= 0 for row in listed):
        return None
    return tuple(listed) if len({*listed}) == len(listed) else None


def replacements(
    config: Mapping[str, Any], container: Container, rest: Mapping[str, Place], patches: Iterable[Patch]
) -> Iterator[Replacement]:
    """The parameters that the file replaces, each with the reason in the config."""
    patched = {patch.module for patch in patches}
    patched |= {place.module.removesuffix(WRAPPER) for place in rest.values() if place.short == TOKENS}
    repeated, unused = repeats(rest), []
    for name, place in rest.items():
        if place.short == TOKENS or name in repeated:
            continue
        parameter, leaf = parameter_of(place)
        why = reason_for(config, parameter, place, patched)
        if why is None or (place.short and leaf not in ("weight", "bias")):
            unused.append(name)
            continue
        copies, before = (
            tuple(other for other, of in repeated.items() if of == (parameter, part)) for part in PARTS
        )
        yield Replacement(parameter, name, why, copies, before)
    if unused:
        raise unconsumed(unused, container)


def repeats(rest: Mapping[str, Place]) -> dict[str, tuple[str, str]]:
    """The copies of an embedding that PEFT saves twice: as declared, and because the vocabulary was resized.

    By name in the file: the parameter, and the one of `PARTS` that the copy is.
    """
    copies, whole_modules = {}, {place.module for place in rest.values() if not place.short}
    for name, place in rest.items():
        path, _, leaf = place.module.rpartition(".")
        module, _, part = path.rpartition(".")
        if not place.short and part in PARTS and f"{module}.{leaf}" in whole_modules:
            copies[name] = (f"{module}.{leaf}", part)
    return copies


def parameter_of(place: Place) -> tuple[str, str]:
    """The full name of a parameter in memory, and its last part."""
    if not place.short:
        path, _, leaf = place.module.rpartition(".")
        return f"{path.removesuffix(WRAPPER)}.{leaf}" if path else leaf, leaf
    leaf = place.short.partition(".")[2] or "weight"
    return f"{place.module}.{leaf}", leaf


def reason_for(config: Mapping[str, Any], parameter: str, place: Place, patched: set[str]) -> str | None:
    """The reason for which a file replaces a parameter; None if the config gives no reason."""
    module, _, leaf = parameter.rpartition(".")
    bias = config.get("bias", "none")
    if place.short == NORM:
        return "norm" if config.get("peft_type") == "LN_TUNING" else None
    if leaf == "bias" and (bias == "all" or (bias != "none" and module in patched)):
        return "bias"
    if place.depth:
        return "base layer" if module in patched and leaf in ("weight", "bias") else None
    if any(ends_with_name(module, saved) for saved in declared(config)):
        return "modules_to_save"
    if leaf not in ("weight", "bias") or module.rpartition(".")[2] not in EMBEDDINGS:
        return None
    # tied with a declared module: PEFT trains both as one
    return "modules_to_save" if config.get("ensure_weight_tying") and declared(config) else "resized"


def declared(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of `modules_to_save`."""
    saved = config.get("modules_to_save") or ()
    return (saved,) if isinstance(saved, str) else tuple(saved)


def ends_with_name(module: str, saved: str) -> bool:
    """PEFT's loose rule: the name of a module, or of a module that contains it, ends with these letters.

    >>> ends_with_name("layers.0.input_layernorm", "norm"), ends_with_name("score.dense", "score")
    (True, True)
    """
    parts = module.split(".")
    return bool(saved) and any(".".join(parts[:end]).endswith(saved) for end in range(1, len(parts) + 1))
