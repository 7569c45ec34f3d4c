"""`kasa convert`: an adapter as the plain LoRA that every server reads."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kasa_cli.checkpoint import card, lora_files, manifest, peft
from kasa_cli.checkpoint.adapter import Adapter, consumed, unconsumed
from kasa_cli.checkpoint.adapter_base import Base
from kasa_cli.checkpoint.adapter_files import open_adapter
from kasa_cli.checkpoint.adapter_places import Placed, placed
from kasa_cli.checkpoint.adapter_value_places import placed_values
from kasa_cli.checkpoint.durable import sha256_file, write_file
from kasa_cli.checkpoint.lora_files import FLAVOURS, Entry, Flavour, Said
from kasa_cli.checkpoint.names import NameMap
from kasa_cli.checkpoint.sheets import CARD
from kasa_cli.checkpoint.source import Source
from kasa_cli.checkpoint.staging import MANIFEST, Staging, check_apart
from kasa_cli.errors import InvalidInput, UsageError
from kasa_cli.methods.adapters import REFUSED
from kasa_cli.methods.conversion import Limit
from kasa_cli.pipeline import lineage, planning
from kasa_cli.pipeline.converting import (
    Converted,
    Converter,
    Cutting,
    convert_all,
    require_form,
    require_nothing_else,
    require_own,
    require_tail,
    write_factors,
)
from kasa_cli.pipeline.cuts import Cuts, known_cuts
from kasa_cli.pipeline.job import Running, Where, check_running
from kasa_cli.pipeline.lineage import BASES, ORIGINAL, TRUNCATED, Origin
from kasa_cli.pipeline.papers import file_records
from kasa_cli.pipeline.workers import Silent, Watcher, blas_threads
from kasa_cli.report import ConvertedRow, ConvertReport

__all__ = ["Options", "Running", "Where", "convert"]

KASA = "kasa"
LORA, LITE = "lora", "lora-lite"
FORMS = (LORA, LITE)
BASES_OF_KASA = (ORIGINAL, TRUNCATED)
HALVES = ("BF16", "F16")


@dataclass(frozen=True)
class Options:
    """The options of `kasa convert`. Neither rank nor energy: nothing is lost."""

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


@dataclass(frozen=True)
class Case:
    """An adapter opened, fit for its base, and what is to be made of it.

    `told`: what a KaSA adapter's base is, None for other kinds.
    """

    path: Path
    options: Options
    source: Source
    base: Origin
    names: NameMap
    adapter: Adapter
    places: tuple[Placed, ...]
    told: str | None
    cuts: Cuts
    made_by: Mapping[str, Any] | None

    @property
    def on(self) -> str | None:
        """Which of KaSA's two bases the LoRA is for."""
        return self.options.on if self.told else None

    @property
    def cutting(self) -> Cutting | None:
        """KaSA's cut, where it is part of the update."""
        return Cutting(self.cuts, self.told == TRUNCATED) if self.on == ORIGINAL else None

    @property
    def limit(self) -> Limit:
        """How much of each update is kept."""
        return Limit(self.options.rank, self.options.energy)

    @property
    def fits_given(self) -> bool:
        """Whether the LoRA is for the base at hand, and not for the other one of KaSA's two."""
        return self.told == self.on

    @property
    def targets(self) -> list[str]:
        """The tensors on disk that patches change."""
        pieces = (part.piece.name for place in self.places for parts in place.matrices for part in parts)
        return list(dict.fromkeys(pieces))

    @property
    def truncations(self) -> list[Mapping[str, Any]]:
        """The manifests of `kasa truncate` that know of the two bases."""
        return [one for one in (self.made_by, self.base.manifest) if one and one["command"] == "truncate"]


