"""The content of an adapter as plain data."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kasa_cli.checkpoint import FLOATS, Container
from kasa_cli.errors import InvalidInput
from kasa_cli.files import enumerated, quote
from kasa_cli.methods.adapter_kinds import KINDS, BaseChange, Kind

UNKNOWN_PARAMETER = ""
"""The parameter of a patch before the base is read: an adapter's tensors do not name parameters of fused experts."""


@dataclass(frozen=True)
class Patch:
    """The part of an adapter for one weight in memory.

    `tensors` maps short names (`lora_A`) to names in the file. `settings` is plain data: rank, alpha, scaling and
    the other inputs of the kind's formula. `parameter` is "weight", the name of a fused parameter, or, before the
    base is read, `UNKNOWN_PARAMETER`; then `depth` counts the wrappers around it, 0 the outermost. `copies` are
    tensors of the file that only repeat those of the same short name (RandLoRA stores its shared bases per module).
    `base_change`: what the initialisation did to the weight.
    """

    module: str
    parameter: str
    kind: str
    tensors: Mapping[str, str]
    settings: Mapping[str, Any]
    depth: int = 0
    copies: Mapping[str, str] = field(default_factory=dict)
    base_change: BaseChange = BaseChange.NONE

    @property
    def row(self) -> Kind:
        """The kind's row in the table."""
        return KINDS[self.kind]


@dataclass(frozen=True)
class Replacement:
    """A parameter in memory that the file replaces.

    `why` is modules_to_save, bias, base layer, resized or norm. `copies` are equal tensors of the file, and `before`
    are those with the value before training.
    """

    parameter: str
    tensor: str
    why: str
    copies: tuple[str, ...] = ()
    before: tuple[str, ...] = ()

    @property
    def is_base(self) -> bool:
        """Whether it is the weight under the adapter, saved with the adapter, and not a trained value."""
        return self.why in ("base layer", "resized")


@dataclass(frozen=True)
class TokenRows:
    """Trained rows of an embedding, which replace those at `indices`."""

    parameter: str
    tensor: str
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Adapter:
    """An adapter whose tensors are all used by its parts."""

    path: Path
    kind: str
    container: Container
    config: Mapping[str, Any]
    patches: tuple[Patch, ...]
    replacements: tuple[Replacement, ...]
    token_rows: tuple[TokenRows, ...]

    @property
    def row(self) -> Kind:
        """The kind's row in the table."""
        return KINDS[self.kind]

    @property
    def touched(self) -> frozenset[str]:
        """Every module that the adapter changes."""
        values = [replacement.parameter for replacement in self.replacements] + [
            row.parameter for row in self.token_rows
        ]
        return frozenset(
            {patch.module for patch in self.patches} | {name.rpartition(".")[0] for name in values}
        )


def consumed(adapter: Adapter) -> frozenset[str]:
    """Every tensor of the file that a patch or a replaced parameter uses."""
    patches = [
        name for patch in adapter.patches for name in (*patch.tensors.values(), *patch.copies.values())
    ]
    values: tuple[Replacement | TokenRows, ...] = (*adapter.replacements, *adapter.token_rows)
    copies = [
        name for replacement in adapter.replacements for name in (*replacement.copies, *replacement.before)
    ]
    return frozenset((*patches, *(value.tensor for value in values), *copies))


def unconsumed(names: Iterable[str], container: Container) -> InvalidInput:
    """The error for tensors that no field of the config explains."""
    listed = enumerated([quote(name) for name in names], 3)
    return InvalidInput(f"tensors that nothing accounts for: {listed}", str(container.path))


def require_group(
    container: Container, module: str, tensors: Mapping[str, str], groups: tuple[tuple[str, ...], ...]
) -> None:
    """Check that a module has all tensors of one group and no other."""
    nearest = min(groups, key=lambda group: len({*group} ^ {*tensors}))
    missing = [short for short in nearest if short not in tensors]
    if missing:
        raise InvalidInput(f"{enumerated(missing)} of {quote(module)} is missing", str(container.path))
    extra = [name for short, name in tensors.items() if short not in nearest]
    if extra:
        raise unconsumed(extra, container)


def require_floats(container: Container, tensors: Mapping[str, str]) -> None:
    """Refuse a quantized adapter."""
    for name in tensors.values():
        dtype = container.tensors[name].dtype
        if dtype not in FLOATS:
            raise InvalidInput(f"dtype {dtype} in an adapter", name, "save it in float32 or bfloat16")
