"""Writes a plain LoRA, with the module names of PEFT, of the tensors on disk, or of lora-lite.

The LoRA is uniform, so that every server reads it: one rank, alpha = rank, no patterns, only `lora_A` and `lora_B`.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kasa_cli.adapters import peft
from kasa_cli.adapters.base import BaseIndex
from kasa_cli.adapters.placement import Placed, holds_experts_in_out, weight_of
from kasa_cli.errors import InvalidInput, UsageError
from kasa_cli.model_names import ModuleKind, Weight

LITE_WEIGHTS = "adapter.safetensors"
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's `max_lora_rank`."""


class StackMember(NamedTuple):
    """Rows [start, stop) in memory of one matrix of a place."""

    number: int
    start: int
    stop: int


@dataclass(frozen=True)
class FactorEntry:
    """One pair of tensors in the file, and its target in the config.

    `sides` are PEFT's (out, in). `is_turned`: memory holds (in, out), so the factors are transposed. Several members
    are experts, stacked as in PEFT.
    """

    target: str
    A: str
    B: str
    sides: tuple[int, int]
    members: tuple[StackMember, ...]
    is_turned: bool
    is_parameter: bool = False
    is_conv1d: bool = False

    def shapes(self, rank: int) -> list[tuple[str, str, tuple[int, ...]]]:
        """Names, dtypes and shapes in a file of this rank."""
        outs, ins = self.sides
        width = rank * len(self.members)
        return [(self.A, "F32", (width, ins)), (self.B, "F32", (outs, width))]

    def tensors(self, left: Tensor, right: Tensor, rank: int) -> dict[str, Tensor]:
        """The pair, padded to a rank: `left` (e x rows x n) times `right` (e x n x columns) is added in memory."""
        pairs = [
            self._pair(left[member.number, member.start : member.stop], right[member.number], rank)
            for member in self.members
        ]
        A, B = torch.cat([A for A, _ in pairs]), torch.stack([B for _, B in pairs], dim=2).flatten(1)
        return {self.A: A, self.B: B}

    def _pair(self, left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        A, B = (left.T, right.T) if self.is_turned else (right, left)
        pad, missing = torch.nn.functional.pad, rank - len(A)
        return pad(A, (0, 0, 0, missing)), pad(B, (0, missing))


Flavour = Callable[[BaseIndex, Placed], list[FactorEntry]]


def in_memory(base: BaseIndex, place: Placed) -> list[FactorEntry]:
    """PEFT's own names: of the modules in memory, and of fused experts by the nesting of their wrappers.

    Raises:
        InvalidInput: the module belongs to an older layout and does not exist in memory.
    """
    module, weight = place.patch.module, weight_of(base, place.patch)
    if (module, "weight") not in base.holders and module not in base.weights and module not in base.stacks:
        raise InvalidInput("this module exists on disk but not in memory", module, "use --names disk")
    turned = is_turned(base, place, weight)
    stem = f"{peft.PREFIX}{module}{'.base_layer' * place.patch.depth}"
    A, B = (
        f"{stem}.lora_embedding_{side}" if is_embedding(weight) else f"{stem}.lora_{side}.weight"
        for side in "AB"
    )
    by_parameter = not weight.is_module or (weight.kind is ModuleKind.ROUTER and not weight.is_linear)
    target = f"{module}.{place.patch.parameter}" if by_parameter else module
    members = tuple(StackMember(number, 0, place.shape[0]) for number in range(len(place.matrices)))
    is_conv1d = not by_parameter and turned and not is_embedding(weight)
    return [FactorEntry(target, A, B, _sides(place.shape, turned), members, turned, by_parameter, is_conv1d)]


def on_disk(base: BaseIndex, place: Placed) -> list[FactorEntry]:
    """The names of the tensors on disk, which vLLM and llama.cpp map themselves; each expert has its own entry.

    Raises:
        InvalidInput: one tensor holds several experts.
    """
    weight = weight_of(base, place.patch)
    turned, entries = is_turned(base, place, weight), []
    for number, parts in enumerate(place.matrices):
        for part in parts:
            if part.piece.index is not None:
                problem = "experts in one tensor on disk have no separate names"
                raise InvalidInput(problem, part.piece.name, "use --names peft, or kasa merge")
            name = part.piece.name.removesuffix(".weight")
            sides = _sides((part.stop - part.start, place.shape[1]), turned)
            ends = "lora_embedding_{}" if is_embedding(weight) else "lora_{}.weight"
            A, B = (f"{peft.PREFIX}{name}.{ends.format(side)}" for side in "AB")
            members = (StackMember(number, part.start, part.stop),)
            is_conv1d = turned and weight.kind is ModuleKind.CONV1D
            entries.append(FactorEntry(name, A, B, sides, members, turned, is_conv1d=is_conv1d))
    return entries


def in_lite(base: BaseIndex, place: Placed) -> list[FactorEntry]:
    """lora-lite's names, which exist for linear modules in memory only.

    Raises:
        InvalidInput: the weight is not that of an `nn.Linear`.
    """
    (entry,) = in_memory(base, place)
    weight = weight_of(base, place.patch)
    is_linear = weight.is_linear or (
        base.names.model_class is None and weight.kind in (ModuleKind.LINEAR, ModuleKind.HEAD)
    )
    if entry.is_parameter or not is_linear:
        raise InvalidInput(
            f"lora-lite holds linear modules only, not {weight.kind}", entry.target, "use --to lora"
        )
    A, B = (f"{entry.target}.lora_{side}" for side in "AB")
    return [FactorEntry(entry.target, A, B, entry.sides, entry.members, entry.is_turned)]


FLAVOURS: Mapping[str, Flavour] = {"peft": in_memory, "disk": on_disk}
"""The values of `--names`."""


def is_embedding(weight: Weight) -> bool:
    """Whether the factors have PEFT's names for embeddings."""
    return weight.is_module and weight.kind is ModuleKind.EMBEDDING


def is_turned(base: BaseIndex, place: Placed, weight: Weight) -> bool:
    """Whether memory holds the transpose of PEFT 0.21's product of the factors."""
    if is_embedding(weight):
        return True
    if weight.is_module or base.names.model_class is None:
        return place.is_transposed
    return holds_experts_in_out(base.names.model_class)


def padded_rank(rank: int) -> int:
    """The next rank that servers accept.

    >>> [padded_rank(rank) for rank in (1, 2, 16, 300)]
    [1, 8, 16, 320]
    """
    padded = next((served for served in SERVED_RANKS if served >= rank), None)
    if padded is None:
        problem = f"rank {rank} is above {SERVED_RANKS[-1]}, the largest that servers accept"
        raise UsageError(problem, "--pad-rank", f"recompress it with --rank {SERVED_RANKS[-1]} and --restart")
    return padded


@dataclass(frozen=True)
class ConfigFacts:
    """The facts in a config beside its targets. `base` is (Hub id, commit) of the model that it fits, if known.

    `is_on_disk`: the names are those of tensors on disk, which PEFT does not rewrite.
    """

    rank: int
    base: tuple[str | None, str | None]
    model_class: str | None
    model_config: Mapping[str, Any]
    is_on_disk: bool = False


def peft_config(entries: Sequence[FactorEntry], facts: ConfigFacts, modules: Iterable[str]) -> bytes:
    """The `adapter_config.json` of exactly these entries; `modules` are all those of the model."""
    chosen = [entry.target for entry in entries if not entry.is_parameter]
    named = peft.target_modules(chosen, modules)
    config = peft.plain_config(named, facts.rank, facts.base, facts.model_class)
    experts = set() if facts.is_on_disk else set(peft.expert_names(facts.model_config))
    config = peft.by_parameter(config, [name for name in chosen if name.rpartition(".")[2] in experts])
    parameters = [entry.target for entry in entries if entry.is_parameter]
    if parameters:
        config["target_parameters"] = [*(config["target_parameters"] or []), *parameters]
    config["fan_in_fan_out"] = any(entry.is_conv1d for entry in entries)
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def lite_config(entries: Sequence[FactorEntry], rank: int) -> str:
    """The config in the header of lora-lite's file: names are patterns, and there are no roles."""
    config = {
        "alpha": rank,
        "dtype": "float32",
        "exclude_names": [],
        "layers": None,
        "r": rank,
        "target_names": [f"^{re.escape(entry.target)}$" for entry in entries],
        "target_roles": [],
        "variant": "lora",
    }
    return json.dumps(config, sort_keys=True)


def _sides(shape: tuple[int, int], turned: bool) -> tuple[int, int]:
    return (shape[1], shape[0]) if turned else shape
