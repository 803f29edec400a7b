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
COPY docker/with-secrets /usr/local/bin/with-secrets
USER bitfrontier
EXPOSE 8400
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8400/healthz', timeout=2)"]
ENTRYPOINT ["with-secrets"]
CMD ["uvicorn", "api.app:create_app", "--factory", "--host", "0.0.0.0", "--port", "8400"]

FROM base AS worker
COPY . .
RUN python -m pip install --constraint constraints.txt . && rm -rf /app/*
COPY docker/with-secrets /usr/local/bin/with-secrets
USER bitfrontier
ENTRYPOINT ["with-secrets"]
CMD ["python", "-m", "workers", "run"]
