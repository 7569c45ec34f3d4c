"""Every test runs offline, on one BLAS thread, and keeps the user's cache out of it."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
