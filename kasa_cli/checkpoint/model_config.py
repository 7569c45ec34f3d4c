"""config.json of a new base: its dtype, the size of its vocabulary, and whether its weights are tied."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from kasa_cli.errors import InvalidInput

MARKS = {
    ".weight_scale_inv": "block-scaled FP8",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes NF4",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes FP4",
    ".SCB": "bitsandbytes int8",
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    "_blocks": "MXFP4",
}

HALVES = ("float16", "bfloat16")
WIDE = "float32"
TIED = "tie_word_embeddings"
VOCABULARY = "vocab_size"
TEXT = "text_config"
MAX_DEPTH = 16


def retyped(config: Mapping[str, Any], dtype: str) -> Mapping[str, Any]:
    """A config with a dtype wide enough for old and new tensors: otherwise loaders round the new ones again."""
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    named = config.get(key)
    if dtype == "auto" or named == dtype or (named not in HALVES and dtype in HALVES):
        return config
    return {**config, key: WIDE}


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config in which embedding and head are separate, at the top and in a text part that ties them.

    >>> untied({"text_config": {"tie_word_embeddings": True}})
    {'text_config': {'tie_word_embeddings': False}, 'tie_word_embeddings': False}
    """
    text = config.get(TEXT)
    parts = {TEXT: {**text, TIED: False}} if isinstance(text, Mapping) and text.get(TIED) else {}
    return {**config, **parts, TIED: False}


def resized(config: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """A config with another vocabulary size, in every place that holds the old one; at the top if none does.

    >>> resized({"vocab_size": 9, "text_config": {"vocab_size": 8}}, 8, 12)
    {'vocab_size': 9, 'text_config': {'vocab_size': 12}}
    """
    changed = _replaced(config, old, new, 0)
    return changed if changed != config else {**config, VOCABULARY: new}


def encoded(config: Mapping[str, Any]) -> bytes:
    """The bytes of the file, indented as by transformers."""
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def _replaced(config: Mapping[str, Any], old: int, new: int, depth: int) -> dict[str, Any]:
    return {
        key: new
        if key == VOCABULARY and value == old
        else _replaced(value, old, new, depth + 1)
        if isinstance(value, Mapping) and depth < MAX_DEPTH
        else value
        for key, value in config.items()
    }


def refuse_quantised(config: Mapping[str, Any], names: Iterable[str], where: str) -> None:
    """Refuse a quantised checkpoint: its numbers are codes, and their spectrum means nothing.

    Raises:
        InvalidInput: the checkpoint is quantised; the message names the method and the way out.
    """
    declared = config.get("quantization_config")
    method = declared.get("quant_method", "unknown") if isinstance(declared, Mapping) else None
    method = method or next(
        (kind for name in names for mark, kind in MARKS.items() if name.endswith(mark)), None
    )
    if method:
        raise InvalidInput(f"the weights are quantised ({method})", where, "use the unquantised original")
