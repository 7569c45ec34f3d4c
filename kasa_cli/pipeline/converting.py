"""CONVERT: every patch of an adapter as factors of a plain LoRA, kept at once as parts, then written at one rank.

The factors of all modules would not fit in memory, and the rank of the file is known only when all are there.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from kasa_cli.checkpoint.adapter import Adapter, TokenRows
from kasa_cli.checkpoint.adapter_places import Placed
from kasa_cli.checkpoint.adapter_value_places import PlacedValue
from kasa_cli.checkpoint.container import BITS, Reader, read_header
from kasa_cli.checkpoint.durable import canonical_json
from kasa_cli.checkpoint.layout import Checkpoint
from kasa_cli.checkpoint.lora_files import Entry
from kasa_cli.checkpoint.staging import Staging
from kasa_cli.checkpoint.streaming import Filling, filling, form
from kasa_cli.errors import IntegrityError, InvalidInput, NumericalError, UsageError
from kasa_cli.methods.conversion import Compact, Limit, has_low_rank_form, of_terms, of_weight
from kasa_cli.methods.terms import Change, Term
from kasa_cli.pipeline.cuts import Cuts
from kasa_cli.pipeline.facts import SOLVER_EDITION, Facts
from kasa_cli.pipeline.intact import hash_tensor
from kasa_cli.pipeline.patches import IN_FILE, changes_of
from kasa_cli.pipeline.weights import Matrix, read_pieces, working_set
from kasa_cli.pipeline.workers import Watcher, run

MERGE = "kasa merge puts it into the base"
TAKES_OFF = frozenset({"kasa", "pissa", "olora", "lite-pissa"})
"""Kinds that change the weight itself, and with it whatever else is the same tensor."""


@dataclass(frozen=True)
class Cutting:
    """KaSA's cut as part of the update: what is known of it, and whether the base at hand lacks it already."""

    cuts: Cuts
    is_made: bool


@dataclass(frozen=True)
class Converter:
    """Everything that the conversion of one patch needs. `cutting` None: the update is what the adapter adds."""

    adapter: Adapter
    checkpoint: Checkpoint
    facts: Facts
    staging: Staging
    limit: Limit
    cutting: Cutting | None


@dataclass(frozen=True)
class Converted:
    """One patch converted: where its factors are kept, the hashes of the base's tensors, and what was measured.

    `norm` and `error` are Frobenius norms, of the update and of what is missing of it as stored.
    """

    place: Placed
    key: str
    hashes: Mapping[str, str]
    rank: int
    exact_rank: int | None
    norm: float
    error: float

    @property
    def loss(self) -> float:
        """What is missing, relative to the update."""
        return self.error / self.norm if self.norm else 0.0


def convert_all(
    converter: Converter, places: Sequence[Placed], num_workers: int, watcher: Watcher
) -> list[Converted]:
    """The factors of every patch, each kept as a part; in the order given.

    Raises:
        InvalidInput: naming the module that no plain LoRA can hold.
    """
    watcher.stage("convert", len(places), len(places))
    ordered = sorted(places, key=lambda place: -math.prod(place.shape))
    found = run(
        partial(_convert, converter),
        ordered,
        num_workers,
        lambda place: watcher.finished(place.patch.module, 1),
        partial(_working_set, converter),
    )
    by_place = {id(place): one for place, one in zip(ordered, found, strict=True)}
    return [by_place[id(place)] for place in places]


def write_factors(
    path: Path,
    metadata: tuple[str, str],
    items: Sequence[tuple[Converted, list[Entry]]],
    rank: int,
    staging: Staging,
    run_on: tuple[int, Watcher],
) -> dict[str, dict[str, Any]]:
    """Write all factors at one rank; dtype, shape and hash of every tensor, by name. `run_on`: workers, watcher."""
    num_workers, watcher = run_on
    layout = form(
        [shape for _, entries in items for entry in entries for shape in entry.shapes(rank)], metadata
    )
    watcher.stage("write", len(items), len(items))
    with filling(path, layout) as file:
        task = partial(_write, file, rank, staging)
        run(task, items, num_workers, lambda item: watcher.finished(item[0].place.patch.module, 1))
    container = read_header(path)
    return {
        name: {"dtype": entry.dtype, "shape": list(entry.shape), "sha256": hash_tensor(container, name)}
        for name, entry in container.tensors.items()
    }


