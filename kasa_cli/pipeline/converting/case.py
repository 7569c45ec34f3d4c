"""The input of `kasa convert`: the checked options, and an adapter on its base that a plain LoRA can express."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kasa_cli.adapters import FLAVOURS, Adapter, Placed
from kasa_cli.checkpoint import Checkpoint, Source, TruncateManifest
from kasa_cli.errors import InvalidInput, UsageError
from kasa_cli.files import check_apart
from kasa_cli.methods.adapter_kinds import BaseChange, Limit, Term
from kasa_cli.model_names import NameMap
from kasa_cli.pipeline.adapter_on_base import (
    BASES,
    ORIGINAL,
    TRUNCATED,
    AdapterOnBase,
    Origin,
    Truncations,
    known_truncations,
    on_base,
    provenance,
    read_adapter,
)
from kasa_cli.pipeline.converting.representable import require_form, require_nothing_else, require_own
from kasa_cli.pipeline.measuring import Facts
from kasa_cli.pipeline.opening import ModelLocation, survey

LORA, LITE = "lora", "lora-lite"
FORMS = (LORA, LITE)
BASES_OF_KASA = (ORIGINAL, TRUNCATED)


@dataclass(frozen=True)
class ConvertRequest:
    """The options of `kasa convert`. Without rank and energy the conversion is exact."""

    to: str = LORA
    on: str = ORIGINAL
    names: str = "peft"
    rank: int | None = None
    energy: float | None = None
    pad_rank: bool = False
    base_is: str = "auto"
    force_base: bool = False
    overwrite: bool = False
    restart: bool = False

    @property
    def limit(self) -> Limit:
        """The limit on the components of each update."""
        return Limit(self.rank, self.energy)

    @property
    def is_lite(self) -> bool:
        """Whether the output is a file in lora-lite's format."""
        return self.to == LITE


@dataclass(frozen=True)
class TruncationTerms:
    """The terms of KaSA's truncation. On the original base, the LoRA must include -U_d S_d V_dᵀ.

    `is_made`: the base at hand is truncated already.
    """

    truncations: Truncations
    is_made: bool

    def require_known(self, places: Sequence[Placed]) -> None:
        """Refuse, before any decomposition, a truncated base whose truncated components are in no tail.

        Raises:
            UsageError: naming the first module that no tail has.
        """
        if self.is_made:
            for place in places:
                self._in_tail(place)

    def terms(self, checkpoint: Checkpoint, facts: Facts, place: Placed) -> tuple[Term, ...]:
        """The truncation of the weight under a patch."""
        if place.patch.base_change is BaseChange.IN_FILE:
            return ()
        if self.is_made:
            return self._in_tail(place)
        matrix = place.matrix
        if matrix is None:
            return ()
        rank = self.truncations.rank(matrix.name, int(place.patch.settings["r"]))
        term = self.truncations.term(checkpoint, facts, matrix, place.patch.module, rank)
        return () if term is None else (term,)

    def _in_tail(self, place: Placed) -> tuple[Term, ...]:
        """The truncation of a base that is truncated already, which only the tail holds."""
        name, module = place.matrices[0][0].piece.name, place.patch.module
        rank = self.truncations.rank(name, int(place.patch.settings["r"]))
        if not rank:
            return ()
        term = self.truncations.from_tail(name, module, rank)
        if term is None:
            problem = "the truncated components of this base are unknown: there is no tail/ beside it"
            raise UsageError(problem, module, "give the original base, or convert --on truncated")
        return (term,)


