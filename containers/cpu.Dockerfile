# infini-ds for CPUs: docker build -f containers/cpu.Dockerfile -t infini-ds:cpu .
FROM python:3.11-slim-trixie

# The compiler is for DeepSpeed's operators, ssh and pdsh for runs over several hosts.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git make openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/infini_ds
COPY constraints.txt pyproject.toml README.md LICENSE ./
# Without this index pip takes the CUDA build.
RUN pip install --no-cache-dir -c constraints.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu

COPY configs configs
COPY launch launch
COPY infini_ds infini_ds
RUN pip install --no-cache-dir -c constraints.txt '.[wandb,report]' \
    && useradd --create-home --uid 1000 trainer

ENV DS_ACCELERATOR=cpu
USER 1000
WORKDIR /work
CMD ["infini-ds", "configs"]