def convert(
    adapter: Path,
    where: Where,
    output: Path,
    options: Options | None = None,
    running: Running | None = None,
    watcher: Watcher | None = None,
) -> ConvertReport:
    """Convert an adapter into a plain LoRA, or lora-lite's, which appears only when it is complete.

    Raises:
        KasaError: by the kind of trouble; nothing is lost, and the same call goes on where this one stopped.
    """
    options, running, watcher = options or Options(), running or Running(), watcher or Silent()
    check(options)
    check_running(running)
    case = _opened(adapter, where, output, options)
    checkpoint, entries = case.base.checkpoint, _entries(case)
    facts, record = planning.open_facts(running), _recorded(case, running)
    headers = [[file, shard.identity.size] for file, shard in checkpoint.shards.items()]
    job = {**record, "inputs": headers}
    staging = Staging(output, fingerprint=job, overwrite=options.overwrite, restart=options.restart)
    with staging, blas_threads(running.threads_per_worker):
        converter = Converter(case.adapter, checkpoint, facts, staging, case.limit, case.cutting)
        done = convert_all(converter, case.places, running.num_workers, watcher)
        said = _said(case, done)
        file, metadata = _write_config(case, staging.out, entries, said)
        items, run_on = list(zip(done, entries, strict=True)), (running.num_workers, watcher)
        held = write_factors(staging.out / file, metadata, items, said.rank, staging, run_on)
        record["adapter"] |= {"file": file, "tensors": held}
        sealed = _write_papers(case, staging.out, record, done, said)
        staging.publish()
    output_facts = {"file": file, "manifest_sha256": hashlib.sha256(sealed).hexdigest()}
    report = _report(case, done, where.model, {"directory": str(output), **output_facts})
    totals = {**report.totals, "tensors_written": len(held)}
    notes = (*report.notes, *planning.store_notes(facts))
    return replace(report, padded_rank=said.rank, totals=totals, notes=notes)


def check(options: Options) -> None:
    """Refuse what no adapter can satisfy.

    Raises:
        UsageError: saying which option.
    """
    if options.rank is not None and options.energy is not None:
        raise UsageError("rank and energy both say how much is kept", "", "give one of --rank and --energy")
    if options.rank is not None and options.rank < 1:
        raise UsageError("a rank must be positive", "--rank")
    if options.energy is not None and not 0 < options.energy <= 1:
        raise UsageError("a share of energy is above 0 and at most 1", "--energy")
    for name, known, what in (
        (options.to, FORMS, "form to convert to"),
        (options.on, BASES_OF_KASA, "base to convert for"),
        (options.names, tuple(FLAVOURS), "names"),
        (options.base_is, BASES, "kind of base"),
    ):
        if name not in known:
            raise UsageError(f"unknown {what} {name!r}", "", f"known: {', '.join(known)}")
    if options.to == LITE and options.names != "peft":
        raise UsageError("lora-lite has names of its own", "--names", "leave it out")


# --- the adapter and its base ---


def _opened(path: Path, where: Where, output: Path, options: Options) -> Case:
    """The adapter read, placed, fit for this base, and all of it such that a plain LoRA can say it."""
    source, checkpoint, names = planning.survey(where)
    check_apart(output, [source.root, path])
    adapter, base = open_adapter(path), lineage.origin(checkpoint)
    if left := sorted(adapter.container.tensors.keys() - consumed(adapter)):
        raise unconsumed(left, adapter.container)
    places = placed(adapter, names, checkpoint.tensors)
    _require_convertible(adapter, places, options)
    require_nothing_else(adapter, placed_values(adapter, names, checkpoint.tensors), checkpoint)
    made_by = lineage.adapter_manifest(path)
    case = Case(path, options, source, base, names, adapter, places, None, Cuts(), made_by)
    if adapter.kind == KASA:
        told = lineage.base_is(options.base_is, base, made_by, case.targets)
        case = replace(case, told=told, cuts=known_cuts(path, base))
    if not options.force_base:
        lineage.require_fit(base, made_by, case.targets, path)
    require_tail(case.cutting, places)
    return case


