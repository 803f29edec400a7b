# syntax=docker/dockerfile:1
# Two images: `api` answers requests and computes nothing, `worker` runs the searches. Built by docker-compose.yml.
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS base
RUN useradd --system --uid 10001 --create-home --home-dir /home/bitfrontier bitfrontier \
  # A volume mounted here takes this owner.
  && install --directory --owner bitfrontier /home/bitfrontier/.cache
WORKDIR /app
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
RUN python -m pip install "pip>=25.1"

FROM base AS api
COPY pyproject.toml constraints.txt ./
RUN python -m pip install --constraint constraints.txt --group api
COPY . .
RUN python -m pip install --no-deps . && rm -rf /app/*
COPY docker/with-secrets /usr/local/bin/
USER bitfrontier
EXPOSE 8400
ENTRYPOINT ["with-secrets"]
CMD ["bitfrontier", "api", "--host", "0.0.0.0", "--port", "8400"]

FROM base AS worker
# "[gpu]" for the kernels; torch brings the rest of CUDA, and the host its driver.
ARG EXTRAS=
COPY . .
RUN python -m pip install --constraint constraints.txt ".${EXTRAS}" && rm -rf /app/*
COPY docker/with-secrets docker/join-ray docker/worker-healthy /usr/local/bin/
USER bitfrontier
ENTRYPOINT ["with-secrets", "join-ray"]
CMD ["python", "-m", "workers", "run"]
