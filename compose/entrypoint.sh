#!/bin/sh
# A container's address and name are known once it runs; the others find them in the registry.
set -eu
case "${1:-}" in
  gateway | prefill | decode | colocate)
    HEADRACE_BIND=${HEADRACE_BIND:-$(hostname -i | cut -d' ' -f1)}
    HEADRACE_WORKER_ID=${HEADRACE_WORKER_ID:-$1-$(hostname)}
    export HEADRACE_BIND HEADRACE_WORKER_ID
    ;;
esac
exec headrace "$@"
