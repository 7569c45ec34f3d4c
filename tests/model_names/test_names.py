"""The names of `model_names.name_map` against transformers itself, which loads each family from the same folder."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kasa_cli import commands as commands_package
from kasa_cli.errors import InvalidInput
from kasa_cli.model_names.name_map import map_names
from kasa_cli.model_names.names import ModuleKind, NameMap, Slot
from tests.builders import tiny_models
from tests.builders.checkpoints import config_of, load, rewritten, shapes_of

Tensors = dict[str, torch.Tensor]

# family: linear maps in blocks (Conv1D for GPT-2), routers and shared gates, tensors that fill fused experts
EXPECTED = {
    "llama": (14, 0, 0),
    "llama-tied": (14, 0, 0),
    "qwen2": (14, 0, 0),
    "gemma3": (14, 0, 0),
    "gemma3-vlm": (26, 0, 0),
    "phi3": (8, 0, 0),
    "gpt2": (8, 0, 0),
    "gpt-neox": (8, 0, 0),
    "bert": (12, 0, 0),
    "bert-mlm": (12, 0, 0),
    "t5": (32, 0, 0),
    "whisper": (32, 0, 0),
    "vit": (12, 0, 0),
    "mixtral": (8, 2, 24),
    "qwen2-moe": (14, 2, 12),
    "qwen3-moe": (8, 2, 24),
    "deepseek-v2": (16, 1, 12),
    "deepseek-v3": (16, 1, 12),
    "granite-moe": (8, 2, 4),
    "gpt-oss": (8, 2, 8),
    "llama4-text": (14, 2, 4),
    "olmoe": (8, 2, 24),
    "jamba": (11, 1, 12),
}

TIED = {
    "llama-tied": {"model.embed_tokens.weight": "lm_head"},
    "gemma3": {"model.embed_tokens.weight": "lm_head"},
    "gemma3-vlm": {"language_model.model.embed_tokens.weight": "lm_head"},
    "gpt2": {"transformer.wte.weight": "lm_head"},
    "bert-mlm": {
        "bert.embeddings.word_embeddings.weight": "cls.predictions.decoder",
        "cls.predictions.bias": "cls.predictions.decoder",
    },
    "t5": {"shared.weight": "lm_head"},
    "whisper": {"model.decoder.embed_tokens.weight": "proj_out"},
}


def mapped(directory: Path) -> tuple[Tensors, NameMap]:
    tensors = load_file(directory / "model.safetensors")
    return tensors, map_names(config_of(directory), shapes_of(tensors))


def held(model: PreTrainedModel, slot: Slot) -> torch.Tensor:
    tensor = getattr(model.get_submodule(slot.module), slot.parameter)
    assert isinstance(tensor, torch.Tensor)
    return tensor


@pytest.fixture(params=EXPECTED)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def directory(family: str, tmp_path: Path) -> Path:
    return tiny_models.save(family, tmp_path)


# --- the contract, family by family ---


def test_every_family_is_specified() -> None:
    assert EXPECTED.keys() == tiny_models.FAMILIES.keys()


def test_a_slot_holds_what_the_loader_puts_there(directory: Path) -> None:
    tensors, names = mapped(directory)
    model = load(directory)
    assert names.slots.keys() == tensors.keys()
    assert (names.model_class, names.note) == (type(model).__name__, None)
    for name, slot in names.slots.items():
        if slot.kind != ModuleKind.EXPERTS:
            assert torch.equal(held(model, slot), tensors[name]), name


def test_fused_experts_hold_every_entry_of_their_tensors(directory: Path) -> None:
    tensors, names = mapped(directory)
    model = load(directory)
    parts: dict[tuple[str, str], list[torch.Tensor]] = {}
    for name, slot in names.slots.items():
        if slot.kind == ModuleKind.EXPERTS:
            parts.setdefault((slot.module, slot.parameter), []).append(tensors[name].flatten())
    for (module, parameter), entries in parts.items():
        fused = getattr(model.get_submodule(module), parameter)
        assert torch.equal(torch.cat(entries).sort().values, fused.flatten().sort().values), module


def test_every_linear_map_of_a_block_is_covered(directory: Path) -> None:
    names = mapped(directory)[1]
    linear = [
        path for path, module in load(directory).named_modules() if isinstance(module, nn.Linear | Conv1D)
    ]
    assert names.linear_modules == tuple(linear)
    matrices = {ModuleKind.LINEAR, ModuleKind.CONV1D, ModuleKind.ROUTER}
    covered = {s.module for s in names.slots.values() if s.kind in matrices and s.in_block}
    assert covered >= {path for path in linear if any(part.isdecimal() for part in path.split("."))}


def test_kinds_are_counted(family: str, directory: Path) -> None:
    slots = mapped(directory)[1].slots.values()
    linear, absent = (
        (ModuleKind.CONV1D, ModuleKind.LINEAR) if family == "gpt2" else (ModuleKind.LINEAR, ModuleKind.CONV1D)
    )
    weights = [slot.kind for slot in slots if slot.in_block and slot.parameter == "weight"]
    routers = {slot.module for slot in slots if slot.kind == ModuleKind.ROUTER}
    experts = [slot for slot in slots if slot.kind == ModuleKind.EXPERTS]
    assert (weights.count(linear), len(routers), len(experts)) == EXPECTED[family]
    assert absent not in weights


def test_what_the_loader_ties_is_flagged(family: str, directory: Path) -> None:
    names = mapped(directory)[1]
    model = load(directory)
    tied = {name: slot.tied_with for name, slot in names.slots.items() if slot.tied_with is not None}
    assert tied == TIED.get(family, {})
    for name, other in tied.items():
        slot = names.slots[name]
        assert held(model, slot) is getattr(model.get_submodule(str(other)), slot.parameter)


def test_the_output_head_is_no_ordinary_linear_map(tmp_path: Path) -> None:
    slot = mapped(tiny_models.save("llama", tmp_path))[1].slots["lm_head.weight"]
    assert slot == Slot("lm_head", "weight", ModuleKind.HEAD, in_block=False, tied_with=None)


def test_a_task_head_is_a_linear_map_outside_blocks(tmp_path: Path) -> None:
    slot = mapped(tiny_models.save("vit", tmp_path))[1].slots["classifier.weight"]
    assert (slot.kind, slot.in_block) == (ModuleKind.LINEAR, False)


# --- other writers of the same families ---


def gpt2_as_on_the_hub(tensors: Tensors) -> Tensors:
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    return {**bare, "h.0.attn.bias": torch.ones(1, 1, 32, 32).tril()}


def bert_of_tensorflow(tensors: Tensors) -> Tensors:
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    return {
        name.replace(last := ".".join(name.split(".")[-2:]), old.get(last, last)): t
        for name, t in tensors.items()
    }


def llama_without_its_prefix(tensors: Tensors) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def llama_with_frequencies(tensors: Tensors) -> Tensors:
    return {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}


def deepseek_with_a_layer_to_predict_ahead(tensors: Tensors) -> Tensors:
    return {**tensors, "model.layers.2.eh_proj.weight": torch.ones(32, 64)}


WRITERS: dict[str, tuple[str, Callable[[Tensors], Tensors], set[str]]] = {
    "gpt2 of the Hub": ("gpt2", gpt2_as_on_the_hub, {"h.0.attn.bias"}),
    "bert of TensorFlow": ("bert-mlm", bert_of_tensorflow, set()),
    "bare llama": ("llama", llama_without_its_prefix, set()),
    "llama with frequencies": (
        "llama",
        llama_with_frequencies,
        {"model.layers.0.self_attn.rotary_emb.inv_freq"},
    ),
    "deepseek with MTP": (
        "deepseek-v3",
        deepseek_with_a_layer_to_predict_ahead,
        {"model.layers.2.eh_proj.weight"},
    ),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_other_writers_names_are_found(writer: str, tmp_path: Path) -> None:
    family, change, left_out = WRITERS[writer]
    tensors, names = mapped(rewritten(tiny_models.saved(family), tmp_path, change))
    model = load(tmp_path)
    for name, slot in names.slots.items():
        if name in left_out:
            assert (f"{slot.module}.{slot.parameter}", slot.kind) == (name, ModuleKind.OTHER)
        elif slot.kind != ModuleKind.EXPERTS:
            assert torch.equal(held(model, slot), tensors[name]), name


def test_experts_already_fused_on_disk_are_experts(tmp_path: Path) -> None:
    tensors, names = mapped(tiny_models.save("mixtral", tmp_path, save_original_format=False))
    assert tensors["model.layers.0.mlp.experts.down_proj"].dim() == 3
    assert names.slots["model.layers.0.mlp.experts.down_proj"] == Slot(
        "model.layers.0.mlp.experts", "down_proj", ModuleKind.EXPERTS, in_block=True, tied_with=None
    )


def test_both_ends_of_a_tie_know_each_other_if_the_config_ties_them(tmp_path: Path) -> None:
    tensors, names = mapped(tiny_models.save("llama", tmp_path))
    assert names.slots["lm_head.weight"].tied_with is None
    tied = map_names({**config_of(tmp_path), "tie_word_embeddings": True}, shapes_of(tensors))
    assert tied.slots["lm_head.weight"].tied_with == "model.embed_tokens"
    assert tied.slots["model.embed_tokens.weight"].tied_with == "lm_head"


def test_without_an_architecture_the_plain_model_is_meant(tmp_path: Path) -> None:
    tensors, _ = mapped(tiny_models.save("llama", tmp_path))
    config = {key: value for key, value in config_of(tmp_path).items() if key != "architectures"}
    names = map_names(config, shapes_of(tensors))
    assert names.model_class == "LlamaModel"
    assert names.slots["model.layers.1.mlp.up_proj.weight"].module == "layers.1.mlp.up_proj"
    assert names.slots["lm_head.weight"].kind == ModuleKind.OTHER


def test_packed_weights_may_have_any_shape(tmp_path: Path) -> None:
    tensors, _ = mapped(tiny_models.save("llama", tmp_path))
    name = "model.layers.0.mlp.up_proj.weight"
    shapes = {**shapes_of(tensors), name: (768, 1)}
    names = map_names({**config_of(tmp_path), "quantization_config": {"load_in_4bit": True}}, shapes)
    assert names.slots[name].kind == ModuleKind.LINEAR


# --- classes that transformers does not have ---

STRANGE = {
    "model.embed_tokens.weight": (96, 32),
    "model.layers.0.attn.q.weight": (32, 32),
    "model.layers.0.attn.q.bias": (32,),
    "model.layers.0.norm.weight": (32,),
    "model.layers.0.mlp.gate.weight": (4, 32),
    "model.layers.0.mlp.experts.3.w1.weight": (48, 32),
    "model.layers.0.mlp.experts.w2": (4, 32, 48),
    "model.patch.weight": (32, 3, 2, 2),
    "lm_head.weight": (96, 32),
}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": "nobody_knows"},
        {"model_type": ["llama"]},
        {"model_type": "llama", "architectures": ["CustomForCausalLM"]},
        {"model_type": "llama", "architectures": ["pipeline"]},
        {"model_type": "llama", "architectures": ["BertModel"]},
        {"model_type": "llava", "text_config": {"model_type": "nobody_knows"}},
        {"model_type": "maskformer", "backbone": "somebody/backbone"},
        {"model_type": "bert\x1b[2J"},
    ],
    ids=lambda config: "-".join(map(str, config.values())).encode("unicode_escape").decode() or "empty",
)
def test_unknown_classes_keep_their_names_and_say_so(config: dict[str, Any]) -> None:
    names = map_names(config, STRANGE)
    assert (names.model_class, names.linear_modules) == (None, ())
    assert names.note is not None
    assert names.note.isprintable()
    assert {f"{slot.module}.{slot.parameter}" for slot in names.slots.values()} == set(STRANGE)


def test_kinds_are_guessed_from_names_and_shapes() -> None:
    kinds = [(slot.kind, slot.in_block) for slot in map_names({}, STRANGE).slots.values()]
    assert kinds == [
        (ModuleKind.EMBEDDING, False),
        (ModuleKind.LINEAR, True),
        (ModuleKind.LINEAR, True),
        (ModuleKind.OTHER, True),
        (ModuleKind.ROUTER, True),
        (ModuleKind.LINEAR, True),
        (ModuleKind.EXPERTS, True),
        (ModuleKind.OTHER, False),
        (ModuleKind.HEAD, False),
    ]


# --- hostile configs ---


def nested(depth: int) -> dict[str, Any]:
    return {"inner": nested(depth - 1)} if depth else {}


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": math.inf},
        {"num_hidden_layers": "many"},
        {"num_attention_heads": 10**9},
        {"num_attention_heads": 0},
        {"hidden_size": -1},
        {"hidden_size": math.nan},
        {"hidden_size": 10**12},
        {"vocab_size": 10**18},
        {"num_labels": 10**9},
        {"max_position_embeddings": 10**12},
        {"id2label": 3},
        {"rope_parameters": {"rope_type": "nobody's"}},
        {"text_config": {"num_hidden_layers": 10**9}},
        {"deep": nested(40)},
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 10**9},
        {"model_type": "t5", "architectures": ["T5Model"], "num_decoder_layers": 10**9},
        {"model_type": "swin", "architectures": ["SwinModel"], "depths": [10**9, 2]},
        {"model_type": "distilbert", "architectures": ["DistilBertModel"], "max_position_embeddings": 10**7},
    ],
    ids=lambda change: "-".join(change),
)
def test_hostile_numbers_are_refused_at_once(change: dict[str, Any], tiny_llama: Path) -> None:
    tensors = load_file(tiny_llama / "model.safetensors")
    with pytest.raises(InvalidInput):
        map_names({**config_of(tiny_llama), **change}, shapes_of(tensors))


@pytest.mark.parametrize(
    "change",
    [
        {
            "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
            "trust_remote_code": True,
        },
        {"attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel"},
        {"experts_implementation": "evil/kernel", "_attn_implementation_internal": "evil/kernel"},
        {"vision_config": {"_attn_implementation": "evil/kernel", "auto_map": {"AutoModel": "evil.Model"}}},
        {"attribute_map": {"num_hidden_layers": "other"}, "other": 10**9},
        {"_name_or_path": "/etc/passwd", "name_or_path": "/etc/passwd", "__dict__": {}, "__class__": "x"},
        {"dtype": "evil", "torch_dtype": "load"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_names_code_or_files_changes_nothing(change: dict[str, Any], tiny_llama: Path) -> None:
    tensors = load_file(tiny_llama / "model.safetensors")
    config, shapes = config_of(tiny_llama), shapes_of(tensors)
    before = json.dumps(config)
    assert map_names({**config, **change}, shapes) == map_names(config, shapes)
    assert json.dumps(config) == before


@pytest.mark.parametrize(
    "name", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"]
)
def test_shapes_that_the_config_does_not_describe_are_refused(name: str, tiny_llama: Path) -> None:
    shapes = {**shapes_of(load_file(tiny_llama / "model.safetensors")), name: (97, 32)}
    with pytest.raises(InvalidInput, match=r"\(97, 32\)") as refusal:
        map_names(config_of(tiny_llama), shapes)
    assert name in str(refusal.value)


@pytest.mark.parametrize(
    "name", ["weight", "", "a..b", "model.layers.².weight", "model.layers." + "9" * 5000, "\x1b"]
)
def test_odd_names_are_left_alone(name: str, tiny_llama: Path) -> None:
    shapes = {**shapes_of(load_file(tiny_llama / "model.safetensors")), name: (2, 2)}
    names = map_names(config_of(tiny_llama), shapes)
    assert names.slots[name].kind == ModuleKind.OTHER
    assert names.slots["lm_head.weight"].kind == ModuleKind.HEAD


def test_a_second_name_for_a_filled_place_is_left_alone(tiny_llama: Path) -> None:
    shapes = shapes_of(load_file(tiny_llama / "model.safetensors"))
    slots = map_names(config_of(tiny_llama), {**shapes, "norm.weight": (32,)}).slots
    assert {slots["norm.weight"].module, slots["model.norm.weight"].module} == {"norm", "model.norm"}


def test_a_matrix_that_is_split_on_its_way_belongs_to_no_module(tmp_path: Path) -> None:
    sizes = {key: tiny_models.TEXT[key] for key in ("vocab_size", "hidden_size", "intermediate_size")}
    config = transformers.NomicBertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    transformers.NomicBertModel(config).save_pretrained(tmp_path)
    tensors, names = mapped(tmp_path)
    split = {name for name in tensors if "Wqkv.weight" in name}
    assert split
    assert {names.slots[name].kind for name in split} == {ModuleKind.OTHER}
    assert {s.kind for name, s in names.slots.items() if ".mlp." in name} == {ModuleKind.LINEAR}


def test_no_command_imports_transformers_before_it_has_a_question_for_it() -> None:
    """Importing it takes half of a command's start, and --help and verify do not need it."""
    commands = sorted(path.stem for path in Path(commands_package.__path__[0]).glob("[!_]*.py"))
    imports = "; ".join(f"import kasa_cli.commands.{name}" for name in commands if name != "demo")
    code = f"{imports}; import sys; print([name for name in sys.modules if name.split('.')[0] == 'transformers'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
