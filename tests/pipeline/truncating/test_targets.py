"""Which tensors `truncate` takes, how much it drops of them, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel

from kasa_cli.errors import InvalidInput, UsageError
from kasa_cli.pipeline.truncating.options import check
from kasa_cli.pipeline.truncating.run import ModelLocation, Patterns, TruncateRequest, plan
from tests.builders import tiny_models
from tests.builders.adapters import wrapped
from tests.builders.checkpoints import WEIGHTS, Tensors, load, logits, rewritten, tensors_of
from tests.builders.matrices import close, kept
from tests.builders.truncated import RANK, chosen, cut, made, refused

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


# --- patterns ---


@pytest.mark.parametrize(
    ("targets", "excludes", "expected"),
    [
        (("q_proj",), (), {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"}),
        (("self_attn.q_proj",), ("*.1.*",), {Q0}),
        ((Q0, DOWN1), (), {Q0, DOWN1}),
        (("model.layers.1.mlp.*",), ("up_proj", "gate_proj"), {DOWN1}),
        (("*",), ("*_proj",), {"lm_head"}),
        (("lm_head", "*.0.self_attn.q_*"), (), {Q0, "lm_head"}),
        ((), ("*.mlp.*", "*.1.*", "*.[kvo]_proj"), {Q0}),
    ],
)
def test_patterns_choose(
    llama: Path, targets: tuple[str, ...], excludes: tuple[str, ...], expected: set[str]
) -> None:
    assert chosen(llama, *targets, excludes=excludes) == sorted(expected)


def test_what_is_not_chosen_says_why(llama: Path) -> None:
    options = TruncateRequest(rank=RANK, patterns=Patterns(("*.self_attn.*",), ("k_proj",)))
    reasons = {one.name: one.reason for one in plan(ModelLocation(str(llama)), options).skipped}
    assert reasons["model.layers.0.self_attn.k_proj.weight"] == "excluded"
    assert reasons["model.layers.0.mlp.up_proj.weight"] == reasons["lm_head.weight"] == "not named"
    assert reasons["model.embed_tokens.weight"] == "embedding"
    assert reasons["model.norm.weight"] == "not a matrix"


def test_targets_come_from_a_file(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "chosen.json").write_text(json.dumps({"target_modules": [Q0], "candidates": []}))
    assert chosen(llama, targets_from=tmp_path / "chosen.json") == [Q0]
    assert chosen(llama, DOWN1, targets_from=tmp_path / "chosen.json") == sorted([Q0, DOWN1])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"target_modules": []}', '{"target_modules": [1]}'])
def test_a_file_of_targets_without_targets(llama: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "chosen.json").write_text(text)
    with pytest.raises(InvalidInput, match=r"chosen\.json"):
        chosen(llama, targets_from=tmp_path / "chosen.json")
    with pytest.raises(InvalidInput, match="absent"):
        chosen(llama, targets_from=tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_porj",), r"matches no module: q_porj: near names: .*\bq_proj\b"),
        (("Q_PROJ",), "matches no module"),
        (("proj",), "matches no module"),
        (("q_proj", "embed_tokens"), "nothing that can be truncated: embed_tokens: .*: embedding"),
        (("model.norm",), "nothing that can be truncated: model.norm: .*: not a matrix"),
    ],
)
def test_patterns_that_choose_nothing(llama: Path, targets: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        chosen(llama, *targets)


def test_excludes_that_leave_nothing_or_match_nothing(llama: Path) -> None:
    assert "no target is left" in refused(llama, excludes=("*",))
    assert "matches no module: k_prj" in refused(llama, excludes=("k_prj",))


# --- heads and poolers ---


def test_a_tied_head_is_refused_by_name(tmp_path: Path) -> None:
    tied = tiny_models.save("llama-tied", tmp_path / "model")
    assert "matches no module: lm_head" in refused(tied, "lm_head")
    assert "embedding" in refused(tied, "embed_tokens")

    def doubled(tensors: Tensors) -> Tensors:
        return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    both = rewritten(tied, tmp_path / "both", doubled)
    assert "same tensor in memory as model.embed_tokens" in refused(both, "lm_head")
    skipped = {
        one.name: one.reason for one in plan(ModelLocation(str(both)), TruncateRequest(rank=RANK)).skipped
    }
    assert skipped["lm_head.weight"].startswith("output head, the same tensor")


@pytest.mark.parametrize(("family", "module"), [("llama", "lm_head"), ("bert", "pooler.dense")])
def test_what_lies_outside_the_blocks_can_be_named(family: str, module: str, tmp_path: Path) -> None:
    case = made(family, tmp_path, patterns=Patterns((module,)))
    assert case.modules == [module]
    before, after = tensors_of(case.model), tensors_of(case.out / "base")
    assert [name for name in before if not torch.equal(before[name], after[name])] == [f"{module}.weight"]
    W = before[f"{module}.weight"]
    assert np.abs(after[f"{module}.weight"].numpy() - kept(W, min(W.shape) - RANK)).max() < 1e-5
    for part in ("adapter", "tail"):
        model = PeftModel.from_pretrained(case.original(), case.out / part)
        assert wrapped(model) == [module]
        assert close(logits(model), logits(case.truncated()), 1e-5)


# --- ranks ---


def test_ranks_that_a_weight_cannot_have(llama: Path, tmp_path: Path) -> None:
    message = refused(llama, rank=2, truncation_rank=16)
    assert message.startswith("the truncation rank 16 is not below the smaller side of 16 x 32")
    assert "model.layers.0.self_attn.k_proj.weight" in message
    assert "the rank 16" in refused(llama, rank=16, truncation_rank=2)
    assert chosen(llama, rank=16, truncation_rank=15, emit=("base", "tail"))
    assert len(chosen(llama, rank=16, excludes=("k_proj", "v_proj"))) == 10
    assert len(cut(llama, tmp_path / "out", rank=15).report.tensors) == 14


def test_no_truncation_changes_no_byte(llama: Path, tmp_path: Path) -> None:
    case = cut(llama, tmp_path / "out", truncation_rank=0)
    assert (case.out / "base" / WEIGHTS).read_bytes() == (llama / WEIGHTS).read_bytes()
    assert (case.out / "adapter").is_dir() and not (case.out / "tail").exists()
    assert any("no component is dropped" in note for note in case.report.notes)
    assert {(row.realised, row.changed_fraction, row.sigma_cut) for row in case.report.tensors} == {
        (1.0, 0.0, None)
    }


def test_another_truncation_rank_is_noted(llama: Path, tmp_path: Path) -> None:
    case = cut(llama, tmp_path / "out", truncation_rank=5)
    assert any("PEFT drops the 3 smallest" in note for note in case.report.notes)
    assert {row.truncation_rank for row in case.report.tensors} == {5}
    assert not cut(llama, tmp_path / "same").report.notes
    tail = PeftModel.from_pretrained(load(llama), case.out / "tail")
    assert close(logits(tail), logits(case.truncated()), 1e-5)


def test_the_published_rule_keeps_in_features_less_the_rank(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{**tiny_models.TEXT, "intermediate_size": 33})
    model = transformers.LlamaForCausalLM(config)
    tiny_models.fill(model)
    model.save_pretrained(tmp_path / "model")
    case = cut(tmp_path / "model", tmp_path / "out", compat="reference")
    before, after = tensors_of(tmp_path / "model"), tensors_of(case.out / "base")
    for row in case.report.tensors:
        W, stored = before[row.name], after[row.name]
        in_features = W.shape[1]
        assert np.abs(stored.numpy() - kept(W, in_features - RANK)).max() < 1e-6 * row.sigma_max
        assert torch.equal(W, stored) == (in_features - RANK >= min(W.shape))
    assert any("wide layers" in note for note in case.report.notes)


@pytest.mark.parametrize(
    "wrong", [{"beta": float("nan")}, {"gamma": float("inf")}, {"beta": -1.0}, {"alpha": 0.0}]
)
def test_weights_of_losses_are_finite_and_alpha_positive(wrong):
    with pytest.raises(UsageError, match="finite"):
        check(TruncateRequest(**wrong))
