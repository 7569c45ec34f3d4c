"""The texts of `--emit`: read back as its trainer reads it, each means the selection, or it is not written."""

import itertools
import json
import re
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kasa_cli.errors import UsageError
from kasa_cli.targets import trainer_configs
from kasa_cli.targets.trainer_configs import EMISSIONS, FORMATS, Chosen, matched, pattern

LAYERS = [f"model.layers.{i}.{part}" for i in range(12) for part in ("self_attn.q_proj", "mlp.up_proj")]
EXPERTS = ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj")
CONFIG = {"model_type": "llama"}
EYE = {"model_type": "gemma3", "vision_config": {"model_type": "siglip_vision_model"}, "text_config": {}}


def chosen(*modules: str, others: Any = LAYERS, **changes: Any) -> Chosen:
    given: dict[str, Any] = {"parameters": (), "config": CONFIG, "model_class": "LlamaForCausalLM"}
    given |= {"rank": 8, "alpha": 16.0, "fan_in_fan_out": False, **changes}
    return Chosen(modules=modules, all_modules=tuple(dict.fromkeys([*others, *modules])), **given)


def test_names_stand_one_a_line_best_first_parameters_last() -> None:
    text = EMISSIONS["names"](chosen(LAYERS[7], LAYERS[2], parameters=EXPERTS))
    assert text.splitlines() == [LAYERS[7], LAYERS[2], *EXPERTS]
    assert text.endswith("\n")


def test_the_json_is_for_training_and_keeps_the_order() -> None:
    lora = json.loads(EMISSIONS["peft"](chosen(LAYERS[7], LAYERS[2], parameters=EXPERTS, alpha=2.5)))
    assert lora == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 8,
        "lora_alpha": 2.5,
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "bias": "none",
        "inference_mode": False,
        "target_modules": [LAYERS[7], LAYERS[2]],
        "target_parameters": list(EXPERTS),
    }


def test_without_modules_the_list_is_empty_and_without_parameters_there_is_none() -> None:
    assert json.loads(EMISSIONS["peft"](chosen(parameters=EXPERTS)))["target_modules"] == []
    assert json.loads(EMISSIONS["peft"](chosen(LAYERS[0])))["target_parameters"] is None


@pytest.mark.parametrize("name", ["BertModel", "ViTForImageClassification", None])
def test_a_class_that_peft_has_no_task_for_gets_none(name: str | None) -> None:
    assert json.loads(EMISSIONS["peft"](chosen(LAYERS[0], model_class=name)))["task_type"] is None


def test_the_keys_of_axolotl() -> None:
    text = EMISSIONS["axolotl"](chosen(LAYERS[7], LAYERS[2], parameters=EXPERTS))
    assert yaml.safe_load(text) == {
        "adapter": "lora",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0,
        "lora_target_modules": [LAYERS[7], LAYERS[2]],
        "lora_target_parameters": list(EXPERTS),
    }
    turned = yaml.safe_load(EMISSIONS["axolotl"](chosen(LAYERS[7], fan_in_fan_out=True)))
    assert turned["lora_fan_in_fan_out"] is True
    assert "lora_target_parameters" not in turned


def test_the_keys_of_llamafactory() -> None:
    assert yaml.safe_load(EMISSIONS["llamafactory"](chosen(LAYERS[7], LAYERS[2]))) == {
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "lora_target": f"{LAYERS[7]},{LAYERS[2]}",
    }


def test_llamafactory_is_told_not_to_leave_parts_of_a_model_out() -> None:
    text = EMISSIONS["llamafactory"](chosen(LAYERS[7], config=EYE))
    assert yaml.safe_load(text)["freeze_vision_tower"] is False
    assert yaml.safe_load(text)["freeze_multi_modal_projector"] is False
    packed = {**CONFIG, "quantization_config": {}}
    assert "freeze" not in EMISSIONS["llamafactory"](chosen(LAYERS[7], config=packed))


def test_llamafactory_searches_names_within_names_where_a_model_has_parts() -> None:
    gate, longer = "model.layers.0.gate", "model.layers.0.gate_two"
    assert EMISSIONS["llamafactory"](chosen(gate, others=[longer]))
    with pytest.raises(UsageError, match=f"{longer} would be taken too: use --emit peft"):
        EMISSIONS["llamafactory"](chosen(gate, others=[longer], config=EYE))
    assert EMISSIONS["peft"](chosen(gate, others=[longer], config=EYE))
    assert EMISSIONS["llamafactory"](chosen(gate, longer, config=EYE))


def test_llamafactory_never_adapts_some_parts() -> None:
    module = "model.visual.patch_embed.proj"
    assert EMISSIONS["llamafactory"](chosen(module))
    with pytest.raises(UsageError, match=f"does not adapt: {module}"):
        EMISSIONS["llamafactory"](chosen(module, config=EYE))


@pytest.mark.parametrize("kind", ["axolotl", "llamafactory"])
@pytest.mark.parametrize("alpha", [2.5, 0.0, -1.0, float("inf"), float("nan")])
def test_an_alpha_that_a_trainer_cannot_take_is_refused(kind: str, alpha: float) -> None:
    with pytest.raises(UsageError, match="whole number for lora_alpha"):
        EMISSIONS[kind](chosen(LAYERS[0], alpha=alpha))


