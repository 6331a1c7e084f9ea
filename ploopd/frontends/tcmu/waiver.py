"""Beside another handler: the kernel waits for nobody's reply about our backstores.

The kernel asks every handler about a new backstore and believes whoever answers first; tcmu-runner
answers that it does not know ours.  The kernel decides whether it waits for an answer at the end
of `enable`, and rtslib writes the configuration some milliseconds before that: time to tell it not
to, if nothing is lost on the way.  Hence a thread of its own, which does only this.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
from collections.abc import Callable
from typing import Final

import trio

from ploopd.fileio.inotify import Change, Happened, Inotify
from ploopd.frontends.tcmu.names import SUBTYPE
from ploopd.frontends.tcmu.uio import Kernel

AGAIN_SECONDS: Final = 5.0
"""Until configfs is looked for again; it comes with the kernel's module."""

PRIORITY: Final = -15
"""nice(2) of the thread: on a machine with one CPU whoever writes the configuration goes on
otherwise."""

HBA: Final = "user_"

log = logging.getLogger(__name__)


class Waiver:
    """While `wanted`, switches the waiting off for new backstores of our subtype; `granted` are
    their directories below `core`.  Backstores that are there already keep what they have."""

    def __init__(self, kernel: Kernel, wanted: Callable[[], bool]) -> None:
        self.granted: set[str] = set()
        self._kernel = kernel
        self._wanted = wanted

    async def serve(self) -> None:
        """Until cancelled."""
        while True:
            with contextlib.suppress(OSError):
                await self._watch()
            await trio.sleep(AGAIN_SECONDS)

    async def _watch(self) -> None:
        """Until cancelled, or something fails.  Raises OSError where there is no configfs."""
        watch = Watch(self._kernel, self._wanted, self.granted)
        ended = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def work() -> None:
            try:
                watch.run()
            except OSError as error:
                log.warning("event=tcmu-watch error=%r", str(error))
            finally:
                watch.close()
                with contextlib.suppress(trio.RunFinishedError):
                    token.run_sync_soon(ended.set)

        # The kernel may never come back from configfs; nobody waits for this thread.
        threading.Thread(target=work, name="new-backstores", daemon=True).start()
        try:
            await ended.wait()
        finally:
            watch.stop()


class Watch:
    """Backstores that appear below `core`.

    Files of configfs have a new inode whenever they are opened, so directories are watched.
    Raises OSError when there is no configfs.
    """

    def __init__(self, kernel: Kernel, wanted: Callable[[], bool], granted: set[str]) -> None:
        self._kernel = kernel
        self._wanted = wanted
        self._granted = granted
        self._core = kernel.core
        self._hbas: dict[int, str] = {}
        self._new: dict[int, str] = {}
        self._inotify = Inotify()
        self._stop, self._stopper = os.pipe2(os.O_CLOEXEC)
        try:
            self._root = self._inotify.add(self._core, Happened.CREATE)
            for hba in self._core.glob(f"{HBA}*"):
                self._hbas[self._inotify.add(hba, Happened.CREATE)] = hba.name
        except OSError:
            self.stop()
            self.close()
            raise

    def run(self) -> None:
        """Until `stop`."""
        with contextlib.suppress(OSError):  # where that is not allowed, it is as quick as it is
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), PRIORITY)
        fd = self._inotify.fileno()
        while self._stop not in select.select((fd, self._stop), (), ())[0]:
            self.look()

    def look(self) -> None:
        """What has happened since the last look."""
        for change in self._inotify.read():
            self._happened(change)

    def stop(self) -> None:
        """Let `run` end; once."""
        os.close(self._stopper)

    def close(self) -> None:
        """After `run`, or in its place."""
        self._inotify.close()
        os.close(self._stop)

    def _happened(self, change: Change) -> None:
        if change.what & Happened.IGNORED:  # the directory has gone
            self._hbas.pop(change.watch, None)
            self._new.pop(change.watch, None)
        elif change.watch in self._new:
            self._settle(change.watch)
        elif change.what & Happened.DIRECTORY:
            if change.watch == self._root:
                self._hba_appeared(change.name)
            elif change.watch in self._hbas:
                self._backstore_appeared(f"{self._hbas[change.watch]}/{change.name}")

    def _hba_appeared(self, name: str) -> None:
        if not name.startswith(HBA):
            return
        with contextlib.suppress(OSError):  # it may have gone again
            directory = f"{self._core}/{name}"
            self._hbas[self._inotify.add(directory, Happened.CREATE)] = name
            for backstore in os.listdir(directory):
                self._backstore_appeared(f"{name}/{backstore}")

    def _backstore_appeared(self, name: str) -> None:
        if not self._wanted():
            return
        with contextlib.suppress(OSError):  # it may have gone again, or be a file
            what = Happened.MODIFY | Happened.ONLY_DIRECTORY
            watch = self._inotify.add(f"{self._core}/{name}", what)
            self._new[watch] = name
            self._settle(watch)

    def _settle(self, watch: int) -> None:
        """As soon as it says whose it is, switch the waiting off or forget it."""
        name = self._new[watch]
        config = self._kernel.backstore_config(name)
        if not config and config is not None:
            return
        if config is not None and config.startswith(f"{SUBTYPE}/"):
            self._granted.add(name)  # first: the kernel may be asking at this moment
            self._kernel.waive_replies(name)
            log.info("event=tcmu-no-reply-wanted backstore=%s", name)
        self._inotify.remove(watch)
        self._new.pop(watch, None)
