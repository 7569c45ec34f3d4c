"""`python -m tests`: everything a reviewer or CI asks for, in one command, stopping at nothing.

Lint, types, the import contract, then pytest with doctests and with shape checks on the maths modules.
`python -m tests tests/linalg -k kappa` passes its arguments on to pytest, and runs these tests before the linters.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONTRACT = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
LINTERS = {
    "lint": ["-m", "ruff", "check", "."],
    "format": ["-m", "ruff", "format", "--check", "."],
    "types": ["-m", "mypy"],
    "contract": ["-c", CONTRACT],
}
ALL_TESTS = ["-n", "auto", "--dist", "loadfile"]


def main(arguments: list[str]) -> int:
    tests = {"tests": ["-m", "pytest", *(arguments or ALL_TESTS)]}
    failed = []
    for name, command in ({**tests, **LINTERS} if arguments else {**LINTERS, **tests}).items():
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, *command], cwd=ROOT).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
