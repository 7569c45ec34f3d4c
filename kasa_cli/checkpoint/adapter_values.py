"""Parameters that an adapter holds anew: whole ones, biases, resized embeddings, and trained rows of embeddings."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kasa_cli.checkpoint.adapter import Patch, Replacement, TokenRows, unconsumed
from kasa_cli.checkpoint.adapter_names import Place, ends_with
from kasa_cli.checkpoint.container import Container
from kasa_cli.checkpoint.untrusted import quote
from kasa_cli.errors import InvalidInput

TOKENS, NORM = "trainable_tokens_delta", "ln_tuning_layers"
EMBEDDINGS = frozenset(
    {"embed_tokens", "lm_head", "wte", "word_embeddings", "embed_in", "embed_out", "shared"}
)
"""Modules that PEFT saves whole, undeclared, after the vocabulary was resized."""


def token_rows(
    container: Container, config: Mapping[str, Any], rest: Mapping[str, Place]
) -> Iterator[TokenRows]:
    """The trained rows of embeddings, and which rows they are."""
    said = config.get("trainable_token_indices") or config.get("token_indices")
    for name, place in rest.items():
        if place.short != TOKENS:
            continue
        module = place.module.removesuffix(".token_adapter")
        indices = indices_of(said, module)
        shape = container.tensors[name].shape
        if indices is None or len(shape) != 2 or len(indices) != shape[0]:
            count = "no" if indices is None else len(indices)
            raise InvalidInput(
                f"{quote(name)} has shape {list(shape)}, the config {count} sound indices",
                str(container.path),
            )
        yield TokenRows(f"{module}.weight", name, indices)


def indices_of(said: Any, module: str) -> tuple[int, ...] | None:
    """The rows that the config lists for a module: whole numbers, none twice."""
    if isinstance(said, dict):
        said = next((rows for end, rows in said.items() if ends_with(module, end)), None)
    if not isinstance(said, list) or not all(type(row) is int and row >= 0 for row in said):
        return None
    return tuple(said) if len({*said}) == len(said) else None


def replacements(
    config: Mapping[str, Any], container: Container, rest: Mapping[str, Place], patches: Iterable[Patch]
) -> Iterator[Replacement]:
    """The parameters that the file holds anew, each with the reason that the config gives."""
    patched = {patch.module for patch in patches}
    left = []
    for name, place in rest.items():
        if place.short == TOKENS:
            continue
        parameter, leaf = parameter_of(place)
        why = reason_for(config, parameter, place, patched)
        if why is None or (place.short and leaf not in ("weight", "bias")):
            left.append(name)
        else:
            yield Replacement(parameter, name, why)
    if left:
        raise unconsumed(left, container)


def parameter_of(place: Place) -> tuple[str, str]:
    """The full name of a parameter in memory, and its last part."""
    if not place.short:
        return place.module, place.module.rpartition(".")[2]
    leaf = place.short.partition(".")[2] or "weight"
    return f"{place.module}.{leaf}", leaf


def reason_for(config: Mapping[str, Any], parameter: str, place: Place, patched: set[str]) -> str | None:
    """Why a file holds a parameter anew; None if nothing says so."""
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
    return "resized" if leaf in ("weight", "bias") and module.rpartition(".")[2] in EMBEDDINGS else None


def declared(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of `modules_to_save`."""
    saved = config.get("modules_to_save") or ()
    return (saved,) if isinstance(saved, str) else tuple(saved)


def ends_with_name(module: str, saved: str) -> bool:
    """PEFT's loose rule: a module, or one that it lies in, ends with these letters ("norm" takes `input_layernorm`).

    >>> ends_with_name("layers.0.input_layernorm", "norm"), ends_with_name("score.dense", "score")
    (True, True)
    """
    parts = module.split(".")
    return bool(saved) and any(".".join(parts[:end]).endswith(saved) for end in range(1, len(parts) + 1))
