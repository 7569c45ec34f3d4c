"""Model card of an output: what kasa did, and the licence of the source. It holds no local path."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kasa_cli.errors import InvalidInput
from kasa_cli.files import read_small

CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag")
MAX_CARD = 4_000_000


def source_facts(root: Path, companions: tuple[str, ...]) -> dict[str, Any]:
    """Front matter that a new card takes over from the card of the source; {} if that cannot be read."""
    if "README.md" not in companions:
        return {}
    try:
        text = read_small(root / "README.md", MAX_CARD).decode("utf-8", errors="replace")
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (yaml.YAMLError, InvalidInput, IndexError, ValueError, RecursionError):  # dates, nesting
        return {}
    return {key: front[key] for key in CARRIED if key in front} if isinstance(front, Mapping) else {}


def card(
    repo: str | None, facts: Mapping[str, Any], title: str, body: str, *, is_adapter: bool = False
) -> bytes:
    """A card. Its front matter is dumped as YAML, so that no name can break out of it."""
    relation, library = ("adapter", "peft") if is_adapter else ("finetune", "transformers")
    base = {"base_model": repo, "base_model_relation": relation} if repo else {}
    front = {**facts, **base, "library_name": library, "tags": ["kasa", "peft", "lora"]}
    matter = yaml.safe_dump(front, sort_keys=True, allow_unicode=True)
    return f"---\n{matter}---\n\n# {title}\n\n{body.strip()}\n".encode()
