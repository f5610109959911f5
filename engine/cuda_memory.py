"""GPU memory that processes of one machine share, by handles of the CUDA driver (CUDA Driver API, section 6.13).

A handle names a whole allocation; whoever opens it can read and write all of it, so it is given to members of the mesh
alone. An opened allocation stays valid as long as the process that made it lives.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

HANDLE_BYTES = 64
LAZY_PEER_ACCESS = 1
PORTABLE = 1
"""cudaHostRegisterPortable: pinned for all contexts of this process."""


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * HANDLE_BYTES)]


@cache
def _driver() -> Any:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuIpcOpenMemHandle_v2.argtypes = (ctypes.c_void_p, _Handle, ctypes.c_uint)
    return driver


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(f"{what} failed with CUDA error {result}")


def share(tensor: torch.Tensor) -> tuple[bytes, int]:
    """A CUipcMemHandle for the allocation that a contiguous tensor is part of, and where in it, in bytes.

    Raises `OSError` where the driver gives none.
    """
    base, _ = _allocation(tensor.data_ptr())
    handle = _Handle()
    _check(_driver().cuIpcGetMemHandle(ctypes.byref(handle), ctypes.c_uint64(base)), "cuIpcGetMemHandle")
    return bytes(memoryview(handle)), tensor.data_ptr() - base


def device_uuid(device: torch.device) -> str:
    """What names a device in all processes."""
    return str(torch.cuda.get_device_properties(device).uuid)


def find_device(uuid: str, reader: torch.device) -> torch.device | None:
    """The device of that name, where `reader` can read its memory; None where it can't, or does not see it."""
    for index in range(torch.cuda.device_count()):
        found = torch.device("cuda", index)
        if device_uuid(found) == uuid:
            is_same = device_uuid(reader) == uuid
            return found if is_same or torch.cuda.can_device_access_peer(reader, found) else None
    return None


def open_shared(handle: bytes, offset: int, size: int, owner: torch.device, reader: torch.device) -> torch.Tensor:
    """`size` bytes of another process's allocation from `offset` on, as uint8 on `owner`, the device they lie on, for
    kernels of `reader`, which may be another device (the driver then lets it read there).

    Raises `OSError` where it can't be opened and `ValueError` where there is less than was announced.
    """
    opened = _Handle.from_buffer_copy(handle)
    base = ctypes.c_uint64()
    with torch.cuda.device(reader):
        torch.cuda.current_stream().query()  # makes the device's context this thread's
        _check(_driver().cuIpcOpenMemHandle_v2(ctypes.byref(base), opened, LAZY_PEER_ACCESS), "cuIpcOpenMemHandle")
        _, allocated = _allocation(base.value)
        if offset + size > allocated:
            _driver().cuIpcCloseMemHandle(base)
            raise ValueError(f"{offset + size} bytes were announced, the allocation has {allocated}")
    return torch.as_tensor(_Opened(base, offset, size), device=owner)


def pin(memory: torch.Tensor) -> None:
    """Lock host memory in its place, so that copy engines reach it. Raises `OSError` where that is not allowed."""
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    result = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, PORTABLE)
    _check(int(result), "cudaHostRegister")


def unpin(memory: torch.Tensor) -> None:
    """The other way; harmless where it was not pinned."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())  # type: ignore[no-untyped-call]


class _Opened:
    """Closes the handle when the last tensor that looks into it is gone."""

    def __init__(self, base: ctypes.c_uint64, offset: int, size: int) -> None:
        self._base = base
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (base.value + offset, False),
            "version": 3,
        }

    def __del__(self) -> None:
        _driver().cuIpcCloseMemHandle(self._base)


def _allocation(pointer: int) -> tuple[int, int]:
    """Start and size of the allocation that holds an address."""
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    result = _driver().cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(pointer))
    _check(result, "cuMemGetAddressRange")
    return base.value, size.value
