"""Parses the tensor names of an adapter: the module, its tensor, and the depth in nested wrappers.

>>> parse("base_model.model.layers.0.fc.lora_A.default.weight", frozenset({"lora_A"})).module
'layers.0.fc'
"""

from typing import NamedTuple

NOISE = frozenset({"_orig_mod", "_fsdp_wrapped_module"})
"""Parts that torch.compile and FSDP add to names."""
WRAPPED = "base_layer"
LEAVES = frozenset({"weight", "bias", "U_low", "S_low", "V_low"})


class Place(NamedTuple):
    """A parsed name. `short` is empty for a parameter that the file replaces; `module` is then its full path.

    `depth` counts the wrappers around it; `adapter` is the adapter's name, which PEFT drops when it saves.
    """

    module: str
    short: str = ""
    depth: int = 0
    adapter: str = ""
    is_shared: bool = False


def parse(name: str, shorts: frozenset[str]) -> Place | None:
    """The place of a tensor with one of these short names, or of a parameter; None if the name is malformed."""
    roots = {short.partition(".")[0] for short in shorts}
    segments, has_prefix = without_prefix([part for part in name.split(".") if part not in NOISE])
    at = next((i for i in reversed(range(len(segments))) if segments[i] in roots), None)
    if at is None:
        return Place(".".join(part for part in segments if part != WRAPPED), depth=segments.count(WRAPPED))
    tail = tail_of(segments[at + 1 :])
    if tail is None:
        return None
    leaf, adapter = tail
    full = f"{segments[at]}.{leaf}" if leaf else segments[at]
    short = segments[at] if leaf == "weight" and full not in shorts else full
    path = segments[:at]
    depth = trailing(path)
    module = ".".join(part for part in path if part != WRAPPED)
    return Place(
        module, short, depth, adapter, is_shared=not path or (not has_prefix and path == ["base_model"])
    )


def without_prefix(segments: list[str]) -> tuple[list[str], bool]:
    """A name without PEFT's prefix. Files made by injection have no prefix; shared tensors have half of it."""
    if segments[:2] == ["base_model", "model"]:
        return segments[2:], True
    return segments, False


def tail_of(segments: list[str]) -> tuple[str, str] | None:
    """The leaf and the adapter's name after the root of a tensor's name; an absent one is empty."""
    leaf = segments[-1] if segments and segments[-1] in LEAVES else ""
    rest = segments[:-1] if leaf else segments
    return (leaf, rest[0] if rest else "") if len(rest) <= 1 else None


def trailing(path: list[str]) -> int:
    """Number of wrappers at the end of a path.

    >>> trailing(["experts", "base_layer", "base_layer"])
    2
    """
    return next((i for i, part in enumerate(reversed(path)) if part != WRAPPED), len(path))


def ends_with(path: str, end: str) -> bool:
    """Whether the last parts of a path are those of `end`, as PEFT matches a list of targets.

    >>> ends_with("layers.0.q_proj", "q_proj"), ends_with("layers.0.eq_proj", "q_proj")
    (True, False)
    """
    return path == end or path.endswith(f".{end}")
