"""Names are nouns and verbs, and sentences use the terms of the field (CONTRIBUTING.md, "Language")."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.builders.runs import ROOT

CODE = sorted((ROOT / "kasa_cli").rglob("*.py"))
PAGES = sorted([*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])

NAMES = (
    "asked begun found given gone held kept led looked made one opened said says seen taken told wanted words"
)
"""Participles and pronouns that say nothing of the value they name."""

JSON_FIELDS = {"totals.py": {"kept"}}
"""Names that scripts read."""

WORDS = {
    "stranger": (r"\bstrangers?\b", "untrusted"),
    "papers": (r"\b(?:the|new|old|its|output'?s?) papers\b|\bpapers of\b", "model card and manifest"),
    "surgery": (r"\b(?:surgeon|patient)s?\b", "rewriter, tensor"),
    "tongue": (r"\btongues?\b|\ban eye\b", "vision encoder, language model"),
    "ends": (r"\bends of tied\b|\bends are tied\b|\bboth ends of the vocabulary\b", "tied weights"),
    "cut off": (r"\bcut off\b|\bcuts off\b", "truncated components"),
    "word in": (
        r"\b(?:a|several|many) words? in\b|\banything to say\b|\bto say (?:of|about) it\b",
        "contribution, score",
    ),
    "begun": (r"\bbegun\b", "initialised"),
    "whom": (r"\bof whom\b", "that"),
    "foretold": (r"\bforetold\b", "predicted"),
}
"""Vocabulary that an engineer has to guess at: a pattern, and the term to use."""


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.arg(arg=name) | ast.ExceptHandler(name=str(name)) | ast.alias(asname=str(name)):
                yield name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name


def names_of(path: Path) -> set[str]:
    used = {path.stem, *_names(ast.parse(path.read_text()))}
    return {name.strip("_") for name in used}


def sentences(path: Path) -> Iterator[str]:
    if path.suffix == ".md":
        yield path.read_text()
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.value


def vocabulary(text: str) -> dict[str, str]:
    text = re.sub(r"\s+", " ", text)
    return {
        word: better for word, (pattern, better) in WORDS.items() if re.search(pattern, text, re.IGNORECASE)
    }


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_name_is_a_participle_or_a_pronoun(path):
    assert not names_of(path) & set(NAMES.split()) - JSON_FIELDS.get(path.name, set())


@pytest.mark.parametrize("path", [*CODE, *PAGES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_sentences_use_the_terms_of_the_field(path):
    assert not vocabulary("\n".join(sentences(path)))


def test_the_patterns_spare_the_science():
    science = "as in the published papers; the paper's rank; the cut-off is relative; when the block ends; start at 0"
    assert not vocabulary(science)
    assert vocabulary("in a stranger's words") == {"stranger": "untrusted"}
