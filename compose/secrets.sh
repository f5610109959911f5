#!/bin/sh
# Makes the secrets that the stack is started with, in compose/secrets or the folder that is named; keeps those that are there.
# The folder is for its owner only. The files in it can be read by all, since each container has a user of its own.
set -eu
cd "$(dirname "$0")"
folder=${1:-secrets}
mkdir -p "$folder"
chmod 700 "$folder"
random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
put() { if [ ! -e "$folder/$1" ]; then cat > "$folder/.$1" && chmod 444 "$folder/.$1" && mv "$folder/.$1" "$folder/$1"; fi; }

random | put api_key
random | put grafana_password
if [ ! -e "$folder/redis_acl" ]; then
  password=$(random)
  echo "user default on >$password ~* &* +@all" | put redis_acl
  rm -f "$folder/redis_url"
  echo "redis://:$password@redis:6379/0" | put redis_url
fi
if [ ! -e "$folder/mesh_key" ]; then
  docker compose build gateway
  docker run --rm --network none --read-only --tmpfs /tmp --entrypoint sh "headrace-gateway:${HEADRACE_TAG:-latest}" \
    -c 'headrace keys /tmp/mesh_key >/dev/null && cat /tmp/mesh_key' | put mesh_key
  [ -s "$folder/mesh_key" ] || { rm -f "$folder/mesh_key"; echo "no mesh key was made" >&2; exit 1; }
fi
echo "secrets are in $folder"
