"""x @ weight.T + bias with weights in the form that suits the device."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F

BLOCKING_ROWS = 512
"""oneDNN picks its weight layout for a number of rows. The one for many is the best for few, too: for 1 to 64 rows it
took 50 to 80 % of F.linear's time here, and 1.0 at 512."""


class Projection(Protocol):
    """x @ weight.T + bias for a weight [out, in]."""

    @property
    def weight(self) -> torch.Tensor:
        """[out, in]."""

    @property
    def weight_scale(self) -> torch.Tensor | None:
        """float32 [out]: what each row of `weight` is to be multiplied by."""

    @property
    def bias(self) -> torch.Tensor | None:
        """[out]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply x [T, in]; returns [T, out]."""


class Linear:
    """One projection [out, in]; on a CPU its weight is kept in oneDNN's blocked layout only."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._bias = bias
        self._blocked = _suits_onednn(weight)
        if self._blocked:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), BLOCKING_ROWS)
        else:
            self._weight = weight.contiguous()

    @property
    def weight(self) -> torch.Tensor:
        """[out, in]; on a device that keeps it so."""
        assert not self._blocked, "oneDNN keeps this weight in blocks"
        weight: torch.Tensor = self._weight
        return weight

    @property
    def weight_scale(self) -> None:
        """See `Projection`."""
        return None

    @property
    def bias(self) -> torch.Tensor | None:
        """[out]."""
        return self._bias

    def to_float32(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Multiply x [T, in] and store the float32 sums, without rounding them first, to out [T, out]."""
        if x.is_cuda:
            torch.mm(x, self.weight.T, out_dtype=torch.float32, out=out)
        else:
            out.copy_(self(x))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """See `Projection`."""
        if self._blocked:
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return y
        return F.linear(x, self._weight, self._bias)


def _suits_onednn(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
