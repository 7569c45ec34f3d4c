"""Every test runs offline and on one BLAS thread, and does not touch the user's cache or store."""

import atexit
import os
import tempfile

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from tests.builders import shared

STORE = tempfile.TemporaryDirectory(prefix="kasa-tests-")
atexit.register(STORE.cleanup)
os.environ["KASA_STORE"] = STORE.name


@pytest.fixture(autouse=True, scope="session")
def shared_folder(tmp_path_factory):
    """What the builders build once for all tests of a process."""
    shared.start(tmp_path_factory.mktemp("shared"))
    yield
    assert shared.changes() == [], "a test wrote into files that all tests share"


@pytest.fixture(autouse=True)
def store(tmp_path_factory, monkeypatch):
    """An empty store for each test, so that no test depends on measurements of another."""
    folder = tmp_path_factory.mktemp("store")
    monkeypatch.setenv("KASA_STORE", str(folder))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that the tests of a file share."""
    return tmp_path_factory.mktemp("folder")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint of eight small weights that the tests of a file share; nothing lies beside it."""
    from tests.builders.checkpoints import plain_model  # imports torch, which not every test needs

    return plain_model(tmp_path_factory.mktemp("plain") / "model")
