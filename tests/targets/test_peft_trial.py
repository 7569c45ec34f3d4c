"""The modules that PEFT wraps, for each family and each way to export a selection."""

import json
import random
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, __version__, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kasa_cli.errors import IntegrityError, UsageError
from kasa_cli.model_names import meta_model
from kasa_cli.targets import peft_trial, trainer_configs
from kasa_cli.targets.trainer_configs import EMISSIONS, FORMATS, Chosen
from tests.builders import tiny_models
from tests.builders.checkpoints import logits, shapes_of

PEFT = f"peft {__version__}"

# PEFT warns of tied heads and of the layout of a Conv1D; here only the wrapped modules matter
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
]


def config_of(model: PreTrainedModel) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    return {**config, "architectures": [type(model).__name__]}


@cache
def everything(family: str) -> Chosen:
    """All modules and parameters of a family that can be chosen."""
    model = tiny_models.build(family)
    maps = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    experts = [name for name, p in model.named_parameters() if p.ndim == 3 and ".experts." in name]
    return Chosen(
        modules=tuple(name for name, m in maps.items() if type(m) in (nn.Linear, Conv1D)),
        parameters=tuple(experts),
        all_modules=tuple(maps),
        config=config_of(model),
        model_class=type(model).__name__,
        rank=2,
        alpha=4.0,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in maps.values()),
    )


def some(family: str, num_modules: int, num_parameters: int, seed: int = 0) -> Chosen:
    whole, chance = everything(family), random.Random(f"{family} {num_modules} {num_parameters} {seed}")
    modules = chance.sample(whole.modules, min(num_modules, len(whole.modules)))
    parameters = chance.sample(whole.parameters, min(num_parameters, len(whole.parameters)))
    return replaced(whole, modules=tuple(modules), parameters=tuple(parameters))


def replaced(chosen: Chosen, **changes: Any) -> Chosen:
    return Chosen(**{**vars(chosen), **changes})


def selections(family: str) -> Iterator[Chosen]:
    yield some(family, 1, 0)
    yield some(family, 5, 0)
    yield some(family, 24, 0)  # PEFT shortens lists of 20 names or more
    leaf = some(family, 1, 0, seed=1).modules[0].rpartition(".")[2]
    whole = everything(family)
    alike = tuple(module for module in whole.modules if module.endswith(leaf))
    yield replaced(whole, modules=alike, parameters=())
    if whole.parameters:
        yield some(family, 4, 1)
        yield some(family, 0, 2)


def tried(family: str, chosen: Chosen, lora: dict[str, Any]) -> str | None:
    return peft_trial.check(chosen, lora, chosen.config, shapes_of(tiny_models.build(family).state_dict()))


@pytest.mark.parametrize("kind", EMISSIONS)
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_peft_wraps_what_was_chosen_or_there_is_no_hand_off(family: str, kind: str) -> None:
    for chosen in selections(family):
        if chosen.parameters and kind in ("llamafactory", "regex"):
            with pytest.raises(UsageError, match=f"parameters: {chosen.parameters[0]}: use --emit peft"):
                EMISSIONS[kind](chosen)
            continue
        unchecked = FORMATS[kind].write(chosen)
        lora = trainer_configs.lora_config(kind, unchecked, chosen)
        try:
            text = EMISSIONS[kind](chosen)
        except UsageError:
            with pytest.raises(IntegrityError):  # no selection that PEFT accepts is refused
                tried(family, chosen, lora)
            assert kind in ("llamafactory", "regex"), chosen
        else:
            assert text == unchecked
            assert tried(family, chosen, lora) == PEFT


