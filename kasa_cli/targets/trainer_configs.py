"""Writes a selection as the config of a trainer, so that the trainer adapts exactly that selection.

PEFT matches a list of names by their ends and a string by the whole name, and in some families it replaces names;
LLaMA-Factory adds rules of its own. So every text is read back as its trainer would read it, and one that means
anything but the selection is not given away. `trial` then asks PEFT itself.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import yaml

from kasa_cli.adapters import peft
from kasa_cli.errors import UsageError

Lora = dict[str, Any]
"""The arguments of a `peft.LoraConfig`."""


@dataclass(frozen=True)
class Chosen:
    """A selection, with the facts on which a trainer's reading of a name depends.

    `modules` and `parameters` (of fused experts) stand best first; `all_modules` are the paths in memory that PEFT
    could match. `fan_in_fan_out` says that the modules store their weight as (in, out).
    """

    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    all_modules: tuple[str, ...]
    config: Mapping[str, Any]
    model_class: str | None
    rank: int
    alpha: float
    fan_in_fan_out: bool


@dataclass(frozen=True)
class TrainerFormat:
    """Writes a config, and gives the arguments of the LoraConfig that its trainer makes of it."""

    write: Callable[[Chosen], str]
    read: Callable[[str, Chosen], Lora]


def emit(kind: str, chosen: Chosen) -> str:
    """The config of exactly the selection; `UsageError` where no such config exists."""
    if not chosen.modules and not chosen.parameters:
        raise UsageError("nothing was chosen", f"--emit {kind}", "choose one module at least")
    refuse_what_peft_refuses(chosen)
    text = FORMATS[kind].write(chosen)
    require_exact(kind, lora_config(kind, text, chosen), chosen)
    return text


def lora_config(kind: str, text: str, chosen: Chosen) -> Lora:
    """The arguments that PEFT gets when the config is used, read from its text."""
    return FORMATS[kind].read(text, chosen)


def refuse_what_peft_refuses(chosen: Chosen) -> None:
    """Name the modules that no LoRA can be put on."""
    for name in peft.refused_names(chosen.config):
        if refused := [module for module in chosen.modules if last(module) == name]:
            raise UsageError("PEFT 0.21 refuses any LoRA on", refused[0], f"--exclude {name}")


# --- the modules of a LoraConfig ---


def require_exact(kind: str, lora: Mapping[str, Any], chosen: Chosen) -> None:
    """Refuse a config that a trainer takes for another selection."""
    actual, expected = matched(lora, chosen), set(chosen.modules)
    if actual == expected:
        return
    lost = [module for module in chosen.modules if module not in actual]
    difference = f"{lost[0]} would be lost" if lost else f"{min(actual - expected)} would be taken too"
    remedy = "leave such modules out (--exclude), or choose all of that name"
    if kind != "peft":
        remedy = f"use --emit peft, or {remedy}"
    raise UsageError(f"--emit {kind} cannot say exactly this selection for this model", difference, remedy)


def matched(lora: Mapping[str, Any], chosen: Chosen) -> set[str]:
    """The modules that PEFT wraps by the rules of 0.21: a name stands for all paths that end with it, a pattern for
    the paths it spells, and where experts were renamed a pattern is turned into last names first (peft#3711)."""
    modules, experts = {*chosen.all_modules, *chosen.modules}, peft.expert_names(chosen.config)
    parameters = lora.get("target_parameters") or []
    weights = {name.removesuffix(".weight") for name in parameters if name.endswith(".weight")}
    targets = lora["target_modules"]
    if isinstance(targets, str):
        spelled = {module for module in modules if re.fullmatch(targets, module)}
        if not experts:
            return spelled
        targets = {last(module) for module in spelled}
    names = weights | {name for name in targets if last(name) not in experts}
    return {module for module in modules if not names.isdisjoint(ends(module))}


def ends(module: str) -> Iterator[str]:
    """A path and every shorter name that PEFT takes for it.

    >>> list(ends("layers.0.fc"))
    ['layers.0.fc', '0.fc', 'fc']
    """
    while module:
        yield module
        module = module.partition(".")[2]


def last(module: str) -> str:
    """The last name of a path."""
    return module.rpartition(".")[2]


def targets(chosen: Chosen) -> tuple[list[str] | str, list[str]]:
    """`target_modules` and `target_parameters`: a module that PEFT would replace goes by its weight."""
    lora: Lora = {"target_modules": peft.target_modules(chosen.modules, chosen.all_modules)}
    experts = set(peft.expert_names(chosen.config))
    lora = peft.by_parameter(lora, [module for module in chosen.modules if last(module) in experts])
    return lora["target_modules"], [*lora.get("target_parameters", []), *chosen.parameters]


# --- the formats ---


def write_names(chosen: Chosen) -> str:
    """One name a line, the parameters last."""
    modules, parameters = targets(chosen)
    if isinstance(modules, str):
        raise UsageError(
            "names alone do not tell these modules from others", chosen.modules[0], "use --emit peft"
        )
    return "".join(f"{name}\n" for name in visible([*modules, *parameters], "names"))


def read_names(text: str, chosen: Chosen) -> Lora:
    """The lines that are modules as `target_modules`, the others as `target_parameters`."""
    modules, lines = {*chosen.all_modules, *chosen.modules}, text.splitlines()
    return {
        **size(chosen),
        "target_modules": [line for line in lines if line in modules],
        "target_parameters": [line for line in lines if line not in modules],
    }


def write_peft(chosen: Chosen) -> str:
    """An `adapter_config.json` for training: `LoraConfig(**json)` is the same."""
    modules, parameters = targets(chosen)
    tasks = (task for end, task in peft.TASKS.items() if (chosen.model_class or "").endswith(end))
    lora = {
        "peft_type": "LORA",
        "task_type": next(tasks, None),
        **size(chosen),
        "bias": "none",
        "inference_mode": False,
        "target_modules": modules,  # empty rather than None, which PEFT fills in by itself
        "target_parameters": parameters or None,
    }
    return json.dumps(lora, indent=2) + "\n"


def read_peft(text: str, chosen: Chosen) -> Lora:
    """The JSON as it stands."""
    lora: Lora = json.loads(text)
    return lora


def write_axolotl(chosen: Chosen) -> str:
    """Keys of axolotl's YAML, which takes a list or a pattern, and parameters too."""
    modules, parameters = targets(chosen)
    if isinstance(modules, list) and not all(is_plain(name) for name in modules):
        modules = pattern(modules)  # axolotl refuses a list with a name that is no valid expression
    keys: dict[str, Any] = {
        "adapter": "lora",
        "lora_r": chosen.rank,
        "lora_alpha": whole(chosen.alpha, "axolotl"),
    }
    keys |= {"lora_dropout": 0}
    if chosen.fan_in_fan_out:
        keys["lora_fan_in_fan_out"] = True
    keys["lora_target_modules"] = modules
    if parameters:
        keys["lora_target_parameters"] = parameters
    return yaml.safe_dump(keys, sort_keys=False)


def read_axolotl(text: str, chosen: Chosen) -> Lora:
    """axolotl passes the keys to PEFT as they are."""
    keys = yaml.safe_load(text)
    return {
        "r": keys["lora_r"],
        "lora_alpha": keys["lora_alpha"],
        "lora_dropout": keys["lora_dropout"],
        "fan_in_fan_out": keys.get("lora_fan_in_fan_out"),
        "target_modules": keys["lora_target_modules"],
        "target_parameters": keys.get("lora_target_parameters", []),
    }


LLAMA_FACTORY_BARS = (
    "audio_projection_layer",
    "patch_embed",
    "patch_embedding",
    "per_layer_projection_norm",
    "subsample_conv_projection",
    "timm_model",
)
"""Parts of a name that LLaMA-Factory never adapts in some composite models, whatever its flags."""


def write_llamafactory(chosen: Chosen) -> str:
    """Keys of LLaMA-Factory's YAML, which takes names with commas between them and no parameters."""
    if chosen.parameters:
        raise UsageError("LLaMA-Factory has no key for parameters", chosen.parameters[0], "use --emit peft")
    keys: dict[str, Any] = {
        "finetuning_type": "lora",
        "lora_rank": chosen.rank,
        "lora_alpha": whole(chosen.alpha, "LLaMA-Factory"),
        "lora_dropout": 0.0,
        "lora_target": ",".join(llamafactory_names(chosen)),
    }
    if is_composite(chosen.config):  # otherwise it silently leaves these two out of any LoRA
        keys |= {"freeze_vision_tower": False, "freeze_multi_modal_projector": False}
    return yaml.safe_dump(keys, sort_keys=False)


def llamafactory_names(chosen: Chosen) -> Sequence[str]:
    """The modules; refused if LLaMA-Factory does not adapt each of these names."""
    barred = LLAMA_FACTORY_BARS if is_composite(chosen.config) else ()
    for module in chosen.modules:
        if not is_plain(module) or module == "all":
            raise UsageError("LLaMA-Factory cannot read the name", module, "use --emit peft")
        if any(part in module for part in barred):
            raise UsageError("LLaMA-Factory does not adapt", module, "use --emit peft")
    return chosen.modules


def read_llamafactory(text: str, chosen: Chosen) -> Lora:
    """LLaMA-Factory passes the names as a list: in a composite model, all paths that contain one."""
    keys = yaml.safe_load(text)
    names = [name.strip() for name in keys["lora_target"].split(",")]
    if is_composite(chosen.config):
        modules = dict.fromkeys([*chosen.all_modules, *chosen.modules])
        names = [module for module in modules if any(name in module for name in names)]
    return {
        "r": keys["lora_rank"],
        "lora_alpha": keys["lora_alpha"],
        "lora_dropout": keys["lora_dropout"],
        "target_modules": names,
    }


def is_composite(config: Mapping[str, Any]) -> bool:
    """Whether it is a composite model (vision encoder and language model, say), with a config for each part."""
    parts = (key for key, value in config.items() if isinstance(value, Mapping) and key.endswith("_config"))
    return any(key != "quantization_config" for key in parts)


def write_regex(chosen: Chosen) -> str:
    """One pattern for `target_modules` as a string, which PEFT matches against whole paths."""
    if chosen.parameters:
        raise UsageError("a pattern cannot name parameters", chosen.parameters[0], "use --emit peft")
    return pattern(visible(chosen.modules, "regex")) + "\n"


def read_regex(text: str, chosen: Chosen) -> Lora:
    """The line as it stands."""
    return {**size(chosen), "target_modules": text.removesuffix("\n")}


FORMATS: dict[str, TrainerFormat] = {
    "names": TrainerFormat(write_names, read_names),
    "peft": TrainerFormat(write_peft, read_peft),
    "axolotl": TrainerFormat(write_axolotl, read_axolotl),
    "llamafactory": TrainerFormat(write_llamafactory, read_llamafactory),
    "regex": TrainerFormat(write_regex, read_regex),
}

EMISSIONS: dict[str, Callable[[Chosen], str]] = {kind: partial(emit, kind) for kind in FORMATS}
"""The formats of `--emit`."""


# --- parts of a config ---


def size(chosen: Chosen) -> Lora:
    """The numbers of a LoRA. No dropout: PEFT allows none on parameters."""
    alpha = int(chosen.alpha) if float(chosen.alpha).is_integer() else chosen.alpha
    return {
        "r": chosen.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "fan_in_fan_out": chosen.fan_in_fan_out,
    }


def whole(alpha: float, trainer: str) -> int:
    """An alpha for a trainer whose key is a whole number above 0 (LLaMA-Factory reads 0 as unset)."""
    if alpha < 1 or not float(alpha).is_integer():
        raise UsageError(
            f"{trainer} takes a whole number for lora_alpha", f"{alpha:g}", "choose another --alpha"
        )
    return int(alpha)


def visible(names: Iterable[str], kind: str) -> list[str]:
    """Refuse names that cannot be printed as they are: untrusted ones may hold a line break or an escape code."""
    checked = list(names)
    for name in checked:
        if not name.isprintable():
            raise UsageError(f"--emit {kind} cannot print the name", name, "use --emit peft")
    return checked


def is_plain(name: str) -> bool:
    """Whether a name consists of letters, digits and `_.-`, which mean the same in every syntax."""
    return re.fullmatch(r"[\w.-]+", name) is not None


LAYER = re.compile(r"(?:(?<=\.)|^)[0-9]+(?=\.|$)")


def pattern(modules: Iterable[str]) -> str:
    """A pattern for exactly these paths; paths that differ only in their layer are written once.

    >>> print(pattern(["layers.10.fc", "head", "layers.9.fc", "layers.9.out"]))
    layers\\.(?:9|10)\\.fc|head|layers\\.9\\.out
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for module in modules:
        layer = LAYER.search(module)
        around = (module[: layer.start()], module[layer.end() :]) if layer else (module, "")
        groups.setdefault(around, []).append(layer[0] if layer else "")
    return "|".join(spelled(before, numbers, after) for (before, after), numbers in groups.items())


def spelled(before: str, numbers: list[str], after: str) -> str:
    """One alternative of a pattern."""
    if len(numbers) > 1:
        numbers = [f"(?:{'|'.join(sorted(numbers, key=lambda number: (int(number), number)))})"]
    return f"{re.escape(before)}{numbers[0]}{re.escape(after)}"
