"""Candidates for fine-tuning, in PEFT's own order, each with its matrices on disk. Reads headers only."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from kasa_cli.checkpoint import FLOATS, Matrix, Orientation, Piece, TensorEntry
from kasa_cli.errors import UsageError
from kasa_cli.model_names import ModuleKind, NameMap, NotAssembled, Slot, Weight, is_turned, matrices
from kasa_cli.report import Skipped
from kasa_cli.targets.patterns import Patterns, matches, require_match

Tensors = Mapping[str, TensorEntry]
AsIn = Literal["peft", "kasa"]

FUSED = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")
"""How the name of a parameter of fused experts ends for PEFT's selector."""

EXCLUDED = "excluded"

ANY_SIDE = 1 << 62
"""The largest side, where none is too large."""


@dataclass(frozen=True)
class Candidate:
    """A module that could be fine-tuned, or a parameter that holds the matrices of several experts.

    `shape` is that in memory, of a parameter without its number of experts.
    """

    module: str
    kind: str
    shape: tuple[int, int]
    matrices: tuple[Matrix, ...]

    @property
    def num_matrices(self) -> int:
        """One, or the number of experts."""
        return len(self.matrices)

    @property
    def is_transposed(self) -> bool:
        """Whether the files hold the transpose of what is read."""
        return self.matrices[0].is_transposed


@dataclass(frozen=True)
class Refusal:
    """The reason why a weight is no candidate, and whether a pattern or the default named it."""

    reason: str
    was_wanted: bool


Refused = list[tuple[Weight, Refusal]]
Verdicts = list[tuple[Weight, Candidate | Refusal]]


def candidates(
    tensors: Tensors, names: NameMap, patterns: Patterns, as_in: AsIn, max_dim: int
) -> tuple[tuple[Candidate, ...], tuple[Skipped, ...]]:
    """Divide a checkpoint into candidates, modules before parameters, and skipped tensors, each with its reason.

    Every tensor is a piece of a candidate or skipped. A weight in memory that no tensor holds is skipped by the
    name it has there.

    Raises:
        UsageError: a pattern matches nothing, or nothing that can be a candidate.
    """
    _check_names(names, patterns)
    verdicts = [(w, _verdict(w, tensors, _unasked(w, patterns, as_in), max_dim)) for w in names.weights]
    for pattern in patterns.targets:
        _require_candidate(pattern, verdicts)
    chosen = tuple(verdict for _, verdict in verdicts if isinstance(verdict, Candidate))
    pieces = {piece.name for candidate in chosen for matrix in candidate.matrices for piece in matrix.pieces}
    refused = [(weight, verdict) for weight, verdict in verdicts if isinstance(verdict, Refusal)]
    reasons = _reasons(refused, names.slots)
    left = [name for name in tensors if name not in pieces]
    skipped = (Skipped(name, reasons.get(name) or _other(tensors[name], names.slots[name])) for name in left)
    return chosen, (*skipped, *_absent(refused))


# --- patterns ---


def _check_names(names: NameMap, patterns: Patterns) -> None:
    """Refuse a pattern that matches no name."""
    modules = dict.fromkeys(weight.label for weight in names.weights)
    modules |= dict.fromkeys(slot.module for slot in names.slots.values() if slot.parameter == "weight")
    for pattern in (*patterns.targets, *patterns.excludes):
        require_match(pattern, modules)


def _require_candidate(pattern: str, verdicts: Verdicts) -> None:
    """Refuse a pattern whose matches are all no candidates."""
    matching = [(weight.label, verdict) for weight, verdict in verdicts if matches(weight.label, pattern)]
    refused = [(label, v.reason) for label, v in matching if isinstance(v, Refusal) and v.reason != EXCLUDED]
    if len(refused) == len(matching):
        first = ": ".join(refused[0]) if refused else "it is no matrix"
        raise UsageError("the pattern matches nothing that can be a candidate", pattern, first)


def _unasked(weight: Weight, patterns: Patterns, as_in: AsIn) -> str | None:
    """The reason why neither a pattern nor the default names a weight; None if one does."""
    if any(matches(weight.label, pattern) for pattern in patterns.excludes):
        return EXCLUDED
    if not patterns.targets:
        return BY_DEFAULT[as_in](weight)
    if not (weight.is_module or weight.kind is ModuleKind.EXPERTS or weight.label.endswith(FUSED)):
        return "not a matrix"
    return None if any(matches(weight.label, pattern) for pattern in patterns.targets) else "not named"