def independent(model: nn.Module) -> tuple[set[str], set[str]]:
    """The modules that are wrapped in a real model, determined by another method than the trial's."""
    modules, parameters = set(), set()
    for name, module in model.named_modules():
        path = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        if isinstance(module, ParamWrapper) and module.get_param().ndim == 3:
            parameters.add(f"{path}.{module.parameter_name}")
        elif isinstance(module, LoraLayer):
            modules.add(path)
    return modules, parameters


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_json_is_a_lora_config_that_trains_exactly_the_selection(family: str, tmp_path: Path) -> None:
    chosen = some(family, 6, 2, seed=2)
    text = EMISSIONS["peft"](chosen)
    (tmp_path / "adapter_config.json").write_text(text)
    plain, saved = LoraConfig(**json.loads(text)), LoraConfig.from_pretrained(tmp_path)
    assert plain == saved
    model = get_peft_model(tiny_models.fresh(family), saved)
    assert independent(model) == (set(chosen.modules), set(chosen.parameters))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(chosen.modules + chosen.parameters)
    assert {module.r["default"] for module in model.modules() if isinstance(module, LoraLayer)} == {2}
    assert logits(model).isfinite().all()
    model.save_pretrained(tmp_path / "trained")
    again = PeftModel.from_pretrained(tiny_models.fresh(family), tmp_path / "trained")
    assert independent(again) == independent(model)


@pytest.mark.parametrize("family", ["deepseek-v2", "deepseek-v3", "mixtral", "qwen3-moe", "olmoe"])
def test_a_pattern_is_handed_off_only_where_its_last_names_say_the_same(family: str) -> None:
    whole = everything(family)
    alike = tuple(module for module in whole.modules if module.endswith("o_proj"))
    chosen = replaced(whole, modules=alike, parameters=())
    assert (
        tried(family, chosen, trainer_configs.lora_config("regex", EMISSIONS["regex"](chosen), chosen))
        == PEFT
    )
    with pytest.raises(UsageError, match=r"layers\.1\.self_attn\.o_proj would be taken too: use --emit peft"):
        EMISSIONS["regex"](replaced(chosen, modules=alike[:1]))


@pytest.mark.parametrize("kind", ["peft", "axolotl", "names"])
def test_a_module_with_an_experts_name_goes_by_its_weight(kind: str) -> None:
    down = "model.layers.0.mlp.down_proj"
    chosen = replaced(some("deepseek-v3", 3, 2), modules=("model.layers.1.self_attn.o_proj", down))
    text = EMISSIONS[kind](chosen)
    assert f"{down}.weight" in text
    assert tried("deepseek-v3", chosen, trainer_configs.lora_config(kind, text, chosen)) == PEFT
    bare = {"r": 2, "target_modules": list(chosen.modules), "target_parameters": list(chosen.parameters)}
    with pytest.raises(IntegrityError, match=f"leaves out {down}"):
        tried("deepseek-v3", chosen, bare)
    with pytest.raises(UsageError, match=f"{down} would be lost: use --emit peft"):
        EMISSIONS["llamafactory"](replaced(chosen, parameters=()))


def test_llamafactory_would_leave_out_the_eye_unless_told() -> None:
    chosen = some("gemma3-vlm", 24, 0)
    text = EMISSIONS["llamafactory"](chosen)
    assert any("vision_tower" in module for module in chosen.modules)
    assert "freeze_vision_tower: false\n" in text
    assert "freeze_multi_modal_projector: false\n" in text


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"target_modules": ["q_proj"]}, r"takes model\.layers\.1\.self_attn\.q_proj"),
        ({"target_modules": ["model.layers.0.mlp.up_proj"]}, "leaves out .*q_proj and takes .*up_proj"),
        ({"target_modules": ["nowhere"]}, "refuses the selection: .*not found in the base model"),
        ({"target_modules": r"(model\.layers"}, "refuses the selection: .*unterminated"),
        ({"target_modules": ["embed_tokens"], "r": 0}, "refuses the selection: ValueError: `r` should be"),
        ({"target_modules": ["norm"]}, "refuses the selection: ValueError: Target module LlamaRMSNorm"),
        ({"of_nobody": 1}, "refuses the selection: TypeError: .*of_nobody"),
        ({}, "takes .*v_proj"),  # PEFT replaces names for this family
    ],
)
def test_a_wrong_hand_off_is_an_error_that_names_the_module(lora: dict[str, Any], said: str) -> None:
    chosen = replaced(everything("llama"), modules=("model.layers.0.self_attn.q_proj",))
    with pytest.raises(IntegrityError, match=said) as raised:
        tried("llama", chosen, lora)
    assert str(raised.value).startswith(PEFT)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("parameter", ["gate_up_proj", "down_proj"])
