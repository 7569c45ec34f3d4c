"""The numbers of each module: its rank, alpha and scaling after the patterns, as PEFT resolves them.

Patterns are regular expressions of a stranger: only simple ones are taken, and those are matched by an engine that
can be stopped.
"""

import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import regex  # transformers needs it; unlike re, it can be stopped

from kasa_cli.adapters.config import Config, method_of
from kasa_cli.adapters.peft_types import Method
from kasa_cli.errors import InvalidInput
from kasa_cli.files.untrusted import quote

MAX_PATTERN = 1000
MAX_PATTERNS = 100_000
PLAIN = re.compile(
    r"""(?x) (?: (?: \\[dwsDWS.\-/_] | \[ \^? [\w.\-\\]+ \] | [^\\\[\](){}*+?|^$] )
                 (?: (?: [*+?] | \{ \d{1,2} (?: ,\d{0,2} )? \} ) [?+]? )?
             | \( (?: \?: )? | \) \?? | [|^$] )*"""
)
"""Patterns in which nothing but one character, or a class, is repeated. Others can fill the memory or never end."""
COMPILE_SECONDS = 20.0  # for all patterns of one adapter
MATCH_SECONDS = 20.0  # for all matches of one adapter
FIRST_WITH_VERSION = (0, 18)
"""The first PEFT that wrote its version into the config."""

Settings = Mapping[str, Any]
Extra = tuple[str, Callable[[Config], bool], str]

EXTRAS: tuple[Extra, ...] = (
    ("dora", lambda config: config.get("use_dora") is True, "lora_magnitude_vector"),
    ("kasa", lambda config: config.get("kasa_config") is not None, "lora_diag"),
    ("", lambda config: config.get("lora_bias") is True, "lora_B.bias"),
)
"""Variants of LoRA: the kind they make of it, how the config says so, and the tensor that each module has more."""

STARTS = {
    **dict.fromkeys(("true", "false", "gaussian", "eva", "orthogonal", "mica"), ("", "kept")),
    "pissa": ("pissa", "pissa"),
    "olora": ("olora", "olora"),
    **dict.fromkeys(("corda", "lora_ga", "loftq"), ("", "lost")),
}
"""By `init_lora_weights`: the kind, and `base_start`, what became of the base: kept, minus a start that can be
computed from it again (by that name), or minus one that cannot (lost). Where the file holds the base itself: file."""

SCALINGS: Mapping[str, Callable[[float, int, Config], float]] = {
    "LORA": lambda alpha, r, config: alpha / (r**0.5 if config.get("use_rslora") else r),
    "ADALORA": lambda alpha, r, config: (alpha if alpha > 0 else float(r)) / (r + 1e-5),
    "LOHA": lambda alpha, r, config: alpha / r,
    "LOKR": lambda alpha, r, config: alpha / r,
    "RANDLORA": lambda alpha, r, config: alpha / r,
}
"""The factor before the product, from alpha, the rank of the module and the config."""


class Patterns:
    """A map from PEFT's patterns to values: the first that matches the end of a name counts, in the file's order."""

    def __init__(self, field: str, patterns: Any, path: Path) -> None:
        self._field, self._path = field, path
        if isinstance(patterns, dict) and len(patterns) > MAX_PATTERNS:
            raise InvalidInput(f"{field} has {len(patterns)} patterns", str(path))
        self._latest = time.monotonic() + COMPILE_SECONDS
        self._values = [(tail_of(key), self._compiled(key), value) for key, value in (patterns or {}).items()]
        self._deadline = time.monotonic() + MATCH_SECONDS

    def value(self, name: str, otherwise: Any) -> Any:
        """What is said about a name, or what holds otherwise."""
        found = (
            v for tail, pattern, v in self._values if name.endswith(tail) and self._matches(pattern, name)
        )
        return next(found, otherwise)

    def _compiled(self, key: str) -> Any:
        if len(key) > MAX_PATTERN:
            raise InvalidInput(
                f"{self._field} {quote(key)} is longer than {MAX_PATTERN} characters", str(self._path)
            )
        if not PLAIN.fullmatch(key):
            what = f"{self._field} {quote(key)} repeats groups, looks around or counts: not matched here"
            raise InvalidInput(what, str(self._path), "write it with names, dots and simple repetitions")
        if time.monotonic() > self._latest:
            raise InvalidInput(f"the patterns of {self._field} take too long to compile", str(self._path))
        try:
            with warnings.catch_warnings(action="ignore"):
                return regex.compile(rf"(.*\.)?({key})$")
        except (regex.error, OverflowError, RecursionError, MemoryError) as error:
            raise InvalidInput(f"{self._field} {quote(key)} is no pattern", str(self._path)) from error

    def _matches(self, pattern: Any, name: str) -> bool:
        try:
            return pattern.match(name, timeout=max(self._deadline - time.monotonic(), 1e-3)) is not None
        except (TimeoutError, MemoryError, RecursionError) as error:
            key = quote(pattern.pattern[len(r"(.*\.)?(") : -2])
            raise InvalidInput(f"{self._field} {key} takes too long to match", str(self._path)) from error


