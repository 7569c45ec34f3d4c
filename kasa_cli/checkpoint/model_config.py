"""What a new base says of itself in config.json: its dtype, its vocabulary, whether its ends are tied."""

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
    """A config with a dtype that holds old and new tensors: loaders would else round the new ones again."""
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    named = config.get(key)
    if dtype == "auto" or named == dtype or (named not in HALVES and dtype in HALVES):
        return config
    return {**config, key: WIDE}


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that says that embedding and head are two: at the top, and where its text part says otherwise.

    >>> untied({"text_config": {"tie_word_embeddings": True}})
    {'text_config': {'tie_word_embeddings': False}, 'tie_word_embeddings': False}
    """
    text = config.get(TEXT)
    parts = {TEXT: {**text, TIED: False}} if isinstance(text, Mapping) and text.get(TIED) else {}
    return {**config, **parts, TIED: False}


def resized(config: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """A config with another size of vocabulary, wherever the old one stands; at the top, if nowhere.

    >>> resized({"vocab_size": 9, "text_config": {"vocab_size": 8}}, 8, 12)
    {'vocab_size': 9, 'text_config': {'vocab_size': 12}}
    """
    changed = _replaced(config, old, new, 0)
    return changed if changed != config else {**config, VOCABULARY: new}


def encoded(config: Mapping[str, Any]) -> bytes:
    """The file, as transformers would indent it."""
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
    """Refuse a checkpoint whose numbers are codes: their spectrum would mean nothing.

    Raises:
        InvalidInput: naming the method, and what to do.
    """
    declared = config.get("quantization_config")
    method = declared.get("quant_method", "unknown") if isinstance(declared, Mapping) else None
    method = method or next(
        (kind for name in names for mark, kind in MARKS.items() if name.endswith(mark)), None
    )
    if method:
        raise InvalidInput(f"the weights are quantised ({method})", where, "use the unquantised original")
