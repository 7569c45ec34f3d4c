"""`python -m tests`: everything a reviewer or CI asks for, in one command, stopping at nothing.

Lint, types, the import contract, then pytest with doctests and with shape checks on the maths modules.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CHECKS = {
    "lint": ["ruff", "check", "."],
    "format": ["ruff", "format", "--check", "."],
    "types": ["mypy"],
    "contract": ["importlinter.cli", "lint-imports"],
    "tests": ["pytest", "-n", "auto", "--dist", "loadfile"],
}


def command(name: str, arguments: list[str]) -> list[str]:
    if name == "contract":
        run = (
            "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
        )
        return [sys.executable, "-c", run]
    return [sys.executable, "-m", *CHECKS[name], *(arguments if name == "tests" else [])]


def main() -> int:
    failed = []
    for name in CHECKS:
        print(f"== {name}", flush=True)
        if subprocess.run(command(name, sys.argv[1:]), cwd=ROOT).returncode:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all checks passed")
    return bool(failed)


sys.exit(main())
