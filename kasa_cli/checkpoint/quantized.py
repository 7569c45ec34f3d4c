"""Quantised checkpoints: found by their config or by the tensors they leave, and refused by name."""

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
