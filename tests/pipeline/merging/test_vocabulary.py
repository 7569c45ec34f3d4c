"""`kasa merge` of adapters that were trained on a resized vocabulary: embedding, head and config.

The oracle is the model that was trained, on a base that transformers resized: its forward pass, and PEFT's merge.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file

from kasa_cli.checkpoint.manifest import load as load_manifest
from kasa_cli.checkpoint.model_config import resized
from kasa_cli.errors import ExitCode, InvalidInput
from kasa_cli.pipeline.merging import by_rows
from tests.builders import tiny_models
from tests.builders.adapters import WEIGHTS, disturb, tampered
from tests.builders.checkpoints import load, logits, tensors_of
from tests.builders.matrices import assert_close
from tests.builders.merged import assert_accounted, loaded, merged
from tests.builders.runs import inside

QV = {"target_modules": ["q_proj"]}
BOTH = ["embed_tokens", "lm_head"]
OLD, NEW = 96, 100
KEPT: dict[str, tuple[str, dict[str, Any]]] = {
    "saved because it was resized": ("llama", QV),
    "both ends targeted": ("llama", {"target_modules": BOTH}),
    "both ends in modules_to_save": ("llama", {**QV, "modules_to_save": BOTH}),
    "the embedding in modules_to_save": ("llama", {**QV, "modules_to_save": ["embed_tokens"]}),
    "trained rows": ("llama", {**QV, "trainable_token_indices": [1, 98]}),
    "tied": ("llama-tied", QV),
    "tied, rows": ("llama-tied", {**QV, "trainable_token_indices": [1, 98]}),
    "tied, factors": ("llama-tied", {"target_modules": BOTH, "ensure_weight_tying": True}),
    "tied, saved": ("llama-tied", {**QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn"]}),
    "t5": ("t5", {"target_modules": ["q"]}),
    "whisper": ("whisper", QV),
    "gpt-neox": ("gpt-neox", {"target_modules": ["query_key_value"]}),
    "gemma3-vlm": ("gemma3-vlm", QV),
    "mixtral, in shards": ("mixtral", QV),
}
"""Adapters on a resized base that hold the whole vocabulary and keep tied weights tied."""
SHARDS = {"mixtral": {"max_shard_size": "40KB"}}
UNTIED: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "both": {"target_modules": BOTH},
    "saved apart": {**QV, "modules_to_save": BOTH},
    "embedding saved": {**QV, "modules_to_save": ["embed_tokens"]},
}


def trained(
    base: Path, folder: Path, rows: int = NEW, saves: bool | str = "auto", **options: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Save a random adapter of the resized base; return the logits before a merge, and PEFT's merged tensors."""
    torch.manual_seed(0)
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        model = load(base)
        model.resize_token_embeddings(rows, mean_resizing=False)
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, **options)).eval()
        disturb(adapted)
        adapted.save_pretrained(folder, save_embedding_layers=saves)
        said = logits(adapted.base_model.model)
        return said, adapted.merge_and_unload().state_dict()


@pytest.mark.parametrize("name", sorted(KEPT))
def test_a_resized_vocabulary_is_merged(name, tmp_path, caplog, capsys):
    family, options = KEPT[name]
    base = tiny_models.saved(family, **SHARDS.get(family, {}))
    saves = True if family in ("t5", "whisper", "gemma3-vlm") else "auto"
    said, theirs = trained(base, tmp_path / "adapter", saves=saves, **options)
    report = merged(tmp_path / "adapter", base, tmp_path / "OUT")
    model = loaded(tmp_path / "OUT", caplog)
    assert_close(logits(model), said)
    if "factors" not in name:  # PEFT merges these twice, in place, into both tied parameters
        for key, tensor in model.state_dict().items():
            assert_close(tensor, theirs[key])
    assert model.get_input_embeddings().weight.shape[0] == NEW
    assert model.config.get_text_config().vocab_size == NEW
    assert_accounted(report, base, tmp_path / "OUT")
    assert any(f"{NEW} rows" in note and "tokenizer" in note for note in report.notes)
    verified = inside(capsys, "verify", tmp_path / "OUT", "--read-data")
    assert verified.code == 0, verified.err
    before, after = tensors_of(base), tensors_of(tmp_path / "OUT")
    for one in report.tensors:
        both = min(len(before[one.name]), len(after[one.name]))
        change = (after[one.name][:both].double() - before[one.name][:both].double()).abs().max()
        assert one.max_abs_change == pytest.approx(float(change), rel=1e-12)
        assert 0 <= one.rounding_error < 1e-6