def _off_in_peft(weight: Weight) -> str | None:
    """The reason why PEFT's selector ignores a weight; None if it does not."""
    if weight.is_linear or (not weight.is_module and weight.label.endswith(FUSED)):
        return None
    if weight.kind is ModuleKind.CONV1D:
        return "Conv1D: PEFT's selector has nn.Linear only"
    if weight.kind is ModuleKind.EXPERTS:
        return "fused experts under a name that PEFT's selector does not look for"
    return str(weight.kind) if weight.is_module else "not a matrix"


def _off_in_kasa(weight: Weight) -> str | None:
    """The reason why a weight is no linear map and no expert of the blocks; None if it is one."""
    if not weight.is_module:
        return None if weight.kind is ModuleKind.EXPERTS else "not a matrix"
    if weight.kind not in (ModuleKind.LINEAR, ModuleKind.CONV1D):
        return str(weight.kind)
    if weight.tied_with:
        return f"{weight.kind}, the same tensor in memory as {weight.tied_with}"
    return None if weight.in_block else "outside the blocks"


BY_DEFAULT: Mapping[AsIn, Callable[[Weight], str | None]] = {"peft": _off_in_peft, "kasa": _off_in_kasa}
"""The reason why a weight is no candidate when no pattern is given."""


# --- candidates ---


def _verdict(weight: Weight, tensors: Tensors, unasked: str | None, max_dim: int) -> Candidate | Refusal:
    """The candidate of a weight, or the reason why it is none."""
    if unasked:
        return Refusal(unasked, was_wanted=False)
    try:
        return candidate_of(weight, tensors, max_dim)
    except NotAssembled as reason:
        return Refusal(str(reason), was_wanted=True)


def candidate_of(weight: Weight, tensors: Tensors, max_dim: int = ANY_SIDE) -> Candidate:
    """A weight with its matrices. Raises `NotAssembled`."""
    sides = weight.shape[-2:]
    if max(sides) > max_dim:
        raise NotAssembled(f"a side of {max(sides)} is over --max-dim {max_dim}")
    if 0 in weight.shape:
        raise NotAssembled("empty")
    parts = {name: tensors[name] for name in weight.made_of.names}
    odd = next((entry.dtype for entry in parts.values() if entry.dtype not in FLOATS), None)
    if odd:
        raise NotAssembled(f"dtype {odd} is not decomposed")
    on_disk = {name: entry.shape for name, entry in parts.items()}
    matching = matrices(weight.shape, weight.made_of, on_disk)
    kind = "module" if weight.is_module else "parameter"
    is_transposed = weight.kind is ModuleKind.CONV1D or is_turned(matching[0], sides, on_disk)
    orientation = Orientation.of(is_transposed)
    pieces_by_name = {_matrix_name(weight, number, pieces): pieces for number, pieces in enumerate(matching)}
    each = (Matrix.of(tensors, name, pieces, orientation) for name, pieces in pieces_by_name.items())
    return Candidate(weight.label, kind, (sides[0], sides[1]), tuple(each))


def _matrix_name(weight: Weight, number: int, pieces: tuple[Piece, ...]) -> str:
    """The tensor that is the matrix; of several pieces, or of an expert, the weight and the matrix's number."""
    if len(pieces) == 1 and pieces[0].index is None:
        return pieces[0].name
    return f"{weight.label}[{number}]"


# --- skipped tensors ---


def _reasons(refused: Refused, slots: Mapping[str, Slot]) -> dict[str, str]:
    """A reason for each tensor of the weights that are no candidates.

    Tied tensors have several: one about what was asked for counts most, then one about the tensor's own module.
    """
    matching = []
    for weight, refusal in refused:
        for name in weight.made_of.names:
            is_own = weight.label in (slots[name].module, f"{slots[name].module}.{slots[name].parameter}")
            subject = f"as {weight.label}: " if refusal.was_wanted and not is_own else ""
            matching.append((refusal.was_wanted, is_own, name, f"{subject}{refusal.reason}"))
    return {name: reason for *_, name, reason in sorted(matching)}


def _absent(refused: Refused) -> Iterator[Skipped]:
    """The named weights that have no tensor on disk, by their names in memory."""
    for weight, refusal in refused:
        if refusal.was_wanted and not weight.made_of.names:
            yield Skipped(f"{weight.label}.weight" if weight.is_module else weight.label, refusal.reason)


def _other(entry: TensorEntry, slot: Slot) -> str:
    """The reason for a tensor that no matrix is made of."""
    if len(entry.shape) < 2 or slot.parameter == "bias":
        return "not a matrix"
    if slot.kind is ModuleKind.ROUTER:
        return "router"
    if entry.dtype not in FLOATS:
        return f"dtype {entry.dtype} is not decomposed"
    return "not a matrix" if len(entry.shape) > 2 else "no linear layer of the model in memory"
