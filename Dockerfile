# kasa on a CPU:            docker build -t kasa .
# kasa on a CUDA machine:   docker build -t kasa --build-arg BASE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime .
# Use:                      docker run --rm -v "$PWD:/data" kasa truncate /data/model -o /data/out
ARG BASE=python:3.12-slim
FROM ${BASE}

# PyTorch's index of CPU wheels, from its "get started" page, makes an image some gigabytes smaller.
ARG TORCH_INDEX=""

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY configs ./configs
COPY kasa_cli ./kasa_cli

# A base that brings torch keeps its own.
RUN python -c "import torch" 2>/dev/null \
    || pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' configs/constraints.txt)"
RUN grep -v '^torch==' configs/constraints.txt > /tmp/constraints.txt \
    && pip install --no-cache-dir -c /tmp/constraints.txt ".[demo]" \
    && useradd --create-home kasa

USER kasa
WORKDIR /data
ENTRYPOINT ["kasa"]
CMD ["--help"]
