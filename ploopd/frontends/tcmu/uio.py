"""The kernel's files of a TCMU device: /sys/class/uio, /dev/uioN and its configfs directory.

Everything here blocks; writing to configfs may even block for ever, so it belongs into a worker
thread with a deadline.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ploopd.errors import BusyError, PloopError, open_error
from ploopd.frontends.tcmu.names import SUBTYPE, KernelName, parse_kernel_name

APPEAR_SECONDS = 1.0
"""The kernel makes a device's directory in sysfs first, and then what is in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UioDevice:
    """One of our devices as sysfs shows it: `minor` is the N of /dev/uioN."""

    minor: int
    name: KernelName

    def __str__(self) -> str:
        return f"{self.name.backstore} (uio{self.minor})"


class SharedMemory(Protocol):
    """An open uio device.  `acknowledge` takes the kernel's wake-up and says whether the device is
    still there; `tell` says that answers are in the ring."""

    def fileno(self) -> int: ...

    def view(self) -> memoryview: ...

    def acknowledge(self) -> bool: ...

    def tell(self) -> None: ...

    def close(self) -> None: ...


class UioFile:
    """/dev/uioN, open and mapped; the kernel allows one opener.

    Raises BusyError if somebody else has it open and PloopError when it cannot be opened.
    """

    def __init__(self, path: Path, map_size: int) -> None:
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise BusyError(
                    "is open in another process, which serves the device",
                    path=path,
                    hint=f"fuser {path} tells which one",
                ) from error
            raise open_error(error, path) from error
        try:
            self._map = mmap.mmap(self._fd, map_size)
        except (OSError, ValueError) as error:
            os.close(self._fd)
            raise PloopError(f"cannot be mapped: {error}", path=path) from error

    def fileno(self) -> int:
        return self._fd

    def view(self) -> memoryview:
        """A new view of all of it, to be released before `close`."""
        return memoryview(self._map)

    def acknowledge(self) -> bool:
        """Take a wake-up; False when the device was removed."""
        try:
            return bool(os.read(self._fd, 4))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def tell(self) -> None:
        """Let the kernel look for answers.  A device that was removed has nobody to look."""
        try:  # not contextlib.suppress: this is once for every command of a slow initiator
            os.write(self._fd, b"\0\0\0\0")
        except OSError:
            return

    def close(self) -> None:
        """Unmap and close.  The kernel keeps the device until both have happened."""
        try:
            self._map.close()
        except BufferError:
            gc.collect()  # an exception's frames may still refer to a view
            self._map.close()
        os.close(self._fd)


