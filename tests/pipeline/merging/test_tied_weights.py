"""`kasa merge` of adapters on tied weights: each parameter gets its own update, or the error names the tensor.

The oracle is the model that was trained: PEFT's own forward pass before any merge, which PEFT does in place on both
ends; and PEFT's merge on a base that was untied first.
"""

import json
import shutil
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from kasa_cli.checkpoint.layout import open_checkpoint
from kasa_cli.errors import ExitCode, InvalidInput
from kasa_cli.model_names.tied_weights import groups_of, taken_apart
from tests.builders import shared, tiny_models
from tests.builders.adapters import WEIGHTS, disturb, tampered
from tests.builders.checkpoints import load, logits, tensors_of
from tests.builders.matrices import assert_close
from tests.builders.merged import assert_accounted, loaded, merged
from tests.builders.runs import inside

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QV = {"target_modules": ["q_proj"]}
ONE_END: dict[str, tuple[str, dict[str, Any]]] = {
    "embedding": ("llama-tied", {"target_modules": ["embed_tokens"]}),
    "head": ("llama-tied", {"target_modules": ["lm_head", "q_proj"]}),
    "both ends apart": ("llama-tied", {"target_modules": ["embed_tokens", "lm_head"]}),
    "head saved": ("llama-tied", {**QV, "modules_to_save": ["lm_head"]}),
    "embedding saved": ("llama-tied", {**QV, "modules_to_save": ["embed_tokens"]}),
    "both saved apart": ("llama-tied", {**QV, "modules_to_save": ["embed_tokens", "lm_head"]}),
    "rows of the head": ("llama-tied", {**QV, "trainable_token_indices": {"lm_head": [3]}}),
    "other rows": ("llama-tied", {**QV, "trainable_token_indices": {"embed_tokens": [1], "lm_head": [3]}}),
    "gpt2 wte": ("gpt2", {"target_modules": ["wte", "c_attn"]}),
    "gpt2 head": ("gpt2", {"target_modules": ["lm_head"]}),
    "gemma3": ("gemma3", {"target_modules": ["lm_head"]}),
    "gemma3-vlm head": ("gemma3-vlm", {"target_modules": ["lm_head"]}),
    "gemma3-vlm embedding": ("gemma3-vlm", {"target_modules": ["embed_tokens"]}),
    "bert decoder": ("bert-mlm", {"target_modules": ["cls.predictions.decoder"]}),
    "bert decoder and bias": (
        "bert-mlm",
        {"target_modules": ["cls.predictions.decoder"], "lora_bias": True},
    ),
    "bert decoder saved": ("bert-mlm", {"target_modules": ["query"], "modules_to_save": ["decoder"]}),
    "bert embedding": ("bert-mlm", {"target_modules": ["word_embeddings"]}),
    "whisper": ("whisper", {"target_modules": ["proj_out"]}),
    "bart, of four ends": ("bart", {"target_modules": ["decoder.embed_tokens"]}),
}
"""Adapters after which the tied parameters differ: the family, and PEFT's options."""
BOTH_ENDS: dict[str, dict[str, Any]] = {
    "rows": {**QV, "trainable_token_indices": [1, 5]},
    "the same rows": {**QV, "trainable_token_indices": {"embed_tokens": [1], "lm_head": [1]}},
    "tied factors": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "tied and saved": {**QV, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
}


def bart() -> transformers.PreTrainedModel:
    sides = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
    config = transformers.BartConfig(**sides, **heads, vocab_size=96, d_model=32)
    return transformers.BartForConditionalGeneration(config)


@cache
def base_of(family: str) -> Path:
    if family != "bart":
        return tiny_models.saved(family)
    torch.manual_seed(0)
    model = bart()
    tiny_models.fill(model)
    model.save_pretrained(shared.place(family))
    return shared.keep(shared.place(family))


def trained(base: Path, folder: Path, make=peft.LoraConfig, **options: Any) -> torch.Tensor:
    """Save a random adapter with PEFT, and return the logits of the model with it before any merge."""
    torch.manual_seed(0)
    rank = {"r": 4, "lora_alpha": 6} if make is peft.LoraConfig else {}
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        model = peft.get_peft_model(load(base), make(**{**rank, **options})).eval()
        disturb(model)
        model.save_pretrained(folder)
        return logits(model.base_model.model)


@pytest.mark.parametrize("name", sorted(ONE_END))
def test_untied_ends_are_those_of_the_trained_model(name, tmp_path, caplog, capsys):
    family, options = ONE_END[name]
    base = base_of(family)
    said = trained(base, tmp_path / "adapter", **options)
    done = inside(capsys, "merge", tmp_path / "adapter", "--into", base, "-o", tmp_path / "OUT")
    assert (done.code, done.out) == (ExitCode.INVALID, "") and "--untie" in done.err
    assert not (tmp_path / "OUT").exists()
    report = merged(tmp_path / "adapter", base, tmp_path / "OUT", untie=True)
    model = loaded(tmp_path / "OUT", caplog)
    assert_close(logits(model), said)
    assert_accounted(report, base, tmp_path / "OUT")
    assert any("untied" in note for note in report.notes)
    config = json.loads((tmp_path / "OUT" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False and not config.get("text_config", {}).get(
        "tie_word_embeddings"
    )
    again = inside(capsys, "verify", tmp_path / "OUT", "--read-data")
    assert again.code == 0, again.err


@pytest.mark.parametrize("name", sorted(BOTH_ENDS))
def test_what_is_said_of_both_ends_keeps_them_one(name, tmp_path, caplog):
    base = base_of("llama-tied")
    said = trained(base, tmp_path / "adapter", **BOTH_ENDS[name])
    report = merged(tmp_path / "adapter", base, tmp_path / "OUT")
    model = loaded(tmp_path / "OUT", caplog)
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    assert tensors_of(tmp_path / "OUT").keys() == tensors_of(base).keys()
    assert_close(logits(model), said)
    assert_accounted(report, base, tmp_path / "OUT")
    told = merged(tmp_path / "adapter", base, tmp_path / "asked", untie=True)
    assert any("--untie has no effect" in note for note in told.notes)
    assert (tmp_path / "asked" / "model.safetensors").read_bytes() == (
        tmp_path / "OUT" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("make", ["lora", "dora", "ia3"])
def test_untying_is_pefts_merge_on_a_base_that_was_untied_first(make, tmp_path, caplog):
    base = base_of("llama-tied")
    model = load(base, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path / "untied")
    kind, options = {
        "lora": (peft.LoraConfig, {}),
        "dora": (peft.LoraConfig, {"use_dora": True}),
        "ia3": (peft.IA3Config, {"feedforward_modules": []}),
    }[make]
    trained(base, tmp_path / "adapter", kind, target_modules=["lm_head"], **options)
    with warnings.catch_warnings(action="ignore"):
        theirs = peft.PeftModel.from_pretrained(load(tmp_path / "untied"), tmp_path / "adapter")
        wanted = theirs.merge_and_unload().state_dict()
    merged(tmp_path / "adapter", base, tmp_path / "OUT", untie=True)
    found = loaded(tmp_path / "OUT", caplog).state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_close(found[name], tensor)
    assert torch.equal(found[EMBED], tensors_of(base)[EMBED])
    assert not torch.equal(found[HEAD], found[EMBED])


def test_two_adapters_one_on_each_end(tmp_path, caplog):
    base = base_of("llama-tied")
    for name in ("embed_tokens", "lm_head"):
        trained(base, tmp_path / name, target_modules=[name])
    report = merged(
        [tmp_path / "embed_tokens", tmp_path / "lm_head"],
        base,
        tmp_path / "OUT",
        untie=True,
        weights=(2.0, -1.0),
    )
    assert_accounted(report, base, tmp_path / "OUT")
    found = loaded(tmp_path / "OUT", caplog).state_dict()
    W = tensors_of(base)[EMBED].double()
    embedding, head = (load_file(tmp_path / name / WEIGHTS) for name in ("embed_tokens", "lm_head"))
    prefix = "base_model.model."
    A, B = (embedding[f"{prefix}model.embed_tokens.lora_embedding_{side}"].double() for side in "AB")
    assert_close(found[EMBED].double(), W + 2 * 6 / 4 * (B @ A).T)
    A, B = (head[f"{prefix}lm_head.lora_{side}.weight"].double() for side in "AB")
    assert_close(found[HEAD].double(), W - 6 / 4 * B @ A)


def test_a_shard_that_nothing_comes_to_keeps_its_bytes(tmp_path, caplog):
    """Whole shards with their headers; each new tensor is stored beside the tensor that it is made from."""
    base = tiny_models.save("bert-mlm", tmp_path / "base", max_shard_size="20KB")
    for shard in base.glob("*.safetensors"):  # a header that kasa would not write
        save_file(load_file(shard), shard, {"format": "pt", "origin": "elsewhere"})
    trained(base, tmp_path / "adapter", target_modules=["cls.predictions.decoder"])
    merged(tmp_path / "adapter", base, tmp_path / "OUT", untie=True)
    index = json.loads((tmp_path / "OUT" / "model.safetensors.index.json").read_text())["weight_map"]
    ends = "bert.embeddings.word_embeddings.weight", "cls.predictions.bias"
    assert index["cls.predictions.decoder.weight"] == index[ends[0]]
    assert index["cls.predictions.decoder.bias"] == index[ends[1]] != index[ends[0]]
    files = {path.name for path in base.glob("*.safetensors")}
    assert files == {path.name for path in (tmp_path / "OUT").glob("*.safetensors")} and len(files) > 2
    for name in files - {index[end] for end in ends}:
        assert (base / name).read_bytes() == (tmp_path / "OUT" / name).read_bytes()
    assert loaded(tmp_path / "OUT", caplog).cls.predictions.decoder.weight is not None


def test_new_tensors_go_into_shards_of_a_size(tmp_path, caplog, capsys):
    base = base_of("bart")
    said = trained(base, tmp_path / "adapter", target_modules=["lm_head"])
    merged(tmp_path / "adapter", base, tmp_path / "OUT", untie=True, max_shard_size="20KB")
    assert len(list((tmp_path / "OUT").glob("*.safetensors"))) > 2
    assert_close(logits(loaded(tmp_path / "OUT", caplog)), said)
    assert inside(capsys, "verify", tmp_path / "OUT", "--read-data").code == 0


def test_a_head_that_is_on_disk_too_gets_no_third_tensor(tmp_path, caplog):
    """As converters write it: both tensors are in the file and equal, and the config ties them."""
    base = shutil.copytree(base_of("llama-tied"), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    save_file({**weights, HEAD: weights[EMBED].clone()}, base / "model.safetensors", {"format": "pt"})
    said = trained(base, tmp_path / "adapter", target_modules=["lm_head"])
    with pytest.raises(InvalidInput, match="--untie"):
        merged(tmp_path / "adapter", base, tmp_path / "OUT")
    report = merged(tmp_path / "adapter", base, tmp_path / "OUT", untie=True)
    assert_close(logits(loaded(tmp_path / "OUT", caplog)), said)
    assert_accounted(report, base, tmp_path / "OUT")
    assert tensors_of(tmp_path / "OUT").keys() == tensors_of(base).keys()
    tied = trained(base, tmp_path / "rows", **BOTH_ENDS["rows"])
    merged(tmp_path / "rows", base, tmp_path / "both")
    after = tensors_of(tmp_path / "both")
    assert torch.equal(after[HEAD], after[EMBED]) and not torch.equal(after[HEAD], weights[EMBED])
    assert_close(logits(loaded(tmp_path / "both", caplog)), tied)


def test_ends_that_differ_on_disk_are_not_tied(tmp_path):
    """transformers warns and does not tie them, whatever the config says; T5 1.1 is stored this way."""
    base = shutil.copytree(base_of("t5"), tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    other = {
        f"{part}.embed_tokens.weight": weights["shared.weight"].clone() for part in ("encoder", "decoder")
    }
    save_file(
        {**weights, **other, HEAD: 2 * weights["shared.weight"]}, base / "model.safetensors", {"format": "pt"}
    )
    said = trained(base, tmp_path / "adapter", target_modules=["lm_head"])
    merged(tmp_path / "adapter", base, tmp_path / "OUT")
    assert_close(logits(load(tmp_path / "OUT")), said)


@pytest.mark.parametrize("target", ["lm_head", "shared", "embed_tokens"])
def test_a_class_that_ties_whatever_the_config_says_is_refused_by_name(target, tmp_path, capsys):
    base = base_of("t5")
    trained(base, tmp_path / "adapter", target_modules=[target])
    done = inside(capsys, "merge", tmp_path / "adapter", "--into", base, "-o", tmp_path / "OUT", "--untie")
    assert (done.code, done.out) == (ExitCode.INVALID, "")
    assert "T5ForConditionalGeneration" in done.err and not (tmp_path / "OUT").exists()


def test_trained_rows_of_both_ends_and_a_lora_of_one_are_refused_by_name(tmp_path, capsys):
    base = base_of("llama-tied")
    trained(base, tmp_path / "adapter", target_modules=["lm_head"], trainable_token_indices=[1])
    done = inside(capsys, "merge", tmp_path / "adapter", "--into", base, "-o", tmp_path / "OUT", "--untie")
    assert done.code == ExitCode.INVALID and "trained rows of tied weights" in done.err


def test_factors_that_were_tied_and_differ_now_are_two(tmp_path):
    """The config says that they are tied; the tensors differ."""
    base = base_of("llama-tied")
    trained(base, tmp_path / "adapter", **BOTH_ENDS["tied factors"])

    def pulled(tensors):
        tensors["base_model.model.lm_head.lora_B.weight"] += 1e-3

    with pytest.raises(InvalidInput, match="--untie"):
        merged(tampered(tmp_path / "adapter", tmp_path / "odd", pulled), base, tmp_path / "OUT")


def test_the_half_precision_base_under_an_untied_head_is_copied(tmp_path, caplog):
    tiny_models.save("llama-tied", tmp_path / "half", dtype=torch.bfloat16)
    trained(tmp_path / "half", tmp_path / "adapter", target_modules=["lm_head"])
    report = merged(tmp_path / "adapter", tmp_path / "half", tmp_path / "OUT", untie=True, dtype="float32")
    assert_accounted(report, tmp_path / "half", tmp_path / "OUT")
    after = tensors_of(tmp_path / "OUT")
    assert (after[HEAD].dtype, after[EMBED].dtype) == (torch.float32, torch.bfloat16)
    assert loaded(tmp_path / "OUT", caplog).dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "new"),
    [
        ("llama-tied", {HEAD}),
        ("gemma3-vlm", {"language_model.lm_head.weight"}),
        ("bert-mlm", {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}),
        ("bart", {HEAD, "model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"}),
    ],
)
def test_the_new_tensors_have_the_names_that_transformers_would_give_them(family, new, tmp_path):
    base = open_checkpoint(base_of(family))
    shapes = {name: entry.shape for name, entry in base.tensors.items()}
    apart = taken_apart(base.config, shapes, groups_of(base.config, shapes))
    assert apart.sources.keys() == new
    model = load(base.root, tie_word_embeddings=False) if family != "gemma3-vlm" else load(base.root)
    if family != "gemma3-vlm":  # its loader has no such option; the names are those of its mapping
        model.save_pretrained(tmp_path / "saved")
        assert new <= tensors_of(tmp_path / "saved").keys()
