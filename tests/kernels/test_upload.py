"""Arrays of different dtypes in one copy."""

from __future__ import annotations

import numpy as np
import torch

from headrace.kernels.upload import upload


def test_each_array_arrives_with_its_dtype_and_numbers() -> None:
    """Odd lengths and empty ones between others."""
    arrays = [np.arange(5), np.array([], np.int32), np.array([1.5, -2.5, 3.0]), np.arange(3, dtype=np.int32)]
    got = upload(arrays, torch.device("cpu"))
    assert [tensor.dtype for tensor in got] == [torch.int64, torch.int32, torch.float64, torch.int32]
    assert [tensor.tolist() for tensor in got] == [array.tolist() for array in arrays]
