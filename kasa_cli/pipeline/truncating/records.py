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
    plan: Plan, options: TruncateRequest, staging: Staging, environment: Environment, done: Truncated
) -> bytes:
    """Write the model cards, then the manifest; returns its bytes. A manifest is there only once all else is."""
    carried = model_card.source_facts(plan.checkpoint.root, plan.checkpoint.companions)
    text = model_card.card(plan.source.repo, carried, "A KaSA starting point", _card_body(plan, options))
    write_file(staging.out / CARD, [text])
    if "base" in options.emit:
        write_file(staging.out / "base" / CARD, [text])
    tensors = _tensor_records(plan, done)
    headers = {f"base/{name}": sha256 for name, sha256 in done.base.header_sha256.items()}
    manifest = TruncateManifest(
        base_fingerprint=fingerprint(tensors),
        environment=environment,
        experts=_expert_records(done),
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


def _tensor_records(plan: Plan, done: Truncated) -> dict[str, TensorRecord]:
    """Every tensor that was written, and every target."""
    written = {tensor.name: tensor for tensor in done.base.tensors}
    targets = {each.target.name: each for each in done.measured if each.target.expert is None}
    experts = dict.fromkeys(_tensors_of_experts(plan))
    records = {}
    for name in dict.fromkeys((*written, *targets, *experts)):
        tensor, each, entry = written.get(name), targets.get(name), plan.checkpoint.tensors[name]
        is_target = name in targets or name in experts
        records[name] = TensorRecord(
            role=("truncated" if tensor else "reference") if is_target else "copied",
            dtype=tensor.dtype if tensor else entry.dtype,
            shape=entry.shape,
            stored=StoredTensor(tensor.file, tensor.blake3) if tensor else None,
            before=InputTensor(each.blake3 if each else hash_tensor(plan.checkpoint, name))
            if is_target
            else None,
            module=each.target.module if each else None,
            truncation=_truncation(each) if each else None,
            truncated=done.outcomes.get(name) if each else None,
        )
    return records


def _truncation(measured: MeasuredTarget) -> TruncationRecord:
    target = measured.target
    return TruncationRecord(target.dropped, target.matrix.is_transposed, measured.facts)


def _tensors_of_experts(plan: Plan) -> list[str]:
    """The tensors on disk that hold experts which are targets."""
    return sorted({piece.name for target in plan.selection.experts for piece in target.matrix.pieces})


def _expert_records(done: Truncated) -> dict[str, ExpertRecord]:
    modules = [
        each.target.module for each in done.measured if each.target.expert is not None and each.target.dropped
    ]
    wrappers = wrapper_names(list(dict.fromkeys(modules)))
    return {
        each.target.name: ExpertRecord(
            expert=each.target.expert,
            dtype=each.target.matrix.dtype,
            shape=each.target.shape,
            pieces=tuple((piece.name, piece.index) for piece in each.target.matrix.pieces),
            wrapper=wrappers.get(each.target.module),
            module=each.target.module,
            input_blake3=each.blake3,
            truncation=_truncation(each),
            truncated=done.outcomes.get(each.target.name),
        )
        for each in done.measured
        if each.target.expert is not None
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
        f"- `{MANIFEST}`: what was done to every tensor, with hashes; `kasa verify` checks it.",
    ]
    return "\n".join(lines)
