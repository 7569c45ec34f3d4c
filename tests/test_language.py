"""Names are nouns and verbs, and sentences use the terms of the field (CONTRIBUTING.md, "Language").

`python tests/test_language.py` prints the occurrences that are left, as entries of NAMES_LEFT and WORDS_LEFT. The
two tables only shrink: an entry without an occurrence fails, too.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

HOME = Path(__file__).parent.parent
CODE = sorted((HOME / "kasa_cli").rglob("*.py"))
PAGES = sorted([*(HOME / "docs").glob("*.md"), HOME / "README.md", HOME / "CONTRIBUTING.md"])

NAMES = (
    "asked begun found given gone held kept led looked made one opened said says seen taken told wanted words"
)
"""Participles and pronouns that say nothing of the value they name."""

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

NAMES_LEFT: dict[str, str] = {
    "kasa_cli/adapters/adapter.py": "one",
    "kasa_cli/adapters/base.py": "held",
    "kasa_cli/adapters/lora_lite.py": "kept",
    "kasa_cli/adapters/module_settings.py": "kept",
    "kasa_cli/adapters/parameter_placement.py": "one",
    "kasa_cli/adapters/peft.py": "kept wanted",
    "kasa_cli/adapters/placement.py": "held one wanted",
    "kasa_cli/adapters/reading.py": "held one taken",
    "kasa_cli/adapters/saved_parameters.py": "held",
    "kasa_cli/adapters/tied.py": "one",
    "kasa_cli/adapters/writing.py": "one",
    "kasa_cli/checkpoint/folder.py": "found",
    "kasa_cli/checkpoint/layout.py": "found",
    "kasa_cli/checkpoint/open_files.py": "found",
    "kasa_cli/checkpoint/safetensors_file.py": "held",
    "kasa_cli/checkpoint/shard_plan.py": "kept",
    "kasa_cli/checkpoint/source.py": "taken wanted",
    "kasa_cli/cli/app.py": "wanted",
    "kasa_cli/cli/presets.py": "seen",
    "kasa_cli/files/durable.py": "opened",
    "kasa_cli/files/staging.py": "kept",
    "kasa_cli/files/store.py": "opened",
    "kasa_cli/files/typed_json.py": "made one",
    "kasa_cli/methods/adapter_kinds/as_lora.py": "held",
    "kasa_cli/methods/adapter_kinds/given.py": "given held wanted",
    "kasa_cli/methods/adapter_kinds/kind.py": "kept one wanted",
    "kasa_cli/methods/adapter_kinds/lora.py": "one",
    "kasa_cli/methods/adapter_kinds/lora_experts.py": "wanted",
    "kasa_cli/methods/adapter_kinds/low_rank.py": "kept",
    "kasa_cli/methods/adapter_kinds/products.py": "wanted",
    "kasa_cli/methods/adapter_kinds/table.py": "one",
    "kasa_cli/model_names/conversion.py": "taken",
    "kasa_cli/model_names/experts.py": "found",
    "kasa_cli/model_names/meta_model.py": "found made said wanted",
    "kasa_cli/model_names/name_cache.py": "asked one",
    "kasa_cli/model_names/name_map.py": "found wanted",
    "kasa_cli/model_names/names.py": "held",
    "kasa_cli/model_names/tied_weights.py": "held",
    "kasa_cli/pipeline/adapter_on_base/provenance.py": "asked",
    "kasa_cli/pipeline/adapter_on_base/truncated_part.py": "wanted",
    "kasa_cli/pipeline/base_writer.py": "opened",
    "kasa_cli/pipeline/converting/case.py": "one",
    "kasa_cli/pipeline/converting/factors.py": "made one",
    "kasa_cli/pipeline/converting/records.py": "one",
    "kasa_cli/pipeline/converting/representable.py": "held one",
    "kasa_cli/pipeline/converting/run.py": "held one",
    "kasa_cli/pipeline/costs.py": "held",
    "kasa_cli/pipeline/inspecting/adapter.py": "one opened",
    "kasa_cli/pipeline/inspecting/diff.py": "one",
    "kasa_cli/pipeline/inspecting/run_adapter.py": "asked given held one opened seen",
    "kasa_cli/pipeline/inspecting/run_diff.py": "found one",
    "kasa_cli/pipeline/inspecting/run_spectrum.py": "asked one",
    "kasa_cli/pipeline/inspecting/share_in_cut.py": "asked found",
    "kasa_cli/pipeline/inspecting/spectrum.py": "wanted",
    "kasa_cli/pipeline/kept_facts.py": "found held one opened",
    "kasa_cli/pipeline/measuring/facts.py": "found wanted",
    "kasa_cli/pipeline/measuring/many.py": "given",
    "kasa_cli/pipeline/measuring/plan.py": "found",
    "kasa_cli/pipeline/merging/by_rows.py": "one opened",
    "kasa_cli/pipeline/merging/case.py": "one",
    "kasa_cli/pipeline/merging/edits.py": "one",
    "kasa_cli/pipeline/merging/layout.py": "held one taken",
    "kasa_cli/pipeline/merging/merger.py": "one",
    "kasa_cli/pipeline/merging/run.py": "held one",
    "kasa_cli/pipeline/merging/whole_tensor.py": "one wanted",
    "kasa_cli/pipeline/selecting/export.py": "one",
    "kasa_cli/pipeline/selecting/ranking.py": "kept one seen",
    "kasa_cli/pipeline/selecting/run.py": "asked found given one",
    "kasa_cli/pipeline/truncating/adapter_and_tail.py": "begun made one",
    "kasa_cli/pipeline/truncating/factors.py": "found",
    "kasa_cli/pipeline/truncating/options.py": "given",
    "kasa_cli/pipeline/truncating/rewrite.py": "one",
    "kasa_cli/pipeline/truncating/run.py": "found made one",
    "kasa_cli/pipeline/verifying/integrity.py": "found",
    "kasa_cli/pipeline/verifying/recompute.py": "given held one wanted",
    "kasa_cli/pipeline/verifying/run.py": "found",
    "kasa_cli/report/totals.py": "kept",
    "kasa_cli/targets/candidates.py": "found one",
    "kasa_cli/targets/peft_trial.py": "found said wanted",
    "kasa_cli/targets/selection.py": "found held",
    "kasa_cli/targets/trainer_configs.py": "found says wanted",
}  # fmt: skip
WORDS_LEFT: dict[str, str] = {
    "kasa_cli/report/convert.py": "foretold",
}  # fmt: skip


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.arg(arg=name) | ast.ExceptHandler(name=str(name)) | ast.alias(asname=str(name)):
                yield name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name


def _names_left(path: Path) -> set[str]:
    used = {path.stem, *_names(ast.parse(path.read_text()))}
    return {name.strip("_") for name in used} & set(NAMES.split())


def _sentences(path: Path) -> Iterator[str]:
    if path.suffix == ".md":
        yield path.read_text()
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.value


def _words_left(path: Path) -> set[str]:
    text = "\n".join(re.sub(r"\s+", " ", sentence) for sentence in _sentences(path))
    return {word for word, (pattern, _) in WORDS.items() if re.search(pattern, text, re.IGNORECASE)}


def _table(left: dict[Path, set[str]]) -> dict[str, set[str]]:
    return {path.relative_to(HOME).as_posix(): entries for path, entries in left.items() if entries}


def names_left() -> dict[str, set[str]]:
    return _table({path: _names_left(path) for path in CODE})


def words_left() -> dict[str, set[str]]:
    return _table({path: _words_left(path) for path in [*CODE, *PAGES]})


def _split(table: dict[str, str], separator: str) -> dict[str, set[str]]:
    return {path: set(entries.split(separator)) for path, entries in table.items()}


def _without(table: dict[str, set[str]], other: dict[str, set[str]]) -> dict[str, list[str]]:
    rest = defaultdict(set, other)
    return {path: sorted(entries - rest[path]) for path, entries in table.items() if entries - rest[path]}


def test_no_name_is_on_the_list():
    assert not _without(names_left(), _split(NAMES_LEFT, " "))


def test_sentences_use_the_terms_of_the_field():
    new = _without(words_left(), _split(WORDS_LEFT, ", "))
    assert not new, {word: WORDS[word][1] for entries in new.values() for word in entries}


def test_what_is_fixed_is_off_the_lists():
    assert not _without(_split(NAMES_LEFT, " "), names_left())
    assert not _without(_split(WORDS_LEFT, ", "), words_left())


def test_the_patterns_spare_the_science():
    science = "as in the published papers; the paper's rank; the cut-off is relative; when the block ends; start at 0"
    assert not [word for word, (pattern, _) in WORDS.items() if re.search(pattern, science)]
    assert re.search(WORDS["stranger"][0], "in a stranger's words")


if __name__ == "__main__":
    for table, separator in ((names_left(), " "), (words_left(), ", ")):
        print(
            "{\n"
            + "".join(f'    "{path}": "{separator.join(sorted(e))}",\n' for path, e in table.items())
            + "}"
        )
