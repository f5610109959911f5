#!/bin/sh
# A container's address is known once it runs; the others find it in the registry.
set -eu
case "${1:-}" in
  gateway | prefill | decode | colocate)
    if [ -z "${HEADRACE_BIND:-}" ]; then
      HEADRACE_BIND=$(hostname -i | cut -d' ' -f1)
      export HEADRACE_BIND
    fi
    ;;
esac
exec headrace "$@"
