"""Triton where it can run: on a GPU, or in its interpreter (`TRITON_INTERPRET=1`, set before this is imported).

Elsewhere it need not be installed, and its import would only slow down the start: kernels are defined as plain
functions that nobody calls, since their dispatch functions take the torch path for tensors on a CPU.
"""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch

from headrace.kernels.launch import INTERPRETED


def _leave_alone(function: Any = None, **options: Any) -> Any:
    return (lambda function: function) if function is None else function


triton: Any = SimpleNamespace(jit=_leave_alone)
tl: Any = None
TensorDescriptor: Any = None

if INTERPRETED or torch.cuda.is_available():
    triton = import_module("triton")
    tl = import_module("triton.language")
    TensorDescriptor = import_module("triton.tools.tensor_descriptor").TensorDescriptor
