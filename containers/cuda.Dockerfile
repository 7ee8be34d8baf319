# infini-ds for NVIDIA GPUs: docker build -f containers/cuda.Dockerfile -t infini-ds:cuda .
# BASE needs nvcc, with which DeepSpeed compiles its optimizers at the first start, and the major
# version of CUDA that torch brings (`python -c "import torch; print(torch.version.cuda)"`).
ARG BASE=nvidia/cuda:13.0.1-devel-ubuntu24.04
# hadolint ignore=DL3006
FROM ${BASE}

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        g++ git libaio-dev make ninja-build openssh-client pdsh python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/environment
ENV PATH=/opt/environment/bin:$PATH

WORKDIR /opt/infini_ds
COPY constraints.txt pyproject.toml README.md LICENSE ./
RUN pip install --no-cache-dir -c constraints.txt torch==2.13.0

COPY configs configs
COPY launch launch
COPY infini_ds infini_ds
RUN pip install --no-cache-dir -c constraints.txt '.[cuda,wandb,report]' \
    && useradd --create-home --uid 1001 trainer
USER 1001
WORKDIR /work
CMD ["infini-ds", "configs"]
