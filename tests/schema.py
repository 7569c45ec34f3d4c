"""JSON schemas and tables of fields, from the types of reports and manifest: `python -m tests.schema` writes them.

They are in docs/schema/; `tests/product/test_schema.py` compares them with the types, and real outputs with them.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from kasa_cli import report
from kasa_cli.checkpoint.manifest import KINDS, SCHEMA
from kasa_cli.files.typed_json import first_key, inner

FOLDER = Path(__file__).parents[1] / "docs" / "schema"
REPORTS: dict[str, Any] = {
    "convert": report.ConvertReport,
    "convert-plan": report.ConvertPlan,
    "demo": report.DemoReport,
    "inspect-adapter": report.AdapterReport,
    "inspect-diff": report.DiffReport,
    "inspect-spectrum": report.SpectrumReport,
    "measure-plan": report.MeasurePlan,
    "merge": report.MergeReport,
    "merge-plan": report.MergePlan,
    "select-targets": report.SelectReport,
    "store": report.StoreReport,
    "truncate": report.TruncateReport,
    "truncate-plan": report.PlanReport,
    "verify": report.VerifyReport,
}
DIALECT = "https://json-schema.org/draft/2020-12/schema"
SCALARS: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    bool: {"type": "boolean"},
    float: {"type": ["number", "null"]},
    NoneType: {"type": "null"},
    Any: {},
}
"""A float that is not finite is null."""
HEAD = """\
# Fields of the JSON

`python -m tests.schema` writes this page and the schemas beside it from the types in `kasa_cli/report` and
`kasa_cli/checkpoint/manifest.py`. [reports.json](reports.json) describes what `--json` prints, with each report under
the name of its type in `$defs`; [manifest.json](manifest.json) describes `kasa.manifest.json`. A number that is not
finite is null; in reports, a further field with `_is` after its name says whether it is `inf` or `nan`.

