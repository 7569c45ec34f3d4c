"""The commands of kasa write the same bytes and figures as before: compared with the hashes in recorded.json."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from filelock import FileLock

from tests.product import record_outputs

KNOWN: dict[str, Any] = json.loads(record_outputs.FILE.read_text())
KIND = record_outputs.kind()
UNKNOWN = (
    f"nothing is recorded for this kind of machine ({KIND}): check out the commit that last changed "
    "tests/product/recorded.json (`git worktree add`), run `python -m tests.product.record_outputs` there, and "
    "copy its tests/product/recorded.json here"
)


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The hashes of all outputs of this tree, made once for all workers of a test run."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return recorded()
    file = tmp_path_factory.getbasetemp().parent / "recorded-outputs.json"
    with FileLock(file.with_suffix(".lock")):
        if not file.exists():
            file.write_text(json.dumps(recorded()))
    return json.loads(file.read_text())


def recorded() -> dict[str, Any]:
    command = [sys.executable, record_outputs.__file__, "--print"]
    environment = {**os.environ, **record_outputs.ENVIRONMENT}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.timeout(600)
@pytest.mark.skipif(KIND not in KNOWN, reason=UNKNOWN)
@pytest.mark.parametrize("name", record_outputs.CASES)
def test_outputs_are_those_recorded(name: str, outputs: dict[str, Any]) -> None:
    if name not in outputs:
        pytest.skip("the demo extra, which brings MiniLM, is not installed")
    if name not in KNOWN[KIND]:
        pytest.skip("this case is newer than the record of this kind of machine")
    before, now = KNOWN[KIND][name], outputs[name]
    changed = [part for part in sorted(before.keys() | now.keys()) if before.get(part) != now.get(part)]
    assert not changed, f"`kasa {record_outputs.CASES[name]}` changed {', '.join(changed)}"
