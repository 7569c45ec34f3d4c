"""PEFT as the oracle: it computes the same base, loads adapter and tail, and wraps the modules of the report."""

import dataclasses
import json
import shutil
from collections.abc import Iterator

import pytest
import torch
from peft import KasaConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file

from kasa_cli.pipeline.truncating.run import Patterns
from tests.builders import tiny_models
from tests.builders.adapters import fill_b, wrapped
from tests.builders.checkpoints import logits
from tests.builders.matrices import close
from tests.builders.truncated import EXPERTS, RANK, REWRITTEN, Truncated, made

# every warning is an error: missing keys, unknown keyword arguments, patterns without a match
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

NO_KASA = {"gpt2"}


@pytest.fixture(scope="module", params=tiny_models.FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Truncated]:
    """A family's output; PEFT supports a KaSA adapter on all its targets, except for GPT-2."""
    folder = tmp_path_factory.mktemp(request.param)
    excludes = EXPERTS if request.param in REWRITTEN else ()
    yield made(request.param, folder, patterns=Patterns(excludes=excludes))
    shutil.rmtree(folder)


@pytest.fixture
def kasa_case(case: Truncated) -> Truncated:
    if case.family in NO_KASA:
        pytest.skip("PEFT has no KaSA for Conv1D")
    return case


def test_peft_makes_the_same_base(kasa_case: Truncated) -> None:
    config = LoraConfig(kasa_config=KasaConfig(), r=RANK, target_modules=kasa_case.modules)
    theirs = get_peft_model(kasa_case.original(), config).base_model.model
    ours = kasa_case.truncated()
    assert wrapped(theirs) == kasa_case.modules
    for row in kasa_case.report.tensors:
        difference = (
            theirs.get_submodule(row.module).base_layer.weight - ours.get_submodule(row.module).weight
        )
        assert difference.abs().max() <= 1e-5 * row.sigma_max, row.module


def test_the_adapter_is_the_same_on_the_original_and_on_the_base(kasa_case: Truncated) -> None:
    folder = kasa_case.out / "adapter"
    models = [
        PeftModel.from_pretrained(base, folder) for base in (kasa_case.original(), kasa_case.truncated())
    ]
    assert [wrapped(model) for model in models] == [kasa_case.modules] * 2
    assert close(logits(models[0]), logits(models[1]), 1e-4)
    plain = logits(models[0])
    for model in models:
        fill_b(model)
    assert close(logits(models[0]), logits(models[1]), 1e-4)
    assert not close(logits(models[0]), plain, 1e-2)


def test_the_adapter_starts_at_the_truncated_base(kasa_case: Truncated) -> None:
    model = PeftModel.from_pretrained(kasa_case.truncated(), kasa_case.out / "adapter")
    assert close(logits(model), logits(kasa_case.truncated()), 1e-5)


def test_the_tail_turns_the_original_into_the_base(case: Truncated) -> None:
    before, after = logits(case.original()), logits(case.truncated())
    model = PeftModel.from_pretrained(case.original(), case.out / "tail")
    assert wrapped(model) == case.modules
    assert close(logits(model), after, 1e-5) and not close(before, after, 1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("part", ["adapter", "tail"])
def test_what_is_loaded_is_what_was_written(case: Truncated, part: str) -> None:
    if part == "adapter" and case.family in NO_KASA:
        pytest.skip("PEFT has no KaSA for Conv1D")
    model = PeftModel.from_pretrained(case.original(), case.out / part)
    loaded = get_peft_model_state_dict(model)
    written = load_file(case.out / part / "adapter_model.safetensors")
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[name], written[name]) for name in written)
    fields = {f"base_model.model.{m}.lora_{end}" for m in case.modules for end in ("A.weight", "B.weight")}
    fields |= {f"base_model.model.{m}.lora_diag" for m in case.modules if part == "adapter"}
    assert written.keys() == fields


@pytest.mark.parametrize("part", ["adapter", "tail"])
def test_peft_knows_every_key_of_the_config(case: Truncated, part: str) -> None:
    config = json.loads((case.out / part / "adapter_config.json").read_text())
    assert config.keys() <= {field.name for field in dataclasses.fields(LoraConfig)}
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (RANK, {}, {})
    assert config["lora_alpha"] == (RANK if part == "tail" else 2 * RANK)
    loaded = LoraConfig.from_pretrained(case.out / part)
    assert isinstance(loaded.kasa_config, KasaConfig) == (part == "adapter")
