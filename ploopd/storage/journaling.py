"""The journal of one device, whatever volumes it is served from in turn."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import trio

from ploopd.fileio.policy import may_lose_written
from ploopd.storage.device import BlockDevice
from ploopd.storage.journal import Journal
from ploopd.storage.journaled import Doubt, JournaledDevice, OnFailure, no_doubt
from ploopd.storage.replay import replay
from ploopd.storage.volume import Volume

DEFAULT_JOURNAL_SIZE = 64 << 20


class JournalMode(Enum):
    """Whether acknowledged writes are kept until they are flushed; AUTO: by file system."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalStatus:
    """What the journal holds now: requests, bytes of their data and of memory; and how much memory
    it may use (bytes)."""

    requests: int
    data: int
    used: int
    limit: int


class Journaling:
    """The journal outlives the volumes: `attach` says what the gate is to use of each, `replay` is
    a replay hook of the device.

    `limit`: bytes.  `on_failure` is told of flushes that fail and that only the journal wanted;
    `doubt` says why the success of a flush means nothing, if it knows of something.
    """

    def __init__(
        self, mode: JournalMode, limit: int, on_failure: OnFailure, doubt: Doubt = no_doubt
    ) -> None:
        self._mode = mode
        self._journal = Journal(limit)
        self._on_failure = on_failure
        self._doubt = doubt
        self._device: JournaledDevice | None = None
        self._replayed: Volume | None = None

    @property
    def status(self) -> JournalStatus | None:
        """None when the journal is off."""
        if self._device is None:
            return None
        journal = self._journal
        return JournalStatus(
            requests=len(journal), data=journal.data_bytes, used=journal.used, limit=journal.limit
        )

    def attach(self, volume: Volume) -> BlockDevice:
        """`volume` is the device's from now on; returns it with a journal around it, or as it is.

        Forgets what has been replayed into it.  To be called where nothing can fail any more.
        """
        if self._device is not None:
            self._device.retire()
            self._device = None
        if self._replayed is volume:
            self._journal.clear()
        self._replayed = None
        if not self._journal and not self._wanted(volume):
            return volume
        self._device = JournaledDevice(volume, self._journal, self._on_failure, self._doubt)
        return self._device

    def _wanted(self, volume: Volume) -> bool:
        if volume.read_only:
            return False
        if self._mode is JournalMode.AUTO:
            return may_lose_written(volume.filesystem)
        return self._mode is JournalMode.ON

    async def replay(self, volume: Volume) -> int:
        """Do again in `volume` what the journal holds, and flush it; returns the bytes written.

        The journal keeps everything until the volume is attached, because it may not come to that.
        Raises StorageError.
        """
        self._replayed = None
        if self._device is not None:
            self._device.retire()
        written = await replay(self._journal, volume)
        self._replayed = volume
        return written

    def trust(self) -> None:
        """An operator goes on with a storage that has failed."""
        if self._device is not None:
            self._device.trust()

    async def make_up(self) -> None:
        """Before the volume is closed: try once more what a storage without room has refused."""
        device = self._device
        if device is not None and device.behind:
            ended = trio.Event()
            device.flush(lambda _: ended.set())
            await ended.wait()

    def closed(self) -> None:
        """The volume has been synced and closed: nothing is left to be written, if that sync can be
        trusted."""
        if self._device is None or self._device.trusted:
            self._journal.clear()
