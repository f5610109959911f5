"""Serves a GGUF file with llama.cpp's server, for `headrace.loadtest.cpu_bench` to compare with.

Runs under the Python of a virtual environment that holds `xllamacpp`, and imports nothing of Headrace:

    PYTHON cpu_peers.py MODEL.gguf PORT STREAMS
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

CONTEXT = 512
"""Tokens of each stream."""


def main() -> None:
    """See above."""
    import xllamacpp  # type: ignore[import-not-found,unused-ignore]

    gguf, port, streams = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.hostnames = ["127.0.0.1"]
    params.port = port
    params.n_parallel = streams
    params.n_ctx = CONTEXT * streams
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
