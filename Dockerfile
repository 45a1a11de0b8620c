# One image for the six processes: `docker run IMAGE services.cache` runs one of them. It holds no secret and no data,
# runs as nobody in particular (10001), writes only below /data and /tmp, and needs no init: every process handles SIGTERM.

FROM python:3.11-slim-bookworm AS build
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /app
COPY requirements.txt ./
# Behind a mirror: docker build --secret id=pip_conf,src=$HOME/.config/pip/pip.conf (it does not get into the image).
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    pip install --no-cache-dir --disable-pip-version-check --require-hashes --only-binary=:all: -r requirements.txt
COPY tools/generate.py tools/
COPY protos/openmanager protos/openmanager
RUN python tools/generate.py && rm -r protos tools requirements.txt
COPY runtime runtime
COPY fleet fleet
COPY services services
COPY gateway gateway
COPY deploy/compose/healthcheck.py deploy/compose/install-tls ./
# Compiled here, since the running container cannot write; readable whatever the umask of the checkout was.
RUN python -m compileall -q --invalidation-mode unchecked-hash . && chmod -R a+rX,go-w .

FROM python:3.11-slim-bookworm
RUN groupadd --gid 10001 openmanager \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin openmanager \
    && install -d -o 10001 -g 10001 -m 0700 /data
COPY --from=build /opt/venv /opt/venv
COPY --from=build /app /app
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app:/app/gen \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DATA_DIR=/data
WORKDIR /app
USER 10001:10001
ENTRYPOINT ["python", "-m"]
CMD ["gateway"]
