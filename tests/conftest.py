"""Every test runs offline, on one BLAS thread, and keeps the user's cache and store out of it."""

import os
import tempfile

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")

SHARED = tempfile.TemporaryDirectory(prefix="kasa-tests-")
os.environ["KASA_STORE"] = SHARED.name


@pytest.fixture(autouse=True)
def store(tmp_path_factory, monkeypatch):
    """A store of its own for each test, so that none knows what another measured."""
    folder = tmp_path_factory.mktemp("store")
    monkeypatch.setenv("KASA_STORE", str(folder))
    return folder