def _require_convertible(adapter: Adapter, places: Sequence[Placed], options: Options) -> None:
    if options.on == TRUNCATED and adapter.kind != KASA:
        raise UsageError(f"an adapter of kind {adapter.kind} has no truncated base", "--on", "leave it out")
    if not places:
        raise InvalidInput("an adapter that adds to no weight", str(adapter.path), "use kasa merge")
    if any(place.patch.settings.get("base_start") == "lost" for place in places):
        what = "an adapter that took a random or data-driven start off its base"
        raise InvalidInput(what, str(adapter.path), REFUSED["pissa_niter"])
    require_form(places, Limit(options.rank, options.energy))
    if options.on == ORIGINAL:
        require_own(places)


def _entries(case: Case) -> list[list[Entry]]:
    """By place what stands in the file, under the names asked for."""
    is_lite = case.options.to == LITE
    flavour: Flavour = lora_files.in_lite if is_lite else FLAVOURS[case.options.names]
    base = Base(case.names, case.base.checkpoint.tensors)
    return [flavour(base, place) for place in case.places]


def _said(case: Case, done: Sequence[Converted]) -> Said:
    """One rank for all, and what else stands in the config."""
    rank, config = max(one.rank for one in done), case.base.checkpoint.config
    rank = lora_files.padded_rank(rank) if case.options.pad_rank else rank
    return Said(rank, _fitting(case), case.names.model_class, config, case.options.names == "disk")


def _fitting(case: Case) -> tuple[str | None, str | None]:
    """Hub id and commit of the model that the LoRA fits; None where that is not on the Hub, or not known."""
    if case.fits_given:
        return case.source.repo, case.source.commit
    if case.on == TRUNCATED or not case.truncations:
        return None, None
    source = case.truncations[0]["source"]
    return source.get("repo"), source.get("commit")


def _other_hash(case: Case, name: str) -> str | None:
    """The hash of a tensor in the other one of KaSA's two bases, where a manifest knows it."""
    found = (one["tensors"].get(name) for one in case.truncations)
    known: Mapping[str, Any] = next((one for one in found if one), {})
    if case.on == ORIGINAL:
        return known.get("input_sha256")
    return known.get("sha256") if known.get("role") == "truncated" else None


# --- what is written ---


def _write_config(
    case: Case, folder: Path, entries: Sequence[list[Entry]], said: Said
) -> tuple[str, tuple[str, str]]:
    """PEFT's config; lora-lite has it in the header. The name of the file of tensors, and its metadata."""
    all_entries = [entry for own in entries for entry in own]
    if case.options.to == LITE:
        return lora_files.LITE_WEIGHTS, ("cfg", lora_files.lite_config(all_entries, said.rank))
    if said.is_on_disk:
        modules = [name.removesuffix(".weight") for name in case.names.slots]
    else:
        modules = [*(slot.module for slot in case.names.slots.values()), *case.names.linear_modules]
    write_file(folder / peft.CONFIG, [lora_files.peft_config(all_entries, said, modules)])
    return peft.WEIGHTS, ("format", "pt")


def _write_papers(
    case: Case, folder: Path, record: Mapping[str, Any], done: Sequence[Converted], said: Said
) -> bytes:
    """The card, then the manifest, which is last: whoever finds it finds all else."""
    base = case.base.checkpoint
    carried = card.source_facts(base.root, base.companions)
    text = card.card(said.base[0], carried, "A LoRA", _card_body(case, record, done, said), is_adapter=True)
    write_file(folder / CARD, [text])
    tensors = _records(case, done)
    content = {
        **record,
        "base_fingerprint": manifest.fingerprint(tensors),
        "files": file_records(folder, 1),
        "schema": manifest.SCHEMA,
        "tensors": tensors,
        "weights": [asdict(_row(one)) for one in done],
    }
    sealed = manifest.seal(content)
    write_file(folder / MANIFEST, [sealed])
    return sealed