class Kernel:
    """Where the kernel shows its TCMU devices; the arguments are for tests."""

    def __init__(
        self,
        *,
        sys: Path = Path("/sys"),
        dev: Path = Path("/dev"),
        boot_id_file: Path = Path("/proc/sys/kernel/random/boot_id"),
    ) -> None:
        self.sys = sys
        self.dev = dev
        self.boot_id_file = boot_id_file

    # -- uio -------------------------------------------------------------------------------

    def devices(self) -> list[UioDevice]:
        """Every TCMU device of our subtype; others are none of our business."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for entry in (self.sys / "class/uio").iterdir():
                device = self._device(entry)
                if device is not None:
                    found.append(device)
        return sorted(found, key=lambda device: device.minor)

    def _device(self, entry: Path) -> UioDevice | None:
        number = entry.name.removeprefix("uio")
        try:
            text = (entry / "name").read_text().rstrip("\n")
        except OSError:
            return None  # it has gone meanwhile
        name = parse_kernel_name(text)
        if name is None or name.subtype != SUBTYPE or not number.isdecimal():
            return None
        return UioDevice(minor=int(number), name=name)

    def present(self, device: UioDevice) -> bool:
        """Is it still there, and still the same?"""
        return self._device(self.sys / f"class/uio/uio{device.minor}") == device

    def open(self, device: UioDevice) -> SharedMemory:
        """Open and map a device that is `made`.  Raises BusyError or PloopError."""
        if not self.made(device):
            raise BusyError("is still being made", path=self.directory(device))
        size_file = self.sys / f"class/uio/uio{device.minor}/maps/map0/size"
        deadline = time.monotonic() + APPEAR_SECONDS
        while not size_file.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        try:
            size = int(size_file.read_text(), 0)
        except (OSError, ValueError) as error:
            raise PloopError(
                f"does not tell the size of the mapping: {error}", path=size_file
            ) from error
        return UioFile(self.dev / f"uio{device.minor}", size)

    # -- configfs --------------------------------------------------------------------------

    @property
    def core(self) -> Path:
        """configfs' directory of all backstores."""
        return self.sys / "kernel/config/target/core"

    def directory(self, device: UioDevice) -> Path:
        """The storage object's directory in configfs."""
        return self.core / device.name.configfs

    def made(self, device: UioDevice) -> bool:
        """Has the kernel finished making it?

        Until then it may take it back, because somebody has told it so by netlink, and then it
        frees the memory that a handler has mapped: the next access crashes the kernel (6.1).
        """
        try:
            return (self.directory(device) / "enable").read_text().strip() == "1"
        except OSError:
            return False

    def attribute(self, device: UioDevice, name: str) -> str | None:
        """An attribute's text, or None if there is no such attribute."""
        try:
            return (self.directory(device) / "attrib" / name).read_text().strip()
        except OSError:
            return None

    def waits_for_replies(self, device: UioDevice) -> bool:
        """Does the kernel want netlink events of this device to be answered?  0: nobody has ever
        promised to; -1: it was made so that nobody is asked."""
        return self.attribute(device, "nl_reply_supported") not in ("0", "-1", None)

    def backstore_config(self, name: str) -> str | None:
        """`SUBTYPE/CONFIG` of the backstore `user_N/NAME`, "" until it is written; None if there is
        none."""
        try:
            descriptor = os.open(f"{self.core}/{name}/attrib/dev_config", os.O_RDONLY)
        except OSError:
            return None
        try:
            return os.read(descriptor, 4096).decode(errors="surrogateescape").rstrip("\n")
        except OSError:
            return None
        finally:
            os.close(descriptor)

    def waive_replies(self, name: str) -> bool:
        """Let the kernel not wait for replies about the backstore `user_N/NAME`; False if it does
        not take that."""
        return self._write(self.core / name / "attrib/nl_reply_supported", -1)

    def reset_netlink(self) -> bool:
        """Let everybody go who waits for a reply; they are told EINTR, and rtslib repeats what it
        was doing, so the interface is blocked for no longer than it has to be.  False if the
        kernel does not take that."""
        parameters = self.sys / "module/target_core_user/parameters"
        with contextlib.ExitStack() as stack:
            try:
                block, reset = (
                    stack.enter_context((parameters / name).open("wb", buffering=0))
                    for name in ("block_netlink", "reset_netlink")
                )
                block.write(b"1\n")
                try:
                    reset.write(b"1\n")
                finally:
                    block.write(b"0\n")
            except OSError:
                return False
        return True

    def set_attribute(self, device: UioDevice, name: str, value: int) -> bool:
        """Write an attribute; False if the kernel does not take it."""
        return self._write(self.directory(device) / "attrib" / name, value)

    def action(self, device: UioDevice, name: str, value: int) -> bool:
        """Write to one of the device's actions; False if the kernel does not take it."""
        return self._write(self.directory(device) / "action" / name, value)

    @staticmethod
    def _write(path: Path, value: int) -> bool:
        # One write(2): a text file would repeat a failed one when it is closed.
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            os.write(descriptor, f"{value}\n".encode())
        except OSError:
            return False
        finally:
            os.close(descriptor)
        return True

    def boot_id(self) -> str:
        """Which boot of the kernel this is: positions in a ring mean nothing in another one."""
        try:
            return self.boot_id_file.read_text().strip()
        except OSError:
            return ""