def require_nothing_else(adapter: Adapter, values: Sequence[PlacedValue], checkpoint: Checkpoint) -> None:
    """Refuse what a plain LoRA has no place for: parameters held anew, unless they are what the base holds.

    Raises:
        InvalidInput: naming the parameter.
    """
    for value in values:
        one = value.value
        if isinstance(one, TokenRows):
            raise InvalidInput("trained rows, which a plain LoRA does not hold", one.parameter, MERGE)
        if not _is_in_base(adapter, value, checkpoint):
            raise InvalidInput(
                f"held anew ({one.why}), which a plain LoRA does not hold", one.parameter, MERGE
            )


def require_form(places: Sequence[Placed], limit: Limit) -> None:
    """Refuse, before the work, kinds that are no low-rank terms where nothing may be lost, and changes of biases.

    Raises:
        InvalidInput: naming the first such module.
    """
    for place in places:
        patch = place.patch
        if place.bias is not None:
            raise InvalidInput("a change of a bias, which a plain LoRA does not hold", place.bias, MERGE)
        if not limit.is_set and not has_low_rank_form(patch.kind, patch.settings):
            raise no_form(place)


def no_form(place: Placed) -> InvalidInput:
    """The error for a kind that is more than low-rank terms."""
    what = f"an adapter of kind {place.patch.kind} has no exact low-rank form"
    return InvalidInput(what, place.patch.module, "recompress it with --rank or --energy, or use kasa merge")


def require_tail(cutting: Cutting | None, places: Sequence[Placed]) -> None:
    """Refuse, before the work, a base that lacks KaSA's cut where no tail says what that was.

    Raises:
        UsageError: naming the first module without.
    """
    if cutting is None or not cutting.is_made:
        return
    for place in places:
        _cut_in_tail(cutting.cuts, place)


def require_own(places: Sequence[Placed]) -> None:
    """Refuse patches that take something off a weight which is another module's too: a LoRA adds to one of them.

    Raises:
        InvalidInput: naming both.
    """
    for place in places:
        if place.tied and place.patch.kind in TAKES_OFF:
            what = f"the same tensor as {place.tied_with}, which a LoRA leaves as it is"
            raise InvalidInput(
                what, place.patch.module, "untie the base first: save it with tie_word_embeddings false"
            )


def _is_in_base(adapter: Adapter, value: PlacedValue, checkpoint: Checkpoint) -> bool:
    pieces = [part.piece for parts in value.matrices for part in parts]
    if value.vocabulary or len(pieces) != 1 or pieces[0].index is not None:
        return False
    stored = read_pieces(checkpoint, pieces)
    with Reader(adapter.container) as reader:
        held = reader.tensor(value.value.tensor)
    known = stored.T if value.is_turned else stored
    return known.shape == held.shape and torch.equal(known.to(torch.float64), held.to(torch.float64))


def _convert(converter: Converter, place: Placed) -> Converted:
    names = dict.fromkeys(part.piece.name for parts in place.matrices for part in parts)
    shards = converter.checkpoint.shards
    hashes = {name: hash_tensor(shards[converter.checkpoint.shard_of(name)], name) for name in names}
    key = _part_key(place, hashes)
    if converter.staging.part(key) is None:
        converter.staging.keep_part(key, _made(converter, place))
    payload = _payload(converter.staging, key, place)
    return Converted(place, key, hashes, **_facts(payload))