@pytest.mark.parametrize("rows", [OLD - 6, OLD + 1, 3 * OLD])
def test_a_vocabulary_shrinks_and_grows(rows, tmp_path, caplog):
    base = tiny_models.saved("llama")
    said, _ = trained(base, tmp_path / "adapter", rows, **QV)
    merged(tmp_path / "adapter", base, tmp_path / "OUT")
    assert_close(logits(loaded(tmp_path / "OUT", caplog)), said)
    assert len(tensors_of(tmp_path / "OUT")["lm_head.weight"]) == rows


@pytest.mark.parametrize("rows", [OLD - 6, 3 * OLD])
def test_the_hash_on_record_is_that_of_all_rows_of_the_base(rows, tmp_path, monkeypatch):
    """Also rows that a smaller vocabulary drops, whether or not they fit into one block."""
    monkeypatch.setattr(by_rows, "BLOCK_ENTRIES", 64)
    monkeypatch.setattr(by_rows, "LEAST_ROWS", 4)
    base = tiny_models.saved("llama")
    trained(base, tmp_path / "adapter", rows, **QV)
    merged(tmp_path / "adapter", base, tmp_path / "OUT")
    before, records = load_file(base / "model.safetensors"), load_manifest(tmp_path / "OUT").tensors
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert records[name].shape[0] == rows
        assert records[name].input_blake3 == blake3(before[name].numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", sorted(UNTIED))
def test_tied_ends_that_differ_are_untied_at_the_new_size(name, tmp_path, caplog):
    base = tiny_models.saved("llama-tied")
    said, _ = trained(base, tmp_path / "adapter", **UNTIED[name])
    with pytest.raises(InvalidInput, match="--untie"):
        merged(tmp_path / "adapter", base, tmp_path / "OUT")
    report = merged(tmp_path / "adapter", base, tmp_path / "OUT", untie=True)
    assert_close(logits(loaded(tmp_path / "OUT", caplog)), said)
    assert_accounted(report, base, tmp_path / "OUT")
    assert {
        len(tensors_of(tmp_path / "OUT")[end]) for end in ("lm_head.weight", "model.embed_tokens.weight")
    } == {NEW}


@pytest.mark.parametrize(
    ("target", "missing"), [("embed_tokens", "lm_head.weight"), ("lm_head", "model.embed_tokens.weight")]
)
def test_an_end_that_keeps_the_old_size_is_named(target, missing, tmp_path, capsys):
    base = tiny_models.saved("llama")
    trained(base, tmp_path / "adapter", target_modules=[target])
    done = inside(capsys, "merge", tmp_path / "adapter", "--into", base, "-o", tmp_path / "OUT")
    assert (done.code, done.out) == (ExitCode.INVALID, "")
    assert missing in done.err and str(NEW) in done.err and not (tmp_path / "OUT").exists()


def test_a_bias_over_the_vocabulary_that_stays_is_named(tmp_path, capsys):
    base = tiny_models.saved("bert-mlm")
    trained(
        base, tmp_path / "adapter", target_modules=["query"], modules_to_save=["word_embeddings", "decoder"]
    )
    done = inside(capsys, "merge", tmp_path / "adapter", "--into", base, "-o", tmp_path / "OUT", "--untie")
    assert done.code == ExitCode.INVALID and "cls.predictions.bias" in done.err


def test_the_bias_of_a_head_comes_with_it(tmp_path, caplog):
    """Phi's head has a bias."""
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.PhiForCausalLM(
        transformers.PhiConfig(vocab_size=OLD, **sizes, partial_rotary_factor=0.5)
    )
    tiny_models.fill(model)
    model.save_pretrained(tmp_path / "base")
    said, _ = trained(tmp_path / "base", tmp_path / "adapter", **QV)
    assert "base_model.model.lm_head.bias" in load_file(tmp_path / "adapter" / WEIGHTS)
    report = merged(tmp_path / "adapter", tmp_path / "base", tmp_path / "OUT")
    assert_close(logits(loaded(tmp_path / "OUT", caplog)), said)
    assert_accounted(report, tmp_path / "base", tmp_path / "OUT")

    def without(tensors):
        del tensors["base_model.model.lm_head.bias"]

    with pytest.raises(InvalidInput, match=r"lm_head\.bias has 96"):
        merged(tampered(tmp_path / "adapter", tmp_path / "less", without), tmp_path / "base", tmp_path / "no")


def test_adapters_of_two_vocabularies_are_not_merged(tmp_path):
    base = tiny_models.saved("llama")
    trained(base, tmp_path / "a", NEW, **QV)
    trained(base, tmp_path / "b", NEW + 4, **QV)
    trained(base, tmp_path / "c", OLD, target_modules=["embed_tokens"])
    with pytest.raises(InvalidInput, match="100, 104"):
        merged([tmp_path / "a", tmp_path / "b"], base, tmp_path / "OUT")
    with pytest.raises(InvalidInput):
        merged([tmp_path / "a", tmp_path / "c"], base, tmp_path / "OUT")


def test_adapters_of_one_resized_base_are_merged_with_their_weights(tmp_path, caplog):
    """Each file holds the resized base again; a weight scales only the update."""
    base = tiny_models.saved("llama")
    for seed, name in enumerate("ab"):
        trained(base, tmp_path / name, target_modules=BOTH)

        def other(tensors, seed=seed):
            for key, tensor in tensors.items():
                if "lora_" in key:
                    tensor += seed

        tampered(tmp_path / name, tmp_path / f"{name}-moved", other)
    pair = [tmp_path / "a-moved", tmp_path / "b-moved"]
    report = merged(pair, base, tmp_path / "OUT", weights=(0.5, -2.0))
    assert_accounted(report, base, tmp_path / "OUT")
    found = loaded(tmp_path / "OUT", caplog).state_dict()["lm_head.weight"].double()
    prefix = "base_model.model.lm_head"
    one, two = (load_file(path / WEIGHTS) for path in pair)
    exact = one[f"{prefix}.base_layer.weight"].double()
    for weight, tensors in ((0.5, one), (-2.0, two)):
        A, B = (tensors[f"{prefix}.lora_{side}.weight"].double() for side in "AB")
        exact = exact + weight * 6 / 4 * B @ A
    assert_close(found, exact)


def test_a_copy_that_is_none_is_refused(tmp_path):
    """PEFT writes a saved embedding that was resized three times."""
    base = tiny_models.saved("llama")
    trained(base, tmp_path / "adapter", **KEPT["both ends in modules_to_save"][1])
    name = "base_model.model.lm_head.modules_to_save.weight"

    def pulled(tensors):
        tensors[name] += 1

    odd = tampered(tmp_path / "adapter", tmp_path / "odd", pulled)
    with pytest.raises(InvalidInput, match="modules_to_save"):
        merged(odd, base, tmp_path / "OUT")

    def alone(tensors):
        del tensors["base_model.model.lm_head.weight"]

    with pytest.raises(InvalidInput, match="modules_to_save"):
        merged(tampered(tmp_path / "adapter", tmp_path / "alone", alone), base, tmp_path / "OUT")


def test_the_size_stands_where_it_stood():
    text = {"text_config": {"vocab_size": OLD, "hidden_size": OLD}, "vision_config": {"vocab_size": 7}}
    assert resized(text, OLD, NEW) == {
        "text_config": {"vocab_size": NEW, "hidden_size": OLD},
        "vision_config": {"vocab_size": 7},
    }
    assert resized({"hidden_size": OLD}, OLD, NEW) == {"hidden_size": OLD, "vocab_size": NEW}
    json.dumps(resized(text, OLD, NEW))