@dataclass(frozen=True)
class ConvertCase:
    """An adapter on its base, and the options.

    `base_is`: whether the base of a KaSA adapter is the original or truncated; None for other kinds.
    """

    options: ConvertRequest
    source: Source
    base: Origin
    names: NameMap
    on_base: AdapterOnBase
    base_is: str | None
    truncations: Truncations

    @property
    def adapter(self) -> Adapter:
        """The adapter."""
        return self.on_base.adapter

    @property
    def places(self) -> tuple[Placed, ...]:
        """The places of its patches."""
        return self.on_base.places

    @property
    def checkpoint(self) -> Checkpoint:
        """The base's files."""
        return self.base.checkpoint

    @property
    def on(self) -> str | None:
        """The base that the LoRA is for, original or truncated; None for other kinds than KaSA."""
        return self.options.on if self.base_is else None

    @property
    def truncation(self) -> TruncationTerms | None:
        """KaSA's truncation, if it is part of the update."""
        return TruncationTerms(self.truncations, self.base_is == TRUNCATED) if self.on == ORIGINAL else None

    @property
    def fits_given(self) -> bool:
        """Whether the LoRA is for the given base, and not for the other one of KaSA's two bases."""
        return self.base_is == self.on

    @property
    def truncate_manifests(self) -> list[TruncateManifest]:
        """The manifests of `kasa truncate` that record both bases."""
        manifests = (self.on_base.made_by, self.base.manifest)
        return [manifest for manifest in manifests if isinstance(manifest, TruncateManifest)]

    @property
    def model_it_fits(self) -> tuple[str | None, str | None]:
        """Hub id and commit of the model that the LoRA is for; None if it is not on the Hub, or unknown."""
        if self.fits_given:
            return self.source.repo, self.source.commit
        if self.on == TRUNCATED or not self.truncate_manifests:
            return None, None
        source = self.truncate_manifests[0].source
        return source.repo, source.commit

    def hash_in_other_base(self, name: str) -> str | None:
        """The hash of a tensor in the other one of KaSA's two bases, if a manifest records it."""
        records = [manifest.tensors[name] for manifest in self.truncate_manifests if name in manifest.tensors]
        if not records:
            return None
        if self.on == ORIGINAL:
            return records[0].input_blake3
        return records[0].blake3 if records[0].truncated else None


def check(options: ConvertRequest) -> None:
    """Refuse options that are invalid for every adapter.

    Raises:
        UsageError: naming the option.
    """
    if options.rank is not None and options.energy is not None:
        raise UsageError("--rank and --energy exclude each other", "", "give one of them")
    if options.rank is not None and options.rank < 1:
        raise UsageError(f"invalid rank {options.rank}", "--rank", "give 1 or more")
    if options.energy is not None and not 0 < options.energy <= 1:
        raise UsageError(f"invalid energy {options.energy}", "--energy", "give more than 0 and at most 1")
    for name, known, label in (
        (options.to, FORMS, "form to convert to"),
        (options.on, BASES_OF_KASA, "base to convert for"),
        (options.names, tuple(FLAVOURS), "names"),
        (options.base_is, BASES, "kind of base"),
    ):
        if name not in known:
            raise UsageError(f"unknown {label} {name!r}", "", f"known: {', '.join(known)}")
    if options.is_lite and options.names != "peft":
        raise UsageError("lora-lite has its own names: --names does not apply", "--names", "leave it out")


def opened_case(
    path: Path, where: ModelLocation, output: Path, options: ConvertRequest, facts: Facts | None = None
) -> ConvertCase:
    """Read an adapter, place it on its base, and check that a plain LoRA can express it.

    Raises:
        KasaError: a subclass that fits the failure; nothing was written.
    """
    source, checkpoint, names = survey(where, facts.store if facts else None)
    check_apart(output, [source.root, path])
    adapter, base = read_adapter(path), provenance.origin(checkpoint)
    placed_adapter = on_base(adapter, base, names)
    _require_convertible(placed_adapter, base, options)
    require_nothing_else(adapter, placed_adapter.values, checkpoint)
    base_is, truncations = None, Truncations()
    if adapter.row.truncates_base:
        base_is = provenance.base_is(options.base_is, base, placed_adapter.made_by, placed_adapter.targets)
        truncations = known_truncations(path, base)
    if not options.force_base:
        placed_adapter.require_base(base)
    case = ConvertCase(options, source, base, names, placed_adapter, base_is, truncations)
    if case.truncation:
        truncations.require_no_experts(path)
        case.truncation.require_known(placed_adapter.places)
    return case


def _require_convertible(placed_adapter: AdapterOnBase, base: Origin, options: ConvertRequest) -> None:
    adapter = placed_adapter.adapter
    if options.on == TRUNCATED and not adapter.row.truncates_base:
        raise UsageError(f"an adapter of kind {adapter.kind} has no truncated base", "--on", "leave it out")
    if not placed_adapter.places:
        raise InvalidInput("this adapter changes no weight", str(adapter.path), "use kasa merge")
    placed_adapter.require_initialisation(base)
    require_form(placed_adapter.places, options.limit)
    if options.on == ORIGINAL:
        require_own(placed_adapter.places)
