"""PEFT's choice of targets against kasa's; run it as benchmarks/select.py."""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from measuring import Usage, gib, llama_shaped, measured, show

TOP_P = 0.2


def peft(model: str, file: str) -> None:
    from peft.helpers import find_kappa_target_modules
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    found = find_kappa_target_modules(loaded, top_p=TOP_P, show_progress=False)
    Path(file).write_text(json.dumps(found))


def main(about: str | None = __doc__) -> None:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--without-peft", action="store_true", help="only kasa")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--run", nargs=2, metavar=("MODEL", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        peft(*arguments.run)
        return
    figures = compare(arguments)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({name: vars(usage) for name, usage in figures.items()}, indent=1)
        )


def compare(arguments: argparse.Namespace) -> dict[str, Usage]:
    with tempfile.TemporaryDirectory(prefix="kasa-bench-") as name:
        place = Path(name)
        model = str(llama_shaped(place / "model", arguments.width, arguments.layers))
        size = sum(file.stat().st_size for file in Path(model).iterdir())
        print(f"Llama-shaped, width {arguments.width}, {arguments.layers} layers, bfloat16, {gib(size)}")
        figures = {
            "kasa": ask(model, place, arguments.workers, "first", "select-targets", "--top-p", str(TOP_P)),
            "kasa, again": ask(model, place, arguments.workers, "again", "select-targets", "--top-p", "0.5"),
            "kasa, spectra": ask(model, place, arguments.workers, "spectra", "inspect", "spectrum"),
        }
        if not arguments.without_peft:
            command = [sys.executable, __file__, "--run", model, str(place / "peft.json")]
            figures["PEFT"] = measured(command, arguments.workers)
        show(figures)
        report(place)
    return figures


def ask(model: str, place: Path, workers: int, name: str, *verb: str) -> Usage:
    """One question, its JSON kept."""
    command = [
        sys.executable,
        "-m",
        "kasa_cli",
        *verb,
        model,
        "--store",
        str(place / "store"),
        "-q",
        "--json",
    ]
    return measured([*command, "--workers", str(workers)], output=place / f"{name}.json")


def report(place: Path) -> None:
    """What was decomposed, and whether both chose the same."""
    for name in ("first", "again", "spectra"):
        totals = json.loads((place / f"{name}.json").read_text())["totals"]
        print(
            f"{name:8} {totals['decompositions']:4} decompositions, {totals['decompositions_reused']:4} reused"
        )
    if (place / "peft.json").exists():
        theirs = json.loads((place / "peft.json").read_text())["target_modules"]
        ours = json.loads((place / "first.json").read_text())["target_modules"]
        print(
            f"{len(ours)} modules chosen; {'the same' if ours == theirs else 'NOT the same'} as PEFT's, in order"
        )


if __name__ == "__main__":
    main()