def _made(converter: Converter, place: Placed) -> bytes:
    """The factors of a patch as memory has the weight: left (e x rows x n), right (e x n x columns)."""

    @cache
    def weight() -> Tensor:
        pieces = [part.piece for part in place.matrices[0]]
        stored = read_pieces(converter.checkpoint, pieces)
        return stored.T if place.is_turned != place.is_transposed else stored

    try:
        changes = changes_of(converter.adapter, place, weight)
        found = [_compact(converter, place, change, weight) for change in changes]
    except (InvalidInput, NumericalError) as error:
        module = place.patch.module
        where = error.where if module in error.where else f"{module}: {error.where}".removesuffix(": ")
        raise type(error)(error.what, where, error.remedy) from error
    rank = max(one.B.shape[1] for one in found)
    pairs = [(one.A.T, one.B.T) if place.is_transposed else (one.B, one.A) for one in found]
    left = torch.stack([torch.nn.functional.pad(one, (0, rank - one.shape[1])) for one, _ in pairs])
    right = torch.stack([torch.nn.functional.pad(one, (0, 0, 0, rank - len(one))) for _, one in pairs])
    exact = [one.exact_rank for one in found if one.exact_rank is not None]
    fields = {
        "rank": rank,
        "exact_rank": max(exact) if exact else None,
        "norm": math.hypot(*(one.norm for one in found)),
        "error": math.hypot(*(one.error for one in found)),
    }
    return save({"left": left, "right": right}, {"kasa": json.dumps(fields, sort_keys=True)})


def _compact(converter: Converter, place: Placed, change: Change, weight: Callable[[], Tensor]) -> Compact:
    terms, limit = _terms(change, weight), converter.limit
    if terms is not None:
        return of_terms((*terms, *_cut(converter, place)), limit)
    if not limit.is_set:
        raise no_form(place)
    return of_weight(weight(), change, limit)


def _terms(change: Change, weight: Callable[[], Tensor]) -> tuple[Term, ...] | None:
    """The whole change as low-rank terms; None where it is more than that."""
    if change.is_low_rank:
        return change.terms
    return (change.of_weight(weight()),) if change.of_weight else None


def _cut(converter: Converter, place: Placed) -> tuple[Term, ...]:
    """What KaSA drops of the base, where the update is of the original one."""
    cutting, settings = converter.cutting, place.patch.settings
    if cutting is None or settings.get("base_start") == IN_FILE:
        return ()
    if cutting.is_made:
        return _cut_in_tail(cutting.cuts, place)
    pieces = tuple(part.piece for part in place.matrices[0])
    matrix = Matrix(pieces[0].name, pieces, is_transposed=place.is_turned != place.is_transposed)
    rank = cutting.cuts.rank(matrix.name, int(settings["r"]))
    term = cutting.cuts.term(converter.checkpoint, converter.facts, matrix, place.patch.module, rank)
    return () if term is None else (term,)


def _cut_in_tail(cuts: Cuts, place: Placed) -> tuple[Term, ...]:
    """The cut of a base that lacks it already: only the tail knows what it was."""
    name, module = place.matrices[0][0].piece.name, place.patch.module
    rank = cuts.rank(name, int(place.patch.settings["r"]))
    if not rank:
        return ()
    term = cuts.from_tail(name, module, rank)
    if term is None:
        what = "what was cut off this base is in no tail beside it"
        raise UsageError(what, module, "give the original base, or convert --on truncated")
    return (term,)


def _write(file: Filling, rank: int, staging: Staging, item: tuple[Converted, list[Entry]]) -> None:
    one, entries = item
    tensors = load(_payload(staging, one.key, one.place))
    for entry in entries:
        for name, tensor in entry.tensors(tensors["left"], tensors["right"], rank).items():
            file.put(name, tensor)


def _payload(staging: Staging, key: str, place: Placed) -> bytes:
    path = staging.part(key)
    if path is None:
        raise IntegrityError("a finished part was altered", place.patch.module, "run the command again")
    return path.read_bytes()


def _facts(payload: bytes) -> dict[str, Any]:
    length = int.from_bytes(payload[:8], "little")
    facts: dict[str, Any] = json.loads(json.loads(payload[8 : 8 + length])["__metadata__"]["kasa"])
    return facts


def _part_key(place: Placed, hashes: Mapping[str, str]) -> str:
    """What the factors depend on beside the job, which names the adapter and the options."""
    patch = place.patch
    about = [SOLVER_EDITION, patch.module, patch.parameter, patch.depth, sorted(hashes.items())]
    return hashlib.sha256(canonical_json({"part": about})).hexdigest()


def _working_set(converter: Converter, place: Placed) -> int:
    """Bytes that a conversion occupies at most: as for a decomposition, and the difference in float32 besides."""
    entry = converter.checkpoint.tensors[place.matrices[0][0].piece.name]
    size = math.prod(place.shape)
    return working_set(place.shape, size * BITS[entry.dtype] // 8) + 4 * size
