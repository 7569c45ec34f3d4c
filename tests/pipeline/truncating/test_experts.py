"""Fused experts in `truncate`, against numpy's SVD of the parameters that transformers holds in memory."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

import kasa_cli as kasa
from kasa_cli.errors import IntegrityError, UsageError
from kasa_cli.pipeline.truncating.run import ModelLocation, TruncateRequest, plan
from kasa_cli.pipeline.verifying.run import verify
from kasa_cli.report import TensorRow
from kasa_cli.targets.patterns import Patterns
from tests.builders import tiny_models
from tests.builders.checkpoints import load, logits
from tests.builders.folders import tree_hash
from tests.builders.matrices import close
from tests.builders.runs import inside
from tests.builders.truncated import Truncated, cut

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
]

FAMILIES = (
    "mixtral",
    "qwen2-moe",
    "qwen3-moe",
    "deepseek-v3",
    "granite-moe",
    "gpt-oss",
    "llama4-text",
    "olmoe",
    "jamba",
)
LAYOUTS = {"separate": True, "fused": False}
"""How transformers saves experts: as in the original checkpoint, or as in memory."""
T = 3


def truncated(
    family: str, folder: Path, layout: str = "separate", *targets: str, **options: Any
) -> Truncated:
    model = tiny_models.save(family, folder / "model", save_original_format=LAYOUTS[layout])
    return cut(model, folder / "out", *(targets or ("*.experts.*",)), truncation_rank=T, workers=2, **options)


def experts_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter of fused experts, in memory."""
    return {name: p.detach() for name, p in model.named_parameters() if p.dim() == 3 and "experts" in name}


def by_module(case: Truncated) -> dict[str, list[TensorRow]]:
    """The rows of the experts of each parameter."""
    rows: defaultdict[str, list[TensorRow]] = defaultdict(list)
    for row in case.report.tensors:
        rows[row.module].append(row)
    return dict(rows)


def without_smallest(W: torch.Tensor, t: int) -> np.ndarray:
    U, S, Vt = np.linalg.svd(W.double().numpy(), full_matrices=False)
    return (U[:, :-t] * S[:-t]) @ Vt[:-t]


@pytest.mark.parametrize(
    ("family", "layout"),
    [*((family, "separate") for family in FAMILIES), ("mixtral", "fused"), ("qwen3-moe", "fused")],
)
def test_every_expert_loses_its_smallest_components_to_the_tail(
    family: str, layout: str, tmp_path: Path
) -> None:
    case = truncated(family, tmp_path, layout)
    before, after = experts_of(case.original()), experts_of(case.truncated())
    rows = by_module(case)
    assert before and rows.keys() == before.keys()
    assert len({row.name for row in case.report.tensors}) == sum(map(len, before.values()))
    for label, stack in before.items():
        for row, number, W in zip(rows[label], range(len(stack)), stack, strict=True):
            S = np.linalg.svd(W.double().numpy(), compute_uv=False)
            assert np.abs(after[label][number].double().numpy() - without_smallest(W, T)).max() < 1e-6
            assert (row.module, row.shape, row.truncation_rank) == (label, tuple(W.shape), T)
            figures = (row.sigma_max, row.sigma_min, row.sigma_cut, row.sigma_next)
            assert figures == pytest.approx((S[0], S[-1], S[-T], S[-T - 1]), rel=1e-10)
            assert row.realised == pytest.approx(1, abs=1e-4)
            moved = np.linalg.norm((after[label][number] - W).double().numpy()) / np.linalg.norm(S)
            assert row.relative_error == pytest.approx(moved, rel=1e-6)
    adapted = PeftModel.from_pretrained(case.original(), str(case.out / "tail"))
    assert close(logits(adapted), logits(case.truncated()), 2e-5)
    assert not close(logits(adapted), logits(case.original()), 2e-5)


@pytest.mark.parametrize("rounding", ["nearest", "preserve"])
def test_the_layout_on_disk_changes_nothing_in_memory(rounding: str, tmp_path: Path) -> None:
    options = {"dtype": "bfloat16", "rounding": rounding}
    cases = [truncated("mixtral", tmp_path / layout, layout, **options) for layout in LAYOUTS]
    tails = [load_file(case.out / "tail/adapter_model.safetensors") for case in cases]
    assert tails[0].keys() == tails[1].keys()
    assert all(torch.equal(tails[0][name], tails[1][name]) for name in tails[0])
    stacks = [experts_of(case.truncated()) for case in cases]
    assert all(torch.equal(stacks[0][name], stacks[1][name]) for name in stacks[0])
    for one, other in zip(*(case.report.tensors for case in cases), strict=True):
        assert (one.module, one.shape, one.truncation_rank) == (
            other.module,
            other.shape,
            other.truncation_rank,
        )
        assert one.realised == pytest.approx(other.realised, abs=1e-9)
        assert one.changed_fraction == other.changed_fraction


def test_experts_and_modules_are_truncated_together(tmp_path: Path) -> None:
    case = truncated("qwen2-moe", tmp_path, "separate", "*experts*", "q_proj")
    assert {row.module.rpartition(".")[2] for row in case.report.tensors} == {
        "q_proj",
        "gate_up_proj",
        "down_proj",
    }
    adapted = PeftModel.from_pretrained(case.original(), str(case.out / "tail"))
    assert close(logits(adapted), logits(case.truncated()), 2e-5)
    adapter = load_file(case.out / "adapter/adapter_model.safetensors")
    assert all(".q_proj." in name for name in adapter)
    assert any("adapter/ does not hold these" in note for note in case.report.notes)


