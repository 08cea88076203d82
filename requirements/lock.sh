#!/usr/bin/env bash
# Writes the locks of the image, with a hash of every file that may be installed: `make lock`.
# They follow constraints.txt, so what the tests run on is what the image gets. Needs uv.
set -euo pipefail
cd "$(dirname "$0")/.."
compile() {
  local lock=$1
  shift
  uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
    --constraint constraints.txt "$@" --output-file "requirements/$lock.lock"
}
# The image installs the project without build isolation, so with what builds it.
build=$(mktemp)
tool=$(mktemp)
trap 'rm -f "$build" "$tool"' EXIT
python3 -c "import tomllib; file = tomllib.load(open('pyproject.toml', 'rb')); \
print(*file['build-system']['requires'], sep='\n')" >"$build"
python3 -c "import tomllib; file = tomllib.load(open('pyproject.toml', 'rb')); \
print(*(one for one in file['project']['optional-dependencies']['audit'] if 'cyclonedx' in one), sep='\n')" >"$tool"
compile cpu --extra cpu --extra openvino --extra otel pyproject.toml "$build"
compile gpu --extra gpu --extra otel pyproject.toml "$build"
compile sbom "$tool"