def tail_of(key: str) -> str:
    """What a name must end with to match a pattern, if that is plain to see: saves most of the matching.

    >>> tail_of("layers.0.q_proj"), tail_of("(q|v)_proj")
    ('q_proj', '')
    """
    return key.rpartition(".")[2] if re.fullmatch(r"[\w.\-]+", key) else ""


@dataclass(frozen=True)
class Resolver:
    """The settings of any module of one adapter, by the name that PEFT's patterns are matched with."""

    kind: str
    method: Method
    config: Config
    ranks: Patterns
    alphas: Patterns
    path: Path

    def settings(self, name: str) -> dict[str, Any]:
        """Plain data: what is kept of the config, rank, alpha and scaling."""
        keys = (*self.method.keeps, "peft_version")
        kept = {key: self.config[key] for key in keys if self.config.get(key) is not None}
        rank = rank_of(self, name)
        if rank is not None:
            kept["r"] = rank
        if self.method.alpha:
            alpha = self.alphas.value(name, self.config[self.method.alpha])
            kept["alpha"] = alpha
            kept["scaling"] = SCALINGS[self.config["peft_type"]](alpha, rank or 1, self.config)
        return {**kept, **start_of(self.config, self.path)}


def resolver_of(config: Config, path: Path) -> Resolver:
    """Check a config and make ready to ask it about modules."""
    method = method_of(config, path)
    is_adalora = (
        method.kind == "adalora"
    )  # its rank_pattern says which components were kept, tensor by tensor
    ranks = Patterns(
        "rank_pattern", None if is_adalora or method.kind == "osf" else config.get("rank_pattern"), path
    )
    alphas = Patterns("alpha_pattern", None if is_adalora else config.get("alpha_pattern"), path)
    return Resolver(
        kind_of(config, method, path), method, MappingProxyType(dict(config)), ranks, alphas, path
    )


def rank_of(resolver: Resolver, name: str) -> int | None:
    """The rank of a module, of AdaLoRA that before pruning; None where the type has none."""
    config, needs = resolver.config, resolver.method.needs
    if "init_r" in needs:
        return int(config["init_r"])
    return int(resolver.ranks.value(name, config["r"])) if "r" in needs else None


def kept_rank(resolver: Resolver, name: str) -> int:
    """How many components AdaLoRA kept of a module: PEFT saves no others."""
    kept = (resolver.config.get("rank_pattern") or {}).get(f"{name}.lora_E")
    return sum(flag is True for flag in kept) if isinstance(kept, list) else int(resolver.config["init_r"])


def kind_of(config: Config, method: Method, path: Path) -> str:
    """What kind of adapter a config describes."""
    if method.kind != "lora":
        return method.kind
    variants = [kind for kind, holds, _ in EXTRAS if kind and holds(config)]
    if len(variants) > 1:
        raise InvalidInput(f"{' and '.join(variants)} at once: PEFT has no such adapter", str(path))
    return next(iter(variants), start_kind(config, path))


def start_kind(config: Config, path: Path) -> str:
    """The kind that the start of a LoRA makes of it, if it is one that the base must know."""
    return started(config, path)[0] or "lora"


def started(config: Config, path: Path) -> tuple[str, str]:
    """The row of `STARTS`. An approximate PiSSA drew random numbers that nobody can draw again."""
    init = str(config.get("init_lora_weights", True)).lower()
    if re.fullmatch(r"pissa_niter_\d+", init):
        return "pissa", "lost"
    if init not in STARTS:
        raise InvalidInput(f"init_lora_weights {quote(init)} is not known", str(path))
    return STARTS[init]


def start_of(config: Config, path: Path) -> dict[str, Any]:
    """What the start of a LoRA did, for who merges it into the original base."""
    if config.get("peft_type") != "LORA":
        return {}
    return {
        "init_lora_weights": config.get("init_lora_weights", True),
        "base_start": started(config, path)[1],
    }


def extra_tensors(config: Config) -> tuple[str, ...]:
    """The tensors that each module has beside its factors."""
    return tuple(tensor for _, holds, tensor in EXTRAS if holds(config))


def version_of(config: Config) -> tuple[int, int]:
    """The PEFT that wrote an adapter; one that says nothing is older than those that do."""
    text = config.get("peft_version")
    found = re.match(r"(\d+)\.(\d+)", text) if isinstance(text, str) else None
    return (int(found[1]), int(found[2])) if found else (0, FIRST_WITH_VERSION[1] - 1)