def _recorded(case: Case, running: Running) -> dict[str, Any]:
    """What the bytes depend on beside the base: no path."""
    tail = case.cuts.tail if case.cutting else None
    options = {name: getattr(case.options, name) for name in ("to", "names", "rank", "energy", "pad_rank")}
    sha256 = lineage.digest(case.path, case.adapter.container.path)
    return {
        "adapter": {"kind": case.adapter.kind, "sha256": sha256},
        "base_is": case.told,
        "command": "convert",
        "environment": manifest.numeric_environment(running.threads_per_worker, "cpu"),
        "model_class": case.names.model_class,
        "options": {**options, "on": case.on},
        "source": {"commit": case.source.commit, "repo": case.source.repo},
        "tail_sha256": sha256_file(tail.path) if tail else None,
    }


def _records(case: Case, done: Sequence[Converted]) -> dict[str, Any]:
    """Every tensor of the base that the LoRA is for, with the hash that it has there, if that is known."""
    tensors = case.base.checkpoint.tensors
    return {
        name: {
            "dtype": tensors[name].dtype,
            "input_sha256": digest if case.fits_given else _other_hash(case, name),
            "module": one.place.patch.module,
            "role": "reference",
            "shape": list(tensors[name].shape),
        }
        for one in done
        for name, digest in one.hashes.items()
    }


def _card_body(case: Case, record: Mapping[str, Any], done: Sequence[Converted], said: Said) -> str:
    loss, kind = _loss(done), case.adapter.kind
    base = f" It is for the {case.on} base." if case.on else ""
    lost = f" Of the norm of its updates {loss:.2%} is missing." if case.limit.is_set else ""
    where = "on disk" if said.is_on_disk else "in memory"
    lines = [
        f"Made by kasa from an adapter of kind {kind}: a plain LoRA of rank {said.rank} and scaling 1.{base}{lost}",
        "",
        f"- `{record['adapter']['file']}`: {case.options.to}, modules named as {where}.",
        f"- `{MANIFEST}`: what it was made from, with hashes; `kasa verify` checks it.",
    ]
    return "\n".join(lines)


# --- what is reported ---


def _report(case: Case, done: Sequence[Converted], model: str, output: dict[str, Any]) -> ConvertReport:
    rank = max(one.rank for one in done)
    return ConvertReport(
        command="convert",
        model=model,
        model_class=case.names.model_class,
        kind=case.adapter.kind,
        to=case.options.to,
        on=case.on,
        base_is=case.told,
        names=None if case.options.to == LITE else case.options.names,
        rank=rank,
        padded_rank=rank,
        tensors=tuple(_row(one) for one in done),
        totals={
            "weights": len(done),
            "tensors_consumed": len(consumed(case.adapter)),
            "tensors_total": len(case.adapter.container.tensors),
            "largest_loss": max(one.loss for one in done),
            "loss": _loss(done),
        },
        output=output,
        notes=tuple(_notes(case)),
    )


def _row(one: Converted) -> ConvertedRow:
    patch = one.place.patch
    module = patch.module if patch.parameter == "weight" else f"{patch.module}.{patch.parameter}"
    return ConvertedRow(module, tuple(one.hashes), one.rank, one.exact_rank, one.norm, one.loss)


def _loss(done: Sequence[Converted]) -> float:
    """What is missing of all updates together."""
    norm, error = math.hypot(*(one.norm for one in done)), math.hypot(*(one.error for one in done))
    return error / norm if norm else 0.0


def _notes(case: Case) -> list[str]:
    notes = [case.names.note] if case.names.note else []
    if not case.fits_given and case.on == TRUNCATED and not case.truncations:
        notes.append(
            "no manifest knows the truncated base, so none is on record as the one that this LoRA fits"
        )
    dtypes = {case.base.checkpoint.tensors[name].dtype for name in case.targets}
    if case.cutting and dtypes.intersection(HALVES):
        notes.append(
            "the cut is exact here; a truncated base in half precision holds it rounded, "
            "and an adapter trained on that one answers a little differently on this"
        )
    return notes