@pytest.mark.parametrize(
    ("kind", "said"), [("regex", "a pattern cannot name"), ("llamafactory", "no key for")]
)
def test_what_cannot_name_parameters_says_so(kind: str, said: str) -> None:
    with pytest.raises(UsageError, match=f"{said} parameters: {EXPERTS[0]}: use --emit peft"):
        EMISSIONS[kind](chosen(LAYERS[0], parameters=EXPERTS))


@pytest.mark.parametrize("kind", EMISSIONS)
def test_nothing_chosen_is_refused(kind: str) -> None:
    with pytest.raises(UsageError, match="nothing was chosen"):
        EMISSIONS[kind](chosen())


TRAP = ["layers.0.fc", "vision.layers.0.fc"]


@pytest.mark.parametrize("kind", ["peft", "axolotl", "regex"])
def test_a_name_that_ends_another_becomes_a_pattern(kind: str) -> None:
    selection = chosen(TRAP[0], others=TRAP)
    lora = trainer_configs.lora_config(kind, EMISSIONS[kind](selection), selection)
    assert isinstance(lora["target_modules"], str)
    assert matched(lora, selection) == {TRAP[0]}


@pytest.mark.parametrize("kind", ["names", "llamafactory"])
def test_a_name_that_ends_another_is_refused_where_there_are_names_only(kind: str) -> None:
    with pytest.raises(UsageError, match="use --emit peft"):
        EMISSIONS[kind](chosen(TRAP[0], others=TRAP))
    assert EMISSIONS[kind](chosen(*TRAP))


def test_a_name_that_ends_another_has_no_way_out_where_patterns_become_last_names() -> None:
    with pytest.raises(UsageError, match=r"vision\.layers\.0\.fc would be taken too: leave such modules out"):
        EMISSIONS["peft"](chosen(TRAP[0], others=TRAP, config={"model_type": "qwen3_moe"}))


STRANGE = ["a[b.0.c", "a.b", "a+b", "axb", "(x|y)", "$0", "${HOME}", "w^2", "all", "a\\d", "ünü.1", "1.2.3"]


@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.parametrize("kind", EMISSIONS)
def test_a_name_may_hold_any_sign(name: str, kind: str) -> None:
    selection = chosen(name, others=[*STRANGE, "q_proj"])
    if kind == "llamafactory" and name not in ("a.b", "axb", "ünü.1", "1.2.3"):
        with pytest.raises(UsageError, match="cannot read the name"):
            EMISSIONS[kind](selection)
        return
    lora = trainer_configs.lora_config(kind, EMISSIONS[kind](selection), selection)
    assert matched(lora, selection) == {name}
    if kind == "axolotl" and isinstance(lora["target_modules"], list):
        assert all(re.compile(entry) for entry in lora["target_modules"])  # as axolotl does


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb", "a\rb", "a\u2028b"])
def test_no_name_reaches_the_terminal_as_a_command(name: str) -> None:
    for kind in ("names", "regex"):
        with pytest.raises(UsageError, match="cannot print the name"):
            EMISSIONS[kind](chosen(name))
    for kind in ("peft", "axolotl"):
        text = EMISSIONS[kind](chosen(name))
        assert all(line.isprintable() for line in text.split("\n"))
        assert matched(trainer_configs.lora_config(kind, text, chosen(name)), chosen(name)) == {name}


def test_a_pattern_spells_names_that_differ_in_their_layer_once() -> None:
    assert pattern([LAYERS[20], LAYERS[1], LAYERS[4]]) == (
        r"model\.layers\.(?:2|10)\.self_attn\.q_proj|model\.layers\.0\.mlp\.up_proj"
    )


def test_only_the_first_number_of_a_name_is_its_layer() -> None:
    names = [f"decoder.block.{i}.layer.{j}.wo" for i in (0, 1) for j in (1, 2)]
    assert pattern(names) == r"decoder\.block\.(?:0|1)\.layer\.1\.wo|decoder\.block\.(?:0|1)\.layer\.2\.wo"


PARTS = st.sampled_from(["a", "b", "ab", "0", "1", "01", "10", "fc", "q+", "x|y", "layers"])
PATHS = st.lists(PARTS, min_size=1, max_size=4).map(".".join)


@given(paths=st.sets(PATHS, min_size=1, max_size=12), data=st.data())
@settings(deadline=None, max_examples=200)
def test_whatever_is_handed_off_means_the_selection(paths: set[str], data: st.DataObject) -> None:
    names = sorted(paths)
    modules = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    model_type = data.draw(st.sampled_from(["llama", "qwen3_moe", "mixtral"]))
    selection = chosen(*modules, others=names, config={"model_type": model_type})
    for kind in FORMATS:
        try:
            text = EMISSIONS[kind](selection)
        except UsageError:
            assert kind != "regex" or model_type != "llama"  # a pattern can always express the selection
            continue
        assert matched(trainer_configs.lora_config(kind, text, selection), selection) == set(modules)


@pytest.mark.parametrize("count", [19, 20, 24])
def test_a_pattern_matches_its_names_and_no_other(count: int) -> None:
    picked = list(itertools.islice(LAYERS, 0, count))
    assert {name for name in LAYERS if re.fullmatch(pattern(picked), name)} == set(picked)
