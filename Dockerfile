# The service in one image. It keeps everything in /data and listens on 8000; docs/operations.md says more.
#
#   docker build --tag passerby:cpu .
#   docker build --tag passerby:gpu --build-arg INDEX=gpu .     # with faiss-gpu and all of CUDA
#
# `make image` also says of which revision it is.

# The dependencies are gigabytes and change rarely: a layer of their own, below the code. Each file is held to the
# hashes of the lock (requirements/lock.sh writes it), and nothing that is not in it is installed.
FROM python:3.11-slim AS dependencies
ARG INDEX=cpu
WORKDIR /app
COPY requirements/${INDEX}.lock requirements.lock
# On a CPU goes, in the same layer, what PyTorch's only published build brings for a GPU and loads when it finds one:
# a compiler (Triton), the engines of cuDNN, code for devices. What its libraries are linked with has to stay. OpenVINO
# comes with a package that sends usage data to its makers, and does without it.
RUN pip install --no-cache-dir --root-user-action=ignore --disable-pip-version-check \
      --require-hashes --requirement requirements.lock \
 && if [ "$INDEX" = cpu ]; then \
      pip uninstall --yes --quiet --root-user-action=ignore --disable-pip-version-check triton openvino-telemetry \
      && packages=$(python -c "import sysconfig; print(sysconfig.get_path('purelib'))") \
      && find "$packages/nvidia" -type f \( -name 'libcudnn_*.so*' -o -name '*.a' -o -name '*.bc' -o -name '*.h' \
           -o -name '*.hpp' -o -name '*.cuh' -o -name 'libcusolverMg.so*' -o -name 'libnvperf_*.so*' \
           -o -name 'libnvblas.so*' -o -name 'libpcsamplingutil.so*' -o -name 'libcheckpoint.so*' \) -delete; \
    fi


# What is in the image, as a list that machines read (CycloneDX): of the very packages, by a tool that stays outside.
FROM dependencies AS materials
COPY requirements/sbom.lock sbom.lock
COPY pyproject.toml .
RUN python -m venv /tool \
 && /tool/bin/pip install --no-cache-dir --disable-pip-version-check --require-hashes --requirement sbom.lock \
 && /tool/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
      --output-file /sbom.cdx.json "$(command -v python)"


FROM dependencies
# A fixed number, so that the owner of a volume or of a mounted file can be set from outside.
RUN groupadd --gid 10001 passerby \
 && useradd --uid 10001 --gid passerby --create-home --shell /usr/sbin/nologin passerby \
 && install --directory --owner passerby --group passerby --mode 0700 /data

COPY --from=materials /sbom.cdx.json /usr/share/passerby/sbom.cdx.json

# What .dockerignore lets through. Installed in place, so that the weights beside the code are found. A checkout made
# under a strict umask is nobody else's to read, and the service is not root: only such files are changed.
COPY . .
RUN pip install --no-cache-dir --root-user-action=ignore --disable-pip-version-check \
      --no-deps --no-build-isolation --editable . \
 && find . ! -perm -o=r -exec chmod a+rX {} + \
 && python -m compileall -q model index service

# Last of all, because they change with every build.
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Passerby" \
      org.opencontainers.image.description="Video person re-identification as a service" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.base.name="python:3.11-slim"

# The root file system may be read-only: what libraries want to keep beside the data goes to /tmp.
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MPLCONFIGDIR=/tmp/matplotlib \
    XDG_CACHE_HOME=/tmp/cache \
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
