"""The CPUs that a process which serves a GPU should run on: those next to it, as its pinned memory will be then."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

PCI_DEVICES = Path("/sys/bus/pci/devices")


def stay_near(device: torch.device) -> None:
    """Bind this thread, and those that it starts, to the CPUs next to a GPU. No effect where the system does not say which."""
    gpu = torch.cuda.get_device_properties(device)
    with suppress(AttributeError, ValueError):  # a torch that does not tell where it is
        bind(f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0")


def bind(pci_id: str, devices: Path = PCI_DEVICES) -> None:
    """As `stay_near`, of a PCI device such as "0000:1b:00.0". Never to a CPU that this process may not use."""
    try:
        near = parse_cpus((devices / pci_id / "local_cpulist").read_text()) & os.sched_getaffinity(0)
        if near:
            os.sched_setaffinity(0, near)
    except (OSError, ValueError, AttributeError):  # no such file, another format, a system without affinity
        pass


def parse_cpus(text: str) -> set[int]:
    """CPU numbers from a list like "0-3,8,10-11". Raises ValueError for anything else."""
    ends = [part.split("-") for part in text.strip().split(",") if part]
    return {cpu for first, *last in ends for cpu in range(int(first), int(last[0] if last else first) + 1)}
