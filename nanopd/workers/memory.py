"""Memory of one process that another may map: the host's, and a GPU's."""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from nanopd.workers.transfer import TransferError

# ------------------------------------------------------------------------------------------------------- the host's


@dataclass(frozen=True)
class HostMemory:
    """Where another process of this machine finds `SharedMemory`."""

    pid: int
    descriptor: int
    name: str
    size: int

    def map(self) -> Tensor:
        """The same bytes, uint8 [size]; mapped for as long as the tensor lives. Raises TransferError."""
        path = f"/proc/{self.pid}/fd/{self.descriptor}"
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError as error:
            raise TransferError(f"the memory of process {self.pid} can't be mapped: {error.strerror}") from error
        try:
            if not os.readlink(f"/proc/self/fd/{descriptor}").startswith(f"/memfd:{self.name}"):
                raise TransferError(f"process {self.pid} is another one by now, and its memory not what was shared")
            return _map(descriptor, self.size)
        finally:
            os.close(descriptor)


class SharedMemory:
    """Zeros, uint8 [size], which other processes of this machine may map.

    It has no name in any file system, so nothing is left of it when its last user is gone, however that one went.
    Linux only.
    """

    def __init__(self, size: int) -> None:
        if not hasattr(os, "memfd_create"):
            raise TransferError("memory is shared between processes on Linux only: choose the transport 'collective'")
        name = f"nanopd-{secrets.token_hex(8)}"
        self._descriptor = os.memfd_create(name)
        os.ftruncate(self._descriptor, size)
        self.address = HostMemory(os.getpid(), self._descriptor, name, size)
        self.data = _map(self._descriptor, size)

    def close(self) -> None:
        """Nobody may map it any more. It goes when the last tensor does, here and elsewhere."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self.data = torch.empty(0, dtype=torch.uint8)


def _map(descriptor: int, size: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)


class Pinned:
    """Makes host memory such that a GPU copies from and to it on its own, until closed. Raises TransferError."""

    def __init__(self, data: Tensor, device: torch.device) -> None:
        self._data = data
        self._device = device
        with torch.cuda.device(device):
            error = int(torch.cuda.cudart().cudaHostRegister(data.data_ptr(), data.nbytes, 0))
        if error:
            raise TransferError(f"{data.nbytes} bytes of host memory can't be pinned: CUDA error {error}")

    def close(self) -> None:
        with torch.cuda.device(self._device):
            torch.cuda.cudart().cudaHostUnregister(self._data.data_ptr())


# -------------------------------------------------------------------------------------------------------- a GPU's

# CUDA's own calls rather than torch's sharing of tensors: that one keeps counters in a named file, which outlives a
# process that is killed, and makes the receiver hold a context, hundreds of megabytes, on the sender's GPU too.
LAZY_PEER_ACCESS = 1  # CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS


class _Handle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_ubyte * 64)]  # CUipcMemHandle


@dataclass(frozen=True)
class DeviceMemory:
    """Where another process finds a tensor of a GPU: an allocation, and what part of it."""

    handle: bytes
    offset: int
    size: int


def share_device_memory(data: Tensor) -> DeviceMemory:
    """For a contiguous CUDA tensor, which must stay where it is. Raises TransferError."""
    base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
    with _context(data.device):
        _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(data.data_ptr()))
        _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
    return DeviceMemory(bytes(handle.bytes), data.data_ptr() - base.value, data.nbytes)


class MappedDeviceMemory:
    """Another process's GPU memory, as uint8 [size] that kernels on `device` read and write. Raises TransferError.

    torch takes it for memory of `device`, wherever it lies: it is mapped there, and nothing else matters to a kernel.
    """

    def __init__(self, memory: DeviceMemory, device: torch.device) -> None:
        self._device = device
        self._base = ctypes.c_uint64()
        handle = _Handle((ctypes.c_ubyte * 64).from_buffer_copy(memory.handle))
        with _context(device):
            _call("cuIpcOpenMemHandle_v2", ctypes.byref(self._base), handle, ctypes.c_uint(LAZY_PEER_ACCESS))
        pointer = self._base.value + memory.offset
        try:
            self.data = torch.as_tensor(_ArrayInterface(pointer, memory.size), device=device)
            if self.data.data_ptr() != pointer:
                raise ValueError("it makes a copy")
        except (RuntimeError, ValueError) as error:
            self.close()
            raise TransferError(f"torch can't use another process's GPU memory in place: {error}") from error

    def close(self) -> None:
        """Unmap. No kernel may use it any more."""
        self.data = torch.empty(0, dtype=torch.uint8)
        with _context(self._device):
            _call("cuIpcCloseMemHandle", self._base)


class _ArrayInterface:
    def __init__(self, pointer: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (pointer, False), "version": 3}


@contextmanager
def _context(device: torch.device) -> Iterator[None]:
    """The driver's calls work on the thread's current context, which a runtime call for the device brings about."""
    with torch.cuda.device(device):
        torch.cuda.synchronize(device)
        yield


@cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise TransferError(f"CUDA's driver library can't be loaded: {error}") from error


def _call(name: str, *arguments: object) -> None:
    result = getattr(_driver(), name)(*arguments)
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(result, ctypes.byref(text))
        raise TransferError(f"{name}: {text.value.decode() if text.value else result}")
