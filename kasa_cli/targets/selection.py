"""The targets of a truncation, and the reason for every tensor that is left alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kasa_cli.checkpoint.dtypes import FLOATS
from kasa_cli.checkpoint.matrix import Matrix, Orientation, Piece
from kasa_cli.checkpoint.safetensors_file import TensorEntry
from kasa_cli.errors import UsageError
from kasa_cli.model_names.names import Kind, Slot
from kasa_cli.report import Skipped
from kasa_cli.targets.patterns import Patterns, matches, require_match

BARRED = {
    Kind.EMBEDDING: "embedding",
    Kind.ROUTER: "router",
    Kind.EXPERTS: "expert, fused in memory: PEFT has no KaSA for fused experts",
    Kind.OTHER: "not a linear layer",
}
"""Kinds that no pattern can make a target."""


@dataclass(frozen=True)
class Target:
    """A matrix and its truncation rank: `dropped` components are dropped. `shape` is that in memory."""

    matrix: Matrix
    module: str
    shape: tuple[int, int]
    dropped: int

    @property
    def name(self) -> str:
        """The name of the matrix."""
        return self.matrix.name


@dataclass(frozen=True)
class Selection:
    """The targets, and all other tensors, each with its reason."""

    targets: tuple[Target, ...]
    skipped: tuple[Skipped, ...]


RankRule = Callable[[int, int], int]
"""(out_features, in_features) → the number of components to drop."""


def select(
    tensors: Mapping[str, TensorEntry], slots: Mapping[str, Slot], patterns: Patterns, rank_rule: RankRule
) -> Selection:
    """Part the tensors of a checkpoint into targets and skipped ones, in the order given.

    Raises:
        UsageError: a pattern matches nothing, or nothing that can be operated on; or no target is left.
    """
    modules = {slot.module: name for name, slot in slots.items() if slot.parameter == "weight"}
    for pattern in (*patterns.targets, *patterns.excludes):
        require_match(pattern, modules)
    reasons = {name: _reason(entry, slots[name], patterns) for name, entry in tensors.items()}
    for pattern in patterns.targets:
        _require_operable(pattern, modules, reasons)
    targets = tuple(
        _target(entry, slots[name], rank_rule) for name, entry in tensors.items() if reasons[name] is None
    )
    if not targets:
        raise UsageError(
            "no target is left", "", "see the skipped tensors with --dry-run, or name some with --target"
        )
    return Selection(targets, tuple(Skipped(name, reason) for name, reason in reasons.items() if reason))


def _target(entry: TensorEntry, slot: Slot, rank_rule: RankRule) -> Target:
    orientation = Orientation.of(slot.kind is Kind.CONV1D)
    matrix = Matrix.of({entry.name: entry}, entry.name, (Piece(entry.name),), orientation)
    return Target(matrix, slot.module, matrix.stored_shape, rank_rule(*matrix.shape))


def _reason(entry: TensorEntry, slot: Slot, patterns: Patterns) -> str | None:
    """Why a tensor is left alone; None for a target."""
    if len(entry.shape) < 2 or slot.parameter == "bias":
        return "not a matrix"
    barred = _barred(entry, slot)
    if barred:
        return barred
    if any(matches(slot.module, pattern) for pattern in patterns.excludes):
        return "excluded"
    if patterns.targets:
        return None if any(matches(slot.module, pattern) for pattern in patterns.targets) else "not named"
    return _off_by_default(slot)


def _barred(entry: TensorEntry, slot: Slot) -> str | None:
    """Why no pattern can make a target of it."""
    if slot.kind in BARRED:
        return BARRED[slot.kind]
    if slot.tied_with:
        return f"{slot.kind}, the same tensor in memory as {slot.tied_with}"
    if len(entry.shape) != 2 or slot.parameter != "weight":
        return "not a matrix"
    if entry.dtype not in FLOATS:
        return f"dtype {entry.dtype} is not decomposed"
    return "empty" if 0 in entry.shape else None


def _off_by_default(slot: Slot) -> str | None:
    if slot.kind is Kind.HEAD:
        return "output head"
    return None if slot.in_block else "outside the blocks"


def _require_operable(pattern: str, modules: Mapping[str, str], reasons: Mapping[str, str | None]) -> None:
    """A pattern may take in tensors that cannot be targets, but not only those."""
    found = [name for module, name in modules.items() if matches(module, pattern)]
    if all(reasons[name] not in (None, "excluded") for name in found):
        raise UsageError(
            "the pattern matches nothing that can be truncated", pattern, f"{found[0]}: {reasons[found[0]]}"
        )
