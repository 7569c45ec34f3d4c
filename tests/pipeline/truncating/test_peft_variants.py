"""Special cases of PEFT: modules that it refuses or rewrites, other dtypes, initialisations and rules."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import KasaConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kasa_cli.adapters import peft as peft_format
from kasa_cli.pipeline.truncating.run import ModelLocation, Patterns, TruncateRequest, truncate
from tests.builders import tiny_models
from tests.builders.adapters import wrapped
from tests.builders.checkpoints import load, logits
from tests.builders.matrices import close
from tests.builders.truncated import EXPERTS, RANK, REWRITTEN, Truncated, made

# every warning is an error: missing keys, unknown keyword arguments, patterns without a match
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def test_kasa_on_conv1d_is_refused_and_noted(tmp_path: Path) -> None:
    case = made("gpt2", tmp_path)
    assert any("Conv1D" in note and "tail/" in note for note in case.report.notes)
    with pytest.raises(ValueError, match="fan_in_fan_out"):
        PeftModel.from_pretrained(case.original(), case.out / "adapter")


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
def test_the_note_on_experts_is_there_exactly_when_peft_takes_targets_for_them(
    family: str, tmp_path: Path
) -> None:
    case = made(family, tmp_path, emit=("adapter",))
    with torch.device("meta"):
        model = type(tiny_models.build(family))(tiny_models.build(family).config)
    config = json.loads((case.out / "adapter/adapter_config.json").read_text())
    asked = LoraConfig(
        r=RANK, target_modules=config["target_modules"], fan_in_fan_out=config["fan_in_fan_out"]
    )
    is_rewritten = wrapped(get_peft_model(model, asked)) != case.modules
    assert any("peft#3711" in note for note in case.report.notes) == is_rewritten == (family in REWRITTEN)


def check_tail(case: Truncated) -> None:
    tail = PeftModel.from_pretrained(case.original(), case.out / "tail")
    assert wrapped(tail) == case.modules
    assert close(logits(tail), logits(case.truncated()), 1e-5)
    with tail.disable_adapter():
        assert torch.equal(logits(tail), logits(case.original()))


def check_loaded(case: Truncated, part: str) -> None:
    loaded = get_peft_model_state_dict(PeftModel.from_pretrained(case.original(), case.out / part))
    written = load_file(case.out / part / "adapter_model.safetensors")
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[name], written[name]) for name in written)


@pytest.mark.parametrize("family", sorted(REWRITTEN))
def test_the_tail_of_a_rewritten_family_names_parameters_and_holds(family: str, tmp_path: Path) -> None:
    case = made(family, tmp_path)
    assert any(module.endswith(EXPERTS) for module in case.modules)
    with pytest.raises(ValueError, match="does not work when `kasa_config` is set"):
        PeftModel.from_pretrained(case.original(), case.out / "adapter")
    check_tail(case)
    check_loaded(case, "tail")


def test_the_table_of_experts_is_that_of_peft() -> None:
    class Stub(nn.Module):
        config: Any

    leaves = ["q_proj", "gate", *EXPERTS, "w1", "w2", "w3", "out_proj"]
    for family in CONFIG_MAPPING:
        model, config = Stub(), LoraConfig(target_modules=leaves)
        model.config = transformers.PreTrainedConfig()
        model.config.model_type = family
        convert_peft_config_for_transformers(config, model, None)
        theirs = set(leaves) - set(config.target_modules)
        assert set(peft_format.taken_for_experts(leaves, {"model_type": family})) == theirs, family


def test_peft_refuses_what_mamba_reads_by_itself(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 96,
        "hidden_size": 32,
        "state_size": 8,
        "num_hidden_layers": 2,
        "time_step_rank": 8,
    }
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, bos_token_id=1, eos_token_id=2))
    tiny_models.fill(model)
    model.save_pretrained(tmp_path / "model")
    whole = truncate(ModelLocation(str(tmp_path / "model")), tmp_path / "out", TruncateRequest(rank=RANK))
    assert any("--exclude out_proj" in note for note in whole.notes)
    for part in ("adapter", "tail"):
        with pytest.raises(ValueError, match="incompatible with Mamba"):
            PeftModel.from_pretrained(load(tmp_path / "model"), tmp_path / "out" / part)
    options = TruncateRequest(rank=RANK, patterns=Patterns(excludes=("out_proj",)))
    case = Truncated(
        "mamba",
        tmp_path / "model",
        tmp_path / "out2",
        truncate(ModelLocation(str(tmp_path / "model")), tmp_path / "out2", options),
    )
    assert not case.report.notes
    check_tail(case)


@pytest.mark.parametrize("architecture", ["BertForSequenceClassification", "BertForQuestionAnswering"])
def test_a_model_with_a_head_of_its_own_loads_both(architecture: str, tmp_path: Path) -> None:
    model = getattr(transformers, architecture)(tiny_models.bert_config())
    model.save_pretrained(tmp_path / "model")
    truncate(ModelLocation(str(tmp_path / "model")), tmp_path / "out", TruncateRequest(rank=RANK))
    for part in ("adapter", "tail"):
        adapted = PeftModel.from_pretrained(load(tmp_path / "model"), tmp_path / "out" / part)
        assert close(logits(adapted), logits(load(tmp_path / "out" / "base")), 1e-4)


def test_the_residual_start_is_the_original(tmp_path: Path) -> None:
    case = made("llama", tmp_path, diag_init="residual", use_rslora=True, alpha=5.0)
    model = PeftModel.from_pretrained(case.truncated(), case.out / "adapter")
    assert close(logits(model), logits(case.original()), 1e-5)
    assert not close(logits(case.truncated()), logits(case.original()), 1e-4)


def test_a_base_in_bfloat16(tmp_path: Path) -> None:
    tiny_models.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    report = truncate(ModelLocation(str(tmp_path / "model")), tmp_path / "out", TruncateRequest(rank=RANK))
    case = Truncated("llama", tmp_path / "model", tmp_path / "out", report)
    config = LoraConfig(kasa_config=KasaConfig(), r=RANK, target_modules=case.modules)
    theirs, ours = get_peft_model(case.original(), config).base_model.model, case.truncated()
    for row in report.tensors:
        a, b = theirs.get_submodule(row.module).base_layer.weight, ours.get_submodule(row.module).weight
        assert a.dtype == b.dtype == torch.bfloat16
        step = 2**-7 * b.float().abs()  # one at the most: PEFT's sum in float32 rounds elsewhere
        assert ((a.float() - b.float()).abs() <= step + 1e-6 * row.sigma_max).all()
        assert (a != b).float().mean() < 0.01
    check_loaded(case, "adapter")
    tail = PeftModel.from_pretrained(case.original(), case.out / "tail")
    assert close(logits(tail).float(), logits(ours).float(), 0.03)


def test_the_tail_on_a_widened_original_is_a_base_stored_wide(tmp_path: Path) -> None:
    tiny_models.save("llama", tmp_path / "model", dtype=torch.bfloat16)
    truncate(
        ModelLocation(str(tmp_path / "model")), tmp_path / "out", TruncateRequest(rank=RANK, dtype="float32")
    )
    original = load(tmp_path / "model", dtype=torch.float32)
    tail = PeftModel.from_pretrained(original, tmp_path / "out/tail")
    assert close(logits(tail), logits(load(tmp_path / "out/base")), 1e-5)


def test_the_tail_has_one_rank_where_the_published_rule_drops_less(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(**{**tiny_models.TEXT, "intermediate_size": 33})
    model = transformers.LlamaForCausalLM(config)
    tiny_models.fill(model)
    model.save_pretrained(tmp_path / "model")
    report = truncate(
        ModelLocation(str(tmp_path / "model")),
        tmp_path / "out",
        TruncateRequest(rank=RANK, compat="reference"),
    )
    dropped = {row.module: row.truncation_rank for row in report.tensors}
    by_type = {module.split(".")[-1]: t for module, t in dropped.items()}
    assert by_type == {
        "q_proj": 3,
        "o_proj": 3,
        "gate_proj": 3,
        "up_proj": 3,
        "down_proj": 2,
        "k_proj": 0,
        "v_proj": 0,
    }
    tail = PeftModel.from_pretrained(load(tmp_path / "model"), tmp_path / "out/tail")
    assert wrapped(tail) == sorted(module for module in dropped if dropped[module])
    assert close(logits(tail), logits(load(tmp_path / "out/base")), 1e-5)
    written = load_file(tmp_path / "out/tail/adapter_model.safetensors")
    assert {len(A) for name, A in written.items() if "lora_A" in name} == {RANK}
    down = {name: tensor for name, tensor in written.items() if "down_proj" in name}
    padding = [tensor[2:] if "lora_A" in name else tensor[:, 2:] for name, tensor in down.items()]
    assert padding and not any(part.any() for part in padding)


class Twice(nn.Module):
    """`vision.layers.0.fc` ends with `layers.0.fc`, so PEFT's lists of names would match it too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(8, 8), "out": nn.Linear(8, 6)})])
        self.vision = nn.ModuleDict({"layers": copy.deepcopy(self.layers)})


@pytest.mark.parametrize("excludes", [("vision.*",), ("vision.*", "layers.0.out")])
def test_names_that_end_other_names_become_a_pattern(excludes: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    torch.manual_seed(0)
    save_file(Twice().state_dict(), tmp_path / "model/model.safetensors", {"format": "pt"})
    (tmp_path / "model/config.json").write_text('{"model_type": "of nobody"}')
    options = TruncateRequest(rank=2, patterns=Patterns(excludes=excludes))
    report = truncate(ModelLocation(str(tmp_path / "model")), tmp_path / "out", options)
    modules = sorted(row.module for row in report.tensors)
    assert modules == (["layers.0.fc"] if len(excludes) > 1 else ["layers.0.fc", "layers.0.out"])
    for part in ("adapter", "tail"):
        config = json.loads((tmp_path / "out" / part / "adapter_config.json").read_text())
        assert isinstance(config["target_modules"], str)
        assert wrapped(PeftModel.from_pretrained(Twice(), tmp_path / "out" / part)) == modules


def test_names_that_end_no_other_stay_a_list(tmp_path: Path) -> None:
    case = made("llama", tmp_path)
    config = json.loads((case.out / "adapter/adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == case.modules
