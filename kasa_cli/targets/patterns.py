"""Which tensors to operate on: patterns over module names, and a reason for every tensor left alone."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from kasa_cli.checkpoint.dtypes import FLOATS
from kasa_cli.checkpoint.safetensors_file import TensorEntry
from kasa_cli.errors import InvalidInput, UsageError
from kasa_cli.files.untrusted import parse_json, read_small
from kasa_cli.model_names.names import Kind, Slot
from kasa_cli.report import Selection, Skipped, Target

MAX_TARGETS_FILE = 100_000_000
BARRED = {
    Kind.EMBEDDING: "embedding",
    Kind.ROUTER: "router",
    Kind.EXPERTS: "expert, fused in memory: PEFT has no KaSA for fused experts",
    Kind.OTHER: "not a linear layer",
}
"""Kinds that no pattern can make a target."""


@dataclass(frozen=True)
class Patterns:
    """What the user asked for: globs over full module names, or bare suffixes. No targets: the default."""

    targets: tuple[str, ...] = ()
    excludes: tuple[str, ...] = ()


def patterns(
    targets: Iterable[str] | None, excludes: Iterable[str] | None, from_file: Path | None = None
) -> Patterns:
    """Patterns, and the names of a file that `kasa select-targets` wrote.

    Raises:
        InvalidInput: the file is not of that form.
    """
    named = targets_from(from_file) if from_file else ()
    return Patterns((*(targets or ()), *named), tuple(excludes or ()))


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


def matches(module: str, pattern: str) -> bool:
    """A glob over the full name, or the name itself or its end.

    >>> [matches("model.layers.0.mlp.up_proj", p) for p in ("up_proj", "model.layers.*.mlp.*", "proj", "mlp.*")]
    [True, True, False, False]
    """
    return fnmatchcase(module, pattern) or module == pattern or module.endswith(f".{pattern}")


def targets_from(path: Path) -> tuple[str, ...]:
    """The `target_modules` of a file that `kasa select-targets` wrote.

    Raises:
        InvalidInput: not JSON, or not of that form.
    """
    chosen = parse_json(read_small(path, MAX_TARGETS_FILE), path)
    modules = chosen.get("target_modules") if isinstance(chosen, dict) else None
    if not isinstance(modules, list) or not modules or not all(isinstance(name, str) for name in modules):
        raise InvalidInput(
            "no list target_modules in it", str(path), "give the JSON of `kasa select-targets`"
        )
    return tuple(modules)


def _target(entry: TensorEntry, slot: Slot, rank_rule: RankRule) -> Target:
    shape = (entry.shape[0], entry.shape[1])
    is_transposed = slot.kind is Kind.CONV1D
    outs, ins = shape[::-1] if is_transposed else shape
    return Target(entry.name, slot.module, shape, entry.dtype, is_transposed, rank_rule(outs, ins))


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


def require_match(pattern: str, modules: Iterable[str]) -> None:
    """Refuse a pattern that names no module, most often a slip of the pen: say what is near it."""
    known = list(modules)
    if any(matches(module, pattern) for module in known):
        return
    near = _near(pattern, known)
    remedy = f"near names: {', '.join(near)}" if near else "list the names with --dry-run"
    raise UsageError("the pattern matches no module", pattern, remedy)


def _near(pattern: str, modules: list[str]) -> list[str]:
    """Names and ends of names that look like the pattern."""
    ends = {".".join(module.split(".")[-depth:]): None for depth in (1, 2) for module in modules}
    return difflib.get_close_matches(pattern, [*ends, *modules], n=4, cutoff=0.5)


def _require_operable(pattern: str, modules: Mapping[str, str], reasons: Mapping[str, str | None]) -> None:
    """A pattern may take in tensors that cannot be targets, but not only those."""
    found = [name for module, name in modules.items() if matches(module, pattern)]
    if all(reasons[name] not in (None, "excluded") for name in found):
        raise UsageError(
            "the pattern matches nothing that can be truncated", pattern, f"{found[0]}: {reasons[found[0]]}"
        )
