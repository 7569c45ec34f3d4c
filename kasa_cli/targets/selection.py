"""The targets of a truncation, and the reason for every tensor that is left alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kasa_cli.adapters import holds_experts_in_out, require_known_rows
from kasa_cli.checkpoint import FLOATS, Matrix, Orientation, Piece, TensorEntry
from kasa_cli.errors import UsageError
from kasa_cli.model_names import ModuleKind, NameMap, NotAssembled, Slot, Weight
from kasa_cli.report import Skipped
from kasa_cli.targets.candidates import candidate_of
from kasa_cli.targets.patterns import Patterns, matches, require_match

BARRED = {
    ModuleKind.EMBEDDING: "embedding",
    ModuleKind.ROUTER: "router",
    ModuleKind.EXPERTS: "expert, fused in memory: PEFT has no KaSA for fused experts",
    ModuleKind.OTHER: "not a linear layer",
}
"""Kinds that are no module to truncate; parameters of fused experts are targets of their own, when named."""


@dataclass(frozen=True)
class Target:
    """A matrix and its truncation rank: `dropped` components are dropped. `shape` is that in memory.

    `module` is the module of the matrix, or of an expert the full name of the parameter, which holds the expert of
    number `expert`.
    """

    matrix: Matrix
    module: str
    shape: tuple[int, int]
    dropped: int
    expert: int | None = None

    @property
    def name(self) -> str:
        """The name of the matrix."""
        return self.matrix.name


@dataclass(frozen=True)
class Selection:
    """The targets, and all other tensors, each with its reason."""

    targets: tuple[Target, ...]
    skipped: tuple[Skipped, ...]

    @property
    def modules(self) -> tuple[Target, ...]:
        """The targets that are modules."""
        return tuple(target for target in self.targets if target.expert is None)

    @property
    def experts(self) -> tuple[Target, ...]:
        """The targets that are matrices of fused experts."""
        return tuple(target for target in self.targets if target.expert is not None)


RankRule = Callable[[int, int], int]
"""(out_features, in_features) → the number of components to drop."""


def select(
    tensors: Mapping[str, TensorEntry], names: NameMap, patterns: Patterns, rank_rule: RankRule
) -> Selection:
    """Divide the tensors of a checkpoint into targets, modules before experts, and skipped tensors.

    Raises:
        UsageError: a pattern matches nothing, or nothing that can be operated on; or no target is left.
    """
    slots = names.slots
    modules = {slot.module: name for name, slot in slots.items() if slot.parameter == "weight"}
    stacks = {weight.label: weight for weight in names.weights if _is_stack_of_experts(weight)}
    for pattern in (*patterns.targets, *patterns.excludes):
        require_match(pattern, (*modules, *stacks))
    reasons = {name: _reason(entry, slots[name], patterns) for name, entry in tensors.items()}
    verdicts = {
        label: _experts(weight, tensors, names, patterns, rank_rule)
        for label, weight in stacks.items()
        if weight.made_of.names and any(matches(label, pattern) for pattern in patterns.targets)
    }
    for label, verdict in verdicts.items():
        reason = verdict if isinstance(verdict, str) else None
        reasons |= dict.fromkeys(stacks[label].made_of.names, reason)
    subjects = modules | {label: stacks[label].made_of.names[0] for label in verdicts}
    for pattern in patterns.targets:
        _require_operable(pattern, subjects, reasons)
    experts = [target for verdict in verdicts.values() if not isinstance(verdict, str) for target in verdict]
    tensor_names = {piece.name for target in experts for piece in target.matrix.pieces}
    whole = [name for name in tensors if reasons[name] is None and name not in tensor_names]
    targets = (*(_target(tensors[name], slots[name], rank_rule) for name in whole), *experts)
    if not targets:
        raise UsageError(
            "no target is left", "", "see the skipped tensors with --dry-run, or name some with --target"
        )
    return Selection(targets, tuple(Skipped(name, reason) for name, reason in reasons.items() if reason))


# --- fused experts ---


def _is_stack_of_experts(weight: Weight) -> bool:
    return weight.kind is ModuleKind.EXPERTS and not weight.is_module and len(weight.shape) == 3


def _experts(
    weight: Weight,
    tensors: Mapping[str, TensorEntry],
    names: NameMap,
    patterns: Patterns,
    rank_rule: RankRule,
) -> tuple[Target, ...] | str:
    """A target for each expert of a parameter that is named; or the reason why there is none."""
    if any(matches(weight.label, pattern) for pattern in patterns.excludes):
        return "excluded"
    if names.model_class is None:
        return "experts of an unknown class: their orientation in memory is not known"
    try:
        require_known_rows(weight)
        candidate = candidate_of(weight, tensors)
    except NotAssembled as reason:
        return str(reason)
    outs, ins = candidate.shape[::-1] if holds_experts_in_out(names.model_class) else candidate.shape
    return tuple(
        Target(matrix, weight.label, candidate.shape, rank_rule(outs, ins), number)
        for number, matrix in enumerate(candidate.matrices)
    )


# --- modules ---


def _target(entry: TensorEntry, slot: Slot, rank_rule: RankRule) -> Target:
    orientation = Orientation.of(slot.kind is ModuleKind.CONV1D)
    matrix = Matrix.of({entry.name: entry}, entry.name, (Piece(entry.name),), orientation)
    return Target(matrix, slot.module, matrix.stored_shape, rank_rule(*matrix.shape))


def _reason(entry: TensorEntry, slot: Slot, patterns: Patterns) -> str | None:
    """The reason why a tensor is skipped; None for a target."""
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
    """The reason why no pattern can make a tensor a target."""
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
    if slot.kind is ModuleKind.HEAD:
        return "output head"
    return None if slot.in_block else "outside the blocks"


def _require_operable(pattern: str, modules: Mapping[str, str], reasons: Mapping[str, str | None]) -> None:
    """Refuse a pattern whose matches all cannot be truncated."""
    matched = [name for module, name in modules.items() if matches(module, pattern)]
    if all(reasons[name] not in (None, "excluded") for name in matched):
        raise UsageError(
            "the pattern matches nothing that can be truncated",
            pattern,
            f"{matched[0]}: {reasons[matched[0]]}",
        )
