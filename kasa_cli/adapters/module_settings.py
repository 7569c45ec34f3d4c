"""The rank, alpha and scaling of each module, resolved from the patterns as in PEFT.

Patterns are untrusted regular expressions: only simple ones are accepted, and matching has a time limit.
"""

import re
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import regex  # a dependency of transformers; unlike re, it has a timeout

from kasa_cli.adapters.config import Config, initialisation, kind_of
from kasa_cli.errors import InvalidInput
from kasa_cli.files import quote
from kasa_cli.methods.adapter_kinds import Initialisation, Kind

MAX_PATTERN = 1000
MAX_PATTERNS = 100_000
PLAIN = re.compile(
    r"""(?x) (?: (?: \\[dwsDWS.\-/_] | \[ \^? [\w.\-\\]+ \] | [^\\\[\](){}*+?|^$] )
                 (?: (?: [*+?] | \{ \d{1,2} (?: ,\d{0,2} )? \} ) [?+]? )?
             | \( (?: \?: )? | \) \?? | [|^$] )*"""
)
"""Patterns that repeat only single characters or classes. Others can fill the memory or never finish."""
COMPILE_SECONDS = 20.0  # for all patterns of one adapter
MATCH_SECONDS = 20.0  # for all matches of one adapter


class ValuePatterns:
    """A map from PEFT's patterns to values: the first pattern of the file that matches the end of a name decides."""

    def __init__(self, field: str, patterns: Any, path: Path) -> None:
        self._field, self._path = field, path
        if isinstance(patterns, dict) and len(patterns) > MAX_PATTERNS:
            raise InvalidInput(f"{field} has {len(patterns)} patterns", str(path))
        self._latest = time.monotonic() + COMPILE_SECONDS
        self._values = [(tail_of(key), self._compiled(key), value) for key, value in (patterns or {}).items()]
        self._deadline = time.monotonic() + MATCH_SECONDS

    def value(self, name: str, otherwise: Any) -> Any:
        """The value of the first pattern that matches a name, or `otherwise`."""
        matching = (
            v for tail, pattern, v in self._values if name.endswith(tail) and self._matches(pattern, name)
        )
        return next(matching, otherwise)

    def _compiled(self, key: str) -> Any:
        if len(key) > MAX_PATTERN:
            raise InvalidInput(
                f"{self._field} {quote(key)} is longer than {MAX_PATTERN} characters", str(self._path)
            )
        if not PLAIN.fullmatch(key):
            problem = (
                f"{self._field} {quote(key)} repeats groups, looks around or counts: kasa does not match it"
            )
            raise InvalidInput(problem, str(self._path), "write it with names, dots and simple repetitions")
        if time.monotonic() > self._latest:
            raise InvalidInput(f"the patterns of {self._field} take too long to compile", str(self._path))
        try:
            with warnings.catch_warnings(action="ignore"):
                return regex.compile(rf"(.*\.)?({key})$")
        except (regex.error, OverflowError, RecursionError, MemoryError) as error:
            raise InvalidInput(
                f"{self._field} {quote(key)} is not a valid pattern", str(self._path)
            ) from error

    def _matches(self, pattern: Any, name: str) -> bool:
        try:
            return pattern.match(name, timeout=max(self._deadline - time.monotonic(), 1e-3)) is not None
        except (TimeoutError, MemoryError, RecursionError) as error:
            key = quote(pattern.pattern[len(r"(.*\.)?(") : -2])
            raise InvalidInput(f"{self._field} {key} takes too long to match", str(self._path)) from error


def tail_of(key: str) -> str:
    """The end of every name that a pattern matches, if the pattern is a plain name: it saves most of the matching.

    >>> tail_of("layers.0.q_proj"), tail_of("(q|v)_proj")
    ('q_proj', '')
    """
    return key.rpartition(".")[2] if re.fullmatch(r"[\w.\-]+", key) else ""


@dataclass(frozen=True)
class Resolver:
    """The settings of any module of one adapter, by the name that PEFT's patterns are matched with."""

    kind: Kind
    config: Config
    ranks: ValuePatterns
    alphas: ValuePatterns
    initialisation: Initialisation
    path: Path

    def settings(self, name: str) -> dict[str, Any]:
        """Plain data: the kept fields of the config, rank, alpha and scaling."""
        config_type = self.kind.config
        fields = {key: self.config.get(key) for key in (*config_type.settings, "peft_version")}
        settings = {key: value for key, value in fields.items() if value is not None}
        if config_type.rank:
            settings["r"] = int(self.ranks.value(name, self.config[config_type.rank]))
        if config_type.alpha:
            settings["alpha"] = self.alphas.value(name, self.config[config_type.alpha])
        if self.kind.scaling:
            settings["scaling"] = self.kind.scaling(settings)
        if config_type.initialisations:
            settings["init_lora_weights"] = self.config.get("init_lora_weights", True)
        return settings


def resolver_of(config: Config, path: Path) -> Resolver:
    """Check a config and prepare the settings of its modules."""
    kind = kind_of(config, path)
    ranks, alphas = (
        ValuePatterns(field, config.get(field) if kind.config.has_patterns else None, path)
        for field in ("rank_pattern", "alpha_pattern")
    )
    init = initialisation(config, kind, path)
    return Resolver(kind, MappingProxyType(dict(config)), ranks, alphas, init, path)
