"""Model cards and manifest of a truncation. The manifest is written last."""

from kasa_cli.adapters import wrapper_names
from kasa_cli.checkpoint import (
    CARD,
    Environment,
    ExpertRecord,
    InputTensor,
    SourceRecord,
    StoredTensor,
    TensorRecord,
    TruncateManifest,
    TruncationRecord,
    fingerprint,
    hash_tensor,
    model_card,
)
from kasa_cli.files import MANIFEST, Staging, write_file
from kasa_cli.pipeline.file_records import file_records
from kasa_cli.pipeline.truncating.factors import MeasuredTarget
from kasa_cli.pipeline.truncating.options import TruncateRequest, recorded
from kasa_cli.pipeline.truncating.plan import Plan
from kasa_cli.pipeline.truncating.rewrite import Truncated


def write_records(
    plan: Plan, options: TruncateRequest, staging: Staging, environment: Environment, result: Truncated
) -> bytes:
    """Write the model cards, then the manifest; returns its bytes. A manifest exists only in a complete output."""
    source_card = model_card.source_facts(plan.checkpoint.root, plan.checkpoint.companions)
    text = model_card.card(plan.source.repo, source_card, "A KaSA starting point", _card_body(plan, options))
    write_file(staging.out / CARD, [text])
    if "base" in options.emit:
        write_file(staging.out / "base" / CARD, [text])
    tensors = _tensor_records(plan, result)
    headers = {f"base/{name}": sha256 for name, sha256 in result.base.header_sha256.items()}
    manifest = TruncateManifest(
        base_fingerprint=fingerprint(tensors),
        environment=environment,
        experts=_expert_records(result),
        files=file_records(staging.out, options.num_workers, headers),
        left_out={left.name: left.reason for left in plan.checkpoint.left_out},
        model_class=plan.names.model_class,
        options=recorded(options),
        source=SourceRecord(plan.source.commit, plan.source.repo),
        tensors=tensors,
    )
    sealed = manifest.sealed()
    write_file(staging.out / MANIFEST, [sealed])
    return sealed


def _tensor_records(plan: Plan, result: Truncated) -> dict[str, TensorRecord]:
    """A record of every tensor of the new base, and of every target."""
    written = {tensor.name: tensor for tensor in result.base.tensors}
    targets = {
        measured.target.name: measured for measured in result.measured if measured.target.expert is None
    }
    experts = dict.fromkeys(_tensors_of_experts(plan))
    records = {}
    for name in dict.fromkeys((*written, *targets, *experts)):
        tensor, measured, entry = written.get(name), targets.get(name), plan.checkpoint.tensors[name]
        is_target = name in targets or name in experts
        records[name] = TensorRecord(
            role=("truncated" if tensor else "reference") if is_target else "copied",
            dtype=tensor.dtype if tensor else entry.dtype,
            shape=entry.shape,
            stored=StoredTensor(tensor.file, tensor.blake3) if tensor else None,
            before=InputTensor(measured.blake3 if measured else hash_tensor(plan.checkpoint, name))
            if is_target
            else None,
            module=measured.target.module if measured else None,
            truncation=_truncation(measured) if measured else None,
            truncated=result.outcomes.get(name) if measured else None,
        )
    return records


def _truncation(measured: MeasuredTarget) -> TruncationRecord:
    target = measured.target
    return TruncationRecord(target.dropped, target.matrix.is_transposed, measured.facts)


def _tensors_of_experts(plan: Plan) -> list[str]:
    """The tensors on disk of the experts among the targets."""
    return sorted({piece.name for target in plan.selection.experts for piece in target.matrix.pieces})


def _expert_records(result: Truncated) -> dict[str, ExpertRecord]:
    modules = [
        measured.target.module
        for measured in result.measured
        if measured.target.expert is not None and measured.target.dropped
    ]
    wrappers = wrapper_names(list(dict.fromkeys(modules)))
    return {
        measured.target.name: ExpertRecord(
            expert=measured.target.expert,
            dtype=measured.target.matrix.dtype,
            shape=measured.target.shape,
            pieces=tuple((piece.name, piece.index) for piece in measured.target.matrix.pieces),
            wrapper=wrappers.get(measured.target.module),
            module=measured.target.module,
            input_blake3=measured.blake3,
            truncation=_truncation(measured),
            truncated=result.outcomes.get(measured.target.name),
        )
        for measured in result.measured
        if measured.target.expert is not None
    }


def _card_body(plan: Plan, options: TruncateRequest) -> str:
    parts = {
        "base": "- `base/`: the truncated model, loaded like the original.",
        "adapter": f"- `adapter/`: a fresh KaSA adapter of rank {options.rank} for PEFT.",
        "tail": "- `tail/`: a plain LoRA that turns the original model into the truncated one.",
    }
    if not plan.selection.modules:
        del parts["adapter"]
    lines = [
        f"Made by kasa: the {options.dropped} smallest singular components of "
        f"{len(plan.selection.targets)} weights were dropped (KaSA, arXiv 2412.06071).",
        "",
        *(line for part, line in parts.items() if part in options.emit),
        f"- `{MANIFEST}`: the origin and the hashes of every tensor; `kasa verify` checks it.",
    ]
    return "\n".join(lines)