def test_a_parameter_too_few_or_too_many_is_an_error(parameter: str) -> None:
    experts = "model.layers.0.mlp.experts"
    both = {"target_modules": [], "target_parameters": [f"{experts}.gate_up_proj", f"{experts}.down_proj"]}
    one = {**both, "target_parameters": [f"{experts}.{parameter}"]}
    two_chosen = replaced(everything("gpt-oss"), modules=(), parameters=tuple(both["target_parameters"]))
    one_chosen = replaced(two_chosen, parameters=tuple(one["target_parameters"]))
    assert tried("gpt-oss", two_chosen, both) == tried("gpt-oss", one_chosen, one) == PEFT
    with pytest.raises(IntegrityError, match=rf"leaves out {experts}\."):
        tried("gpt-oss", two_chosen, one)
    with pytest.raises(IntegrityError, match=rf"takes {experts}\."):
        tried("gpt-oss", one_chosen, both)


def test_a_matrix_wrapped_as_a_parameter_counts_as_its_module() -> None:
    lora = {"target_modules": [], "target_parameters": ["model.layers.0.self_attn.q_proj.weight"]}
    model = tiny_models.build("llama")
    assert peft_trial.wrapped(config_of(model), shapes_of(model.state_dict()), lora) == (
        frozenset({"model.layers.0.self_attn.q_proj"}),
        frozenset(),
    )


def test_a_router_that_gives_back_more_than_a_product_is_refused() -> None:
    router = "model.layers.0.feed_forward.router"
    whole = everything("llama4-text")
    assert router in whole.all_modules
    chosen = replaced(whole, modules=(router,), parameters=())
    with pytest.raises(IntegrityError, match=f"cannot train a Llama4Router: {router}: --exclude router"):
        tried("llama4-text", chosen, {"target_modules": [router]})
    model = tiny_models.fresh("llama4-text")
    with pytest.raises(AttributeError):  # the error that the trial prevents
        logits(get_peft_model(model, LoraConfig(target_modules=[router])))


def test_no_weight_is_allocated_and_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    kept = []
    build = meta_model.build
    monkeypatch.setattr(meta_model, "build", lambda *args: kept.append(build(*args)) or kept[0])
    chosen = some("gpt2", 3, 0)
    lora = {"target_modules": list(chosen.modules), "fan_in_fan_out": False}  # PEFT would warn
    assert tried("gpt2", chosen, lora) == PEFT
    assert {p.device.type for p in kept[0].parameters()} == {"meta"}
    assert capfd.readouterr() == ("", "")


def test_without_peft_there_is_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    chosen = some("llama", 3, 0)
    text = EMISSIONS["peft"](chosen)
    assert tried("llama", chosen, trainer_configs.lora_config("peft", text, chosen)) is None


def test_without_a_model_there_is_no_trial() -> None:
    chosen = replaced(some("llama", 3, 0), config={"model_type": "of nobody"}, model_class=None)
    for kind in EMISSIONS:
        lora = trainer_configs.lora_config(kind, EMISSIONS[kind](chosen), chosen)
        assert tried("llama", chosen, lora) is None


def test_what_no_lora_can_be_put_on_is_named() -> None:
    sizes = {"vocab_size": 96, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "bos_token_id": 1}
    with torch.device("meta"):
        model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    modules = ("backbone.layers.0.mixer.out_proj", "backbone.layers.0.mixer.in_proj")
    config = config_of(model)
    chosen = replaced(everything("llama"), config=config, modules=modules, all_modules=modules)
    with pytest.raises(UsageError, match=f"refuses any LoRA on: {modules[0]}: --exclude out_proj"):
        EMISSIONS["names"](chosen)
    with pytest.raises(IntegrityError, match="incompatible with Mamba"):
        peft_trial.check(chosen, {"target_modules": list(modules)}, config, shapes_of(model.state_dict()))
