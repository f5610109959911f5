"""Triton's interpreter knows no Gluon, so without a GPU these kernels are only compiled."""

from __future__ import annotations

import os
import subprocess
import sys


def test_gluon_kernels_compile_for_a_hopper_gpu() -> None:
    """In a process of its own: here, kernels are interpreted."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "tests.kernels.compile_for_hopper"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "10 kernels compiled\n"
