# Two stages: the first has a compiler and builds the wheel, the second gets only the finished environment.
# Everything lives in /opt/venv, so a base image whose own Python is externally managed serves as well.
FROM python:3.11-slim-bookworm AS builder

# How pip reaches packages where the public index cannot be reached; they do not enter the final image.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST

RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/venv
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# The dependencies are a layer of their own: an edit of the source does not download them again.
WORKDIR /src
COPY pyproject.toml ./
RUN python3 -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > /tmp/requirements.txt \
    && /opt/venv/bin/pip install --requirement /tmp/requirements.txt

COPY . .
RUN /opt/venv/bin/pip wheel --no-deps --wheel-dir /tmp/dist . \
    && /opt/venv/bin/pip install --no-deps /tmp/dist/*.whl \
    && /opt/venv/bin/pip uninstall --yes --quiet setuptools pip


FROM python:3.11-slim-bookworm

# A fixed number, because the tmpfs volume of the runtime folder must belong to it (see docker-compose.yml).
RUN groupadd --gid 10001 xds \
    && useradd --uid 10001 --gid xds --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin xds
COPY --from=builder /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 8000
ENTRYPOINT ["/opt/venv/bin/xds"]
# Without arguments: a whole pod in one container (docker run --rm -p 127.0.0.1:8000:8000 --shm-size 1g xdeepserve).
CMD ["up", "--host", "0.0.0.0"]
