"""Dtypes by their names: on the command line, in safetensors headers and in torch."""

from types import MappingProxyType

import torch

BITS = MappingProxyType(
    {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
    | dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
    | dict.fromkeys(("U16", "I16", "F16", "BF16"), 16)
    | dict.fromkeys(("U32", "I32", "F32"), 32)
    | dict.fromkeys(("U64", "I64", "F64", "C64"), 64)
)
"""Bits of one element, by safetensors' name of the dtype. F4 and F6 are packed."""

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


FLOATS = ("F64", "F32", "F16", "BF16")


DTYPES = {"auto": None, "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
