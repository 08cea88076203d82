# The service in one image. It keeps everything in /data and listens on 8000; docs/operations.md says more.
#
#   docker build --tag passerby:cpu .
#   docker build --tag passerby:gpu --build-arg INDEX=gpu .     # the same with faiss-gpu

# What to install, and nothing else of pyproject.toml: a change of a lint rule is not to install torch again.
FROM python:3.11-slim AS requirements
ARG INDEX=cpu
COPY pyproject.toml .
RUN case "$INDEX" in cpu|gpu) ;; *) echo "INDEX: expected cpu or gpu, got $INDEX" >&2; exit 1 ;; esac \
 && python -c "import tomllib; \
file = tomllib.load(open('pyproject.toml', 'rb')); \
project = file['project']; \
extras = {'cpu': ['cpu', 'openvino'], 'gpu': ['gpu']}['$INDEX']; \
extra = [one for name in extras for one in project['optional-dependencies'][name]]; \
print(*file['build-system']['requires'], *project['dependencies'], *extra, sep='\n')" \
  > /requirements.txt


FROM python:3.11-slim
LABEL org.opencontainers.image.title="Passerby" \
      org.opencontainers.image.description="Video person re-identification as a service" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="python:3.11-slim"

# A fixed number, so that the owner of a volume or of a mounted file can be set from outside.
RUN groupadd --gid 10001 passerby \
 && useradd --uid 10001 --gid passerby --create-home --shell /usr/sbin/nologin passerby \
 && install --directory --owner passerby --group passerby --mode 0700 /data

# The dependencies are gigabytes and change rarely: a layer of their own, below the code.
WORKDIR /app
COPY --from=requirements /requirements.txt .
COPY constraints.txt .
RUN pip install --no-cache-dir --root-user-action=ignore --disable-pip-version-check \
      --requirement requirements.txt --constraint constraints.txt

# What .dockerignore lets through. Installed in place, so that the weights beside the code are found. A checkout made
# under a strict umask is nobody else's to read, and the service is not root: only such files are changed.
COPY . .
RUN pip install --no-cache-dir --root-user-action=ignore --disable-pip-version-check \
      --no-deps --no-build-isolation --editable . \
 && find . ! -perm -o=r -exec chmod a+rX {} + \
 && python -m compileall -q model index service

ENV PYTHONUNBUFFERED=1 \
    PASSERBY_HOST=0.0.0.0 \
    PASSERBY_DATA_DIR=/data \
    PASSERBY_LOG_FORMAT=json
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
USER 10001:10001

# http.client, because it takes no notice of a proxy in the environment. /readyz needs no key.
HEALTHCHECK --interval=15s --timeout=10s --start-period=120s --retries=3 \
  CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('PASSERBY_PORT', 8000)), timeout=8); c.request('GET', '/readyz'); sys.exit(c.getresponse().status != 200)"]

ENTRYPOINT ["passerby", "serve"]