def test_of_experts_alone_there_is_no_adapter(tmp_path: Path) -> None:
    case = truncated("mixtral", tmp_path)
    assert not (case.out / "adapter").exists()
    assert "adapter" not in case.report.output
    assert "adapter/" not in (case.out / "README.md").read_text()
    assert any("there is no adapter/" in note for note in case.report.notes)


def test_some_parameters_of_the_experts_can_be_named(tmp_path: Path) -> None:
    case = truncated("mixtral", tmp_path, "separate", "*.1.mlp.experts.down_proj")
    before, after = experts_of(case.original()), experts_of(case.truncated())
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.layers.1.mlp.experts.down_proj"]
    adapted = PeftModel.from_pretrained(case.original(), str(case.out / "tail"))
    assert close(logits(adapted), logits(case.truncated()), 2e-5)


def test_experts_are_left_alone_unless_they_are_named(tmp_path: Path) -> None:
    model = tiny_models.save("mixtral", tmp_path / "model")
    fused = "expert, fused in memory: PEFT has no KaSA for fused experts"
    for patterns, reason in (
        (Patterns(), fused),
        (Patterns(("q_proj",)), fused),
        (Patterns(("*experts*", "q_proj"), ("*experts*",)), "excluded"),
    ):
        report = plan(ModelLocation(str(model)), TruncateRequest(rank=T, patterns=patterns))
        assert not any("experts" in row.module for row in report.tensors)
        assert {one.reason for one in report.skipped if ".experts." in one.name} == {reason}


def test_a_plan_has_a_row_for_every_expert(tmp_path: Path) -> None:
    model = tiny_models.save("mixtral", tmp_path / "model")
    report = plan(ModelLocation(str(model)), TruncateRequest(rank=T, patterns=Patterns(("gate_up_proj",))))
    assert [row.name for row in report.tensors][:2] == [
        "model.layers.0.mlp.experts.gate_up_proj[0]",
        "model.layers.0.mlp.experts.gate_up_proj[1]",
    ]
    assert report.output == {"base": True, "adapter": False, "tail": True}
    assert {(row.shape, row.dtype, row.is_transposed, row.dropped) for row in report.tensors} == {
        ((96, 32), "F32", False, T)
    }


def test_a_rank_that_an_expert_cannot_have_is_refused(tmp_path: Path) -> None:
    model = tiny_models.save("mixtral", tmp_path / "model")
    with pytest.raises(UsageError, match="the truncation rank 32 is not below"):
        plan(
            ModelLocation(str(model)),
            TruncateRequest(rank=4, truncation_rank=32, patterns=Patterns(("*experts*",))),
        )


@pytest.mark.parametrize(("family", "layout"), [("mixtral", "separate"), ("gpt-oss", "fused")])
def test_verify_recomputes_every_expert(family: str, layout: str, tmp_path: Path) -> None:
    case = truncated(family, tmp_path, layout)
    report = verify(case.out, read_data=True, against=ModelLocation(str(case.model)))
    compared = {one["name"]: one for one in report.compared}
    assert compared.keys() == {row.name for row in case.report.tensors}
    assert all(one["ulps"] <= 0.5 + 1e-6 and one["tail_error"] < 1e-6 for one in compared.values())


@pytest.mark.parametrize("changed", ["base", "tail"])
def test_verify_finds_an_expert_that_differs(changed: str, tmp_path: Path) -> None:
    case = truncated("mixtral", tmp_path)
    other = tiny_models.save("qwen3-moe", tmp_path / "other")
    with pytest.raises(IntegrityError):
        verify(case.out, against=ModelLocation(str(other)))
    file = next((case.out / changed).glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-3] ^= 0x40
    file.write_bytes(data)
    with pytest.raises(IntegrityError):
        verify(case.out, read_data=True)


@pytest.mark.parametrize("emit", ["base", "tail"])
def test_only_what_is_asked_for_is_written(emit: str, tmp_path: Path) -> None:
    case = truncated("mixtral", tmp_path, emit=(emit,))
    assert sorted(path.name for path in case.out.iterdir() if path.is_dir()) == [emit]
    verify(case.out, read_data=True, against=ModelLocation(str(case.model)))


def test_the_command_line_names_them_by_a_glob(tmp_path: Path, capsys: Any) -> None:
    model = tiny_models.save("mixtral", tmp_path / "model")
    options = ("-r", "3", "--target", "*experts*", "--json")
    ran = inside(capsys, "truncate", model, "-o", tmp_path / "out", *options)
    assert ran.code == 0
    assert ran.json["totals"]["tensors_operated"] == 2 * 2 * 4
    assert load(tmp_path / "out/base") is not None


def test_an_adapter_cannot_truncate_the_experts_of_an_original_base(tmp_path: Path) -> None:
    """The adapter holds its own modules alone: a merge into the original would leave the experts whole."""
    case = truncated("mixtral", tmp_path, "separate", "*.experts.*", "q_proj")
    adapter, original = case.out / "adapter", tmp_path / "model"
    kasa.merge(adapter, into=case.out / "base", output=tmp_path / "merged")
    with pytest.raises(UsageError, match="truncated matrices of experts"):
        kasa.merge(adapter, into=original, output=tmp_path / "whole")
    with pytest.raises(UsageError, match="truncated matrices of experts"):
        kasa.convert(adapter, base=original, output=tmp_path / "lora", to="lora")
    assert not (tmp_path / "whole").exists() and not (tmp_path / "lora").exists()


def test_the_default_dtype_of_the_caller_changes_nothing(tmp_path: Path) -> None:
    case = truncated("llama", tmp_path, "separate", "q_proj")
    torch.set_default_dtype(torch.float64)
    try:
        cut(tmp_path / "model", tmp_path / "again", "q_proj", truncation_rank=T, workers=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert tree_hash(case.out / "adapter") == tree_hash(tmp_path / "again" / "adapter")
