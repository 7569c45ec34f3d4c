"""Names, config, model card and manifest of a conversion. The manifest is written last."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kasa_cli.adapters import FLAVOURS, BaseIndex, ConfigFacts, FactorEntry, Flavour, peft, writing
from kasa_cli.checkpoint import (
    CARD,
    ConvertedAdapter,
    ConvertManifest,
    ConvertOptions,
    InputTensor,
    SourceRecord,
    TensorRecord,
    fingerprint,
    model_card,
    numeric_environment,
)
from kasa_cli.files import MANIFEST, sha256_file, write_file
from kasa_cli.pipeline.adapter_on_base import provenance
from kasa_cli.pipeline.converting.case import ConvertCase
from kasa_cli.pipeline.converting.factors import Converted, loss_of_all
from kasa_cli.pipeline.file_records import file_records
from kasa_cli.pipeline.workers import RunOptions


def recorded(case: ConvertCase, running: RunOptions) -> ConvertManifest:
    """The manifest before any factor is written: all inputs, besides the base, that determine the bytes; no path."""
    tail, options = case.truncations.tail if case.truncation else None, case.options
    sha256 = provenance.digest(case.adapter.path, case.adapter.container.path)
    return ConvertManifest(
        adapter=ConvertedAdapter(case.adapter.kind, sha256),
        base_is=case.base_is,
        environment=numeric_environment(running.threads_per_worker, "cpu"),
        model_class=case.names.model_class,
        options=ConvertOptions(
            options.to, options.names, options.rank, options.energy, options.pad_rank, case.on
        ),
        source=SourceRecord(case.source.commit, case.source.repo),
        tail_sha256=sha256_file(tail.path) if tail else None,
    )


def entries_of(case: ConvertCase) -> list[list[FactorEntry]]:
    """The entries of the file for each place, under the names that `--names` selects.

    Raises:
        InvalidInput, UsageError: these names cannot express a place; its module is named.
    """
    flavour: Flavour = writing.in_lite if case.options.is_lite else FLAVOURS[case.options.names]
    base = BaseIndex(case.names, case.checkpoint.tensors)
    return [flavour(base, place) for place in case.places]


def config_facts(case: ConvertCase, results: Sequence[Converted]) -> ConfigFacts:
    """The common rank of all factors, and the other facts of the config."""
    rank = max(result.rank for result in results)
    rank = writing.padded_rank(rank) if case.options.pad_rank else rank
    is_on_disk = case.options.names == "disk"
    return ConfigFacts(rank, case.model_it_fits, case.names.model_class, case.checkpoint.config, is_on_disk)


def write_config(
    case: ConvertCase, folder: Path, entries: Sequence[list[FactorEntry]], facts: ConfigFacts
) -> tuple[str, tuple[str, str]]:
    """Write PEFT's config; for lora-lite it is in the header. Returns name and metadata of the file of tensors."""
    all_entries = [entry for own in entries for entry in own]
    if case.options.is_lite:
        return writing.LITE_WEIGHTS, ("cfg", writing.lite_config(all_entries, facts.rank))
    if facts.is_on_disk:
        modules = [name.removesuffix(".weight") for name in case.names.slots]
    else:
        modules = [*(slot.module for slot in case.names.slots.values()), *case.names.linear_modules]
    write_file(folder / peft.CONFIG, [writing.peft_config(all_entries, facts, modules)])
    return peft.WEIGHTS, ("format", "pt")


def write_records(
    case: ConvertCase, folder: Path, record: ConvertManifest, results: Sequence[Converted], facts: ConfigFacts
) -> bytes:
    """Write the model card, then the manifest; returns its bytes. A manifest exists only in a complete output."""
    base = case.checkpoint
    source_card = model_card.source_facts(base.root, base.companions)
    body = _card_body(case, record.adapter.file, results, facts)
    text = model_card.card(facts.base[0], source_card, "A LoRA", body, is_adapter=True)
    write_file(folder / CARD, [text])
    tensors = _tensor_records(case, results)
    manifest = replace(
        record,
        base_fingerprint=fingerprint(tensors),
        files=file_records(folder, 1),
        tensors=tensors,
        weights=tuple(result.row for result in results),
    )
    sealed = manifest.sealed()
    write_file(folder / MANIFEST, [sealed])
    return sealed


def _tensor_records(case: ConvertCase, results: Sequence[Converted]) -> dict[str, TensorRecord]:
    """Every tensor of the base that the LoRA is for, with its hash in that base if the hash is known."""
    return {
        name: TensorRecord(
            role="reference",
            dtype=case.checkpoint.tensors[name].dtype,
            shape=case.checkpoint.tensors[name].shape,
            before=InputTensor(digest if case.fits_given else case.hash_in_other_base(name)),
            module=result.place.patch.module,
        )
        for result in results
        for name, digest in result.hashes.items()
    }


def _card_body(case: ConvertCase, file: str, results: Sequence[Converted], facts: ConfigFacts) -> str:
    loss, kind = loss_of_all(results), case.adapter.kind
    base = f" It is for the {case.on} base." if case.on else ""
    lost = f" {loss:.2%} of the norm of its updates is missing." if case.options.limit.is_set else ""
    where = "on disk" if facts.is_on_disk else "in memory"
    lines = [
        f"Made by kasa from an adapter of kind {kind}: a plain LoRA of rank {facts.rank} and scaling 1.{base}{lost}",
        "",
        f"- `{file}`: {case.options.to}, modules named as {where}.",
        f"- `{MANIFEST}`: its inputs, with hashes; `kasa verify` checks it.",
    ]
    return "\n".join(lines)