| JSON | type |
|---|---|"""
WHAT_IS_NOT_FINITE = {"_is$": {}}
"""Fields of reports that say which float is not finite."""


class Schema:
    """The schema of one type, and the definitions of the types in it."""

    def __init__(self, *, is_report: bool) -> None:
        self.definitions: dict[str, dict[str, Any]] = {}
        self.is_report = is_report

    def of(self, kind: Any) -> dict[str, Any]:
        """The schema of a type; classes are referred to by their names."""
        if kind in SCALARS:
            return SCALARS[kind]
        if is_dataclass(kind) or is_typeddict(kind):
            if kind.__name__ not in self.definitions:
                self.definitions[kind.__name__] = {}
                self.definitions[kind.__name__] = self.record(kind)
            return {"$ref": f"#/$defs/{kind.__name__}"}
        origin, arguments = get_origin(kind), get_args(kind)
        if origin in (Union, UnionType):
            return {"anyOf": [self.of(one) for one in arguments]}
        if origin is tuple and arguments[-1] is not Ellipsis:
            items = [self.of(one) for one in arguments]
            return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
        if origin in (tuple, list):
            return {"type": "array", "items": self.of(arguments[0])}
        return {"type": "object", "additionalProperties": self.of(arguments[1])}

    def record(self, kind: Any) -> dict[str, Any]:
        """The schema of a class, with its docstring."""
        made: dict[str, Any] = {"type": "object", "properties": {}, "required": []}
        if is_typeddict(kind):
            made["properties"] = {name: self.of(hint) for name, hint in get_type_hints(kind).items()}
            made["required"] = sorted(kind.__required_keys__)
        else:
            self.add_fields(made, kind, is_required=True)
        if self.is_report:
            made["patternProperties"] = WHAT_IS_NOT_FINITE
        return {"description": " ".join((kind.__doc__ or "").split()), **made, "additionalProperties": False}

    def add_fields(self, made: dict[str, Any], kind: Any, *, is_required: bool) -> list[str]:
        """Add the fields of a class, and of those in line with it; the names of those always there."""
        names, hints = [], get_type_hints(kind)
        for field in shown(kind):
            hint = hints[field.name]
            if field.metadata.get("inline"):
                is_always = inner(hint) is hint
                own = self.add_fields(made, inner(hint), is_required=is_required and is_always)
                names += own if is_always else []
                if not is_always:
                    made.setdefault("dependentRequired", {})[first_key(inner(hint))] = own
            else:
                made["properties"][field.name] = self.of(hint)
                names += [] if field.metadata.get("optional") else [field.name]
        if is_required:
            made["required"] = [*dict.fromkeys((*made["required"], *names))]
        return names


def shown(kind: Any) -> "Iterator[Field[Any]]":
    """The fields of a dataclass that are in its JSON."""
    return (field for field in fields(kind) if field.metadata.get("json", True))


def reports() -> dict[str, Any]:
    """The schema of all reports; that of one is in `$defs`, under the name of its type."""
    schema = Schema(is_report=True)
    root = {"anyOf": [schema.of(kind) for kind in REPORTS.values()]}
    return {"$schema": DIALECT, **root, "$defs": dict(sorted(schema.definitions.items()))}


def manifest() -> dict[str, Any]:
    """The schema of kasa.manifest.json."""
    schema = Schema(is_report=False)
    root = {"oneOf": [schema.of(kind) for kind in KINDS.values()]}
    for command, kind in KINDS.items():
        definition = schema.definitions[kind.__name__]
        more = {"command": {"const": command}, "schema": {"const": SCHEMA}, "digest": {"type": "string"}}
        definition["properties"] |= more
        definition["required"] += ["schema", "digest"]
    return {"$schema": DIALECT, **root, "$defs": dict(sorted(schema.definitions.items()))}


def of_report(name: str) -> dict[str, Any]:
    """The schema of one report."""
    return {**reports(), "anyOf": [{"$ref": f"#/$defs/{REPORTS[name].__name__}"}]}


def type_text(schema: Mapping[str, Any]) -> str:
    """A schema in a cell of a table."""
    return " or ".join(dict.fromkeys(type_names(schema)))


def type_names(schema: Mapping[str, Any]) -> list[str]:
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return [f"[{name}](#{name.lower()})"]
    if "const" in schema:
        return [f"`{json.dumps(schema['const'])}`"]
    if "anyOf" in schema:
        return sorted([name for one in schema["anyOf"] for name in type_names(one)], key="null".__eq__)
    kind = schema.get("type", "anything")
    if kind == "array":
        items = schema.get("prefixItems", [schema.get("items", {})])
        return [f"list of {', '.join(map(type_text, items))}"]
    if kind == "object":
        return [f"map to {type_text(schema['additionalProperties'])}"]
    return list(kind) if isinstance(kind, list) else [str(kind)]


def table(name: str, definition: Mapping[str, Any]) -> str:
    """The fields of a class as a section."""
    required = set(definition["required"])
    lines = [f"## {name}", "", definition["description"], "", "| field | type |", "|---|---|"]
    for field, schema in definition["properties"].items():
        lines.append(f"| `{field}` | {type_text(schema)}{'' if field in required else ', may be absent'} |")
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """All files of docs/schema, by name."""
    schemas = {"reports": reports(), "manifest": manifest()}
    rows = [f"| {name} | [{kind.__name__}](#{kind.__name__.lower()}) |" for name, kind in REPORTS.items()]
    rows += [
        f"| manifest of {name} | [{kind.__name__}](#{kind.__name__.lower()}) |"
        for name, kind in KINDS.items()
    ]
    classes = {name: value for schema in schemas.values() for name, value in schema["$defs"].items()}
    sections = [table(name, definition) for name, definition in sorted(classes.items())]
    return {
        **{f"{name}.json": lines(schema) for name, schema in schemas.items()},
        "README.md": "\n".join([HEAD, *rows, "", "\n\n".join(sections), ""]),
    }


def lines(schema: dict[str, Any]) -> str:
    """JSON with one line for each definition."""
    definitions = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in schema["$defs"].items()]
    head = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in schema.items() if key != "$defs"]
    return "\n".join(["{", *head, ' "$defs": {', ",\n".join(definitions), " }", "}", ""])


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
