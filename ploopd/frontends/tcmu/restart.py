"""What a daemon that ended leaves for the next one: up to where each ring was answered.

After a clean end everything from there on is an untouched command, and the next daemon takes them
as if nothing had been.  After any other end the ring's entries no longer name exactly the commands
that are unfinished (an answer overwrites the oldest entry), so the ring has to be reset.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from ploopd.frontends.tcmu.uio import UioDevice


@dataclass(frozen=True, slots=True)
class RestartNotes:
    """Notes below `directory`, which must not outlive the kernel (/run); they are also worth
    nothing with another `boot_id`."""

    directory: Path
    boot_id: str

    def _path(self, device: UioDevice) -> Path:
        return self.directory / f"{device.name.hba}-{device.name.backstore}.json"

    def agree(self, device: UioDevice) -> None:
        """The kernel's attributes of this device say what is so, from now on."""
        path = self._path(device).with_suffix(".agreed")
        with contextlib.suppress(OSError):
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            path.write_text(json.dumps({"boot_id": self.boot_id, "minor": device.minor}))

    def forget(self, device: UioDevice) -> None:
        """The device is a new one; what was said of another with its name is not about it."""
        with contextlib.suppress(OSError):
            self._path(device).with_suffix(".agreed").unlink()

    def agreed(self, device: UioDevice) -> bool:
        """Whether a daemon has said so before; otherwise they have the kernel's defaults."""
        try:
            note = json.loads(self._path(device).with_suffix(".agreed").read_text())
        except (OSError, ValueError):
            return False
        return bool(self.boot_id) and note == {"boot_id": self.boot_id, "minor": device.minor}

    def leave(self, device: UioDevice, tail: int) -> None:
        """Everything up to `tail` has been answered, nothing behind it has been taken."""
        path = self._path(device)
        note = {"boot_id": self.boot_id, "minor": device.minor, "tail": tail}
        with contextlib.suppress(OSError):  # without it the ring is reset, which is safe
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            new = path.with_suffix(".new")
            new.write_text(json.dumps(note))
            os.replace(new, path)

    def take(self, device: UioDevice) -> int | None:
        """The tail that was left for this device, once; None without a note for this very one."""
        path = self._path(device)
        try:
            note = json.loads(path.read_text())
        except (OSError, ValueError):
            return None
        finally:
            with contextlib.suppress(OSError):
                path.unlink()
        if not isinstance(note, dict) or not self.boot_id:
            return None
        if (note.get("boot_id"), note.get("minor")) != (self.boot_id, device.minor):
            return None
        tail = note.get("tail")
        return tail if isinstance(tail, int) else None
