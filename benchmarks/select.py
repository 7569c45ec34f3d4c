"""How much faster, and in how much less memory, than PEFT are targets chosen by condition number?

    python benchmarks/select.py --width 4096 --layers 2
    python benchmarks/select.py --width 2048 --layers 8

Both start from the same files, in processes of their own, one after the other, and must choose the same modules.
PEFT: `from_pretrained`, then `peft.helpers.find_kappa_target_modules`. The second question is another share of the
same model (kasa reads and hashes), and the third asks for the whole spectrum of each weight.
About four seconds of either contender are imports, so few layers say little.
"""

import sys

FOLDER = sys.path.pop(0)  # where this file would be taken for the `select` of the standard library
import selectors  # noqa: E402, F401

sys.path.insert(0, FOLDER)

import argparse  # noqa: E402
import json  # noqa: E402
import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402

import llama_shaped  # noqa: E402
from measuring import Usage, gib, measured, show  # noqa: E402

TOP_P = 0.2


def peft(model: str, file: str) -> None:
    from peft.helpers import find_kappa_target_modules
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    found = find_kappa_target_modules(loaded, top_p=TOP_P, show_progress=False)
    Path(file).write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
        model = str(llama_shaped.write(place / "model", arguments.width, arguments.layers))
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
