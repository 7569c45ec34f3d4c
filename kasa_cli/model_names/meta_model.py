"""Builds the model of a config.json without weights, to count and name its modules.

A config is untrusted. It reaches only classes that transformers ships, on the meta device, after what
could name code or a download is gone and every count is bounded by the tensors that are really there.
"""

import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import meta_device_safe_creation_ops
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING
from transformers.utils import logging as transformers_logging

from kasa_cli.errors import InvalidInput
from kasa_cli.model_names.names import Shapes, UnknownFamily

MAX_DEPTH = 16
MAX_LABELS = 1_000_000
MAX_POSITIONS = 1 << 24
SPARE_COUNT = 1024  # layers may share their tensors
SPARE_EXPERTS = 1 << 16  # and experts lie in one, by the thousand
SPARE_MODULES = 10_000

DROPPED = re.compile(
    r"__.*|_attn.*|.*implementation.*|auto_map|attribute_map|trust_remote_code|quantization_config"
    r"|(torch_)?dtype|_?name_or_path|_commit_hash|use_kernels"
)
COUNT = re.compile(r".*(layers?|experts?|depths?|blocks?|stages?|repeats?|heads?|groups)")
LABELS = re.compile(r"_?num_(labels|classes)")
POSITIONS = re.compile(r"(.*_)?(positions?|position_embeddings|ctx|seq_len(gth)?)")
SIZE = re.compile(
    r"_?(num|n|encoder|decoder)_.*(layers?|experts?|blocks?|stages?|heads?|groups|labels|classes|dim|embd)"
    r"|.*(hidden|intermediate|vocab|embedding)_size|d_(model|ff|kv)|head_dim"
)

# These fill a table of sines entry by entry in Python: minutes for a million positions.
FILLS_TABLES = {"autoformer", "distilbert", "flaubert", "informer", "marian", "pegasus", "roformer", "xlm"}
FILLS_TABLES |= {"time_series_transformer"}


def build(config: Mapping[str, Any], shapes: Shapes) -> PreTrainedModel:
    """The model that transformers would load these tensors into, on the meta device.

    Raises `UnknownFamily` when there is no such class, `InvalidInput` when the config is not sound.
    """
    clean = sanitised(config)
    check_numbers(clean, shapes)
    family, architecture = clean.get("model_type"), first_architecture(clean)
    if not isinstance(family, str) or family not in CONFIG_MAPPING:
        raise UnknownFamily(f"transformers {transformers.__version__} knows no model type {family!r}")
    refuse_downloads(clean)
    with quiet(), module_budget(8 * len(shapes) + SPARE_MODULES):
        try:
            return instance(CONFIG_MAPPING[family].from_dict(clean), architecture)
        except (UnknownFamily, InvalidInput):
            raise
        except (ImportError, OSError) as error:  # OSError: the Hub, asked for a part and out of reach
            raise UnknownFamily(
                f"{architecture or family} cannot be built here ({first_line(error)})"
            ) from error
        except Exception as error:  # untrusted numbers can make transformers raise anything
            refuse(clean, architecture or family, error)


def refuse(config: Mapping[str, Any], name: str, error: Exception) -> NoReturn:
    """The reason why no model can be built: a part that transformers does not know, or an invalid one."""
    strange = sorted(set(model_types(config)) - set(CONFIG_MAPPING.keys()))
    if strange:
        raise UnknownFamily(
            f"transformers {transformers.__version__} knows no model type {strange[0]!r}"
        ) from error
    raise InvalidInput("config.json describes no model", name, first_line(error)) from error


def first_line(error: Exception) -> str:
    """The message of an error in one line.

    >>> first_line(ValueError("no such size\\nlong story"))
    'ValueError: no such size'
    """
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(" :")[:200]


# --- checks of a config ---


def sanitised(config: Mapping[str, Any], depth: int = 0) -> dict[str, Any]:
    """A copy without the keys that name code, kernels, paths or storage; sizes stay.

    >>> sanitised({"auto_map": {"AutoModel": "evil.py"}, "hidden_size": 8, "vision_config": {"_attn_x": 1}})
    {'hidden_size': 8, 'vision_config': {}}
    """
    return {key: plain(value, depth) for key, value in config.items() if not DROPPED.fullmatch(str(key))}


def plain(value: Any, depth: int) -> Any:
    """A copy of a JSON value, its dictionaries sanitised."""
    if depth > MAX_DEPTH:
        raise InvalidInput("config.json is nested too deeply")
    if isinstance(value, Mapping):
        return sanitised(value, depth + 1)
    return [plain(item, depth + 1) for item in value] if isinstance(value, list) else value


def sections(value: Any) -> Iterator[Mapping[str, Any]]:
    """A config and every config inside it."""
    if isinstance(value, Mapping):
        yield value
        for item in value.values():
            yield from sections(item)
    elif isinstance(value, list):
        for item in value:
            yield from sections(item)


def numbers(section: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Every number of one section, those of flat lists too."""
    for key, value in section.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, int | float) and not isinstance(item, bool):
                yield str(key), item


def model_types(config: Mapping[str, Any]) -> list[str]:
    """The model types of a config and of its parts."""
    return [t for section in sections(config) if isinstance(t := section.get("model_type"), str)]


def check_numbers(config: Mapping[str, Any], shapes: Shapes) -> None:
    """Refuse, before anything is built, numbers that no model with these tensors has."""
    side = max((side for shape in shapes.values() for side in shape), default=0)
    highest = side + (1 << 14) if FILLS_TABLES & set(model_types(config)) else math.inf
    for section in sections(config):
        for key, number in numbers(section):
            check_number(key, number, min(highest, most(key, len(shapes))))


def most(key: str, num_tensors: int) -> float:
    """The largest number a key may hold.

    >>> most("num_hidden_layers", 100), most("vocab_size", 100)
    (1124, inf)
    """
    if LABELS.fullmatch(key):
        return MAX_LABELS
    if COUNT.fullmatch(key):
        return num_tensors + (SPARE_EXPERTS if key.endswith("experts") else SPARE_COUNT)
    return MAX_POSITIONS if POSITIONS.fullmatch(key) else math.inf


def check_number(key: str, number: float, highest: float) -> None:
    """Refuse a size below zero or not a number, and a number above what is possible."""
    if number > highest:
        raise InvalidInput("config.json asks for more than the checkpoint holds", f"{key} = {number}")
    if SIZE.fullmatch(key) and not (0 <= number < math.inf):
        raise InvalidInput("config.json holds an impossible size", f"{key} = {number}")


def refuse_downloads(config: Mapping[str, Any]) -> None:
    """A backbone given by name only would be looked up on the Hub."""
    for section in sections(config):
        backbone = section.get("backbone")
        if isinstance(backbone, str) and not isinstance(section.get("backbone_config"), Mapping):
            raise UnknownFamily(
                f"its backbone {backbone!r} is described elsewhere, and nothing is downloaded"
            )


# --- from a config to a model ---


def first_architecture(config: Mapping[str, Any]) -> str | None:
    """The class that wrote the checkpoint, if the config names one."""
    named = config.get("architectures")
    return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None


def instance(config: PreTrainedConfig, architecture: str | None) -> PreTrainedModel:
    """The model, on the meta device."""
    model_class = class_named(architecture) if architecture else class_of(config)
    with torch.device("meta"), meta_device_safe_creation_ops():
        return model_class(fitting(config, model_class))


def fitting(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> PreTrainedConfig:
    """The config, or the part of it, that a class is built from."""
    config_class = model_class.config_class
    if config_class is None or model_class in auto_classes(MODEL_FOR_CAUSAL_LM_MAPPING, config):
        return config
    for part in (config, config.get_text_config()):  # a language model may keep the config it was cut out of
        if isinstance(part, config_class):
            return part
    raise UnknownFamily(f"{model_class.__name__} is no model of type {config.model_type!r}")


def class_named(architecture: str) -> type[PreTrainedModel]:
    """A model class of transformers, by name."""
    class_ = getattr(transformers, architecture, None)
    if not (isinstance(class_, type) and issubclass(class_, PreTrainedModel)):
        raise UnknownFamily(f"transformers {transformers.__version__} has no model class {architecture!r}")
    return class_


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The plain model of a config that names no class."""
    class_ = auto_classes(MODEL_MAPPING, config)
    if not class_:
        raise UnknownFamily(
            f"config.json names no architecture, and {config.model_type!r} has no plain model"
        )
    return class_[0]


def auto_classes(mapping: Mapping[Any, Any], config: PreTrainedConfig) -> list[type[PreTrainedModel]]:
    """The classes that one of transformers' automatic mappings has for a config."""
    class_ = mapping.get(type(config), None)
    return [c for c in (class_ if isinstance(class_, Sequence) else [class_]) if c is not None]


@contextmanager
def module_budget(most: int) -> Iterator[None]:
    """Bound the modules that are made, whatever the key that asks for them."""
    num_created = 0

    def count(*_: nn.Module | str | None) -> None:
        nonlocal num_created
        num_created += 1
        if num_created > most:
            raise InvalidInput(
                "config.json asks for more modules than the checkpoint can fill", f"over {most}"
            )

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def quiet() -> Iterator[None]:
    """No advice from transformers: it speaks to people who are about to run the model."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)  # its errors, too, repeat what the config says
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
