"""Devices exported through the kernel's target, and the memory of what was exported.

The kernel forgets its configuration when the machine restarts; what was exported here is written
down, so that it can be made again, and so that only what was made here is ever taken away.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
import trio

from ploopd.config import read_chap_files
from ploopd.device_table import DeviceTable
from ploopd.devices import Device
from ploopd.disownable import disownable
from ploopd.errors import BusyError, NotFoundError, PloopError, UnsupportedError, UsageError
from ploopd.frontends.tcmu.lio import Backstore, Chap, Exported, ExportRequest, Lio
from ploopd.kernel_front_end import KernelFrontEnd

STATE_FILE = Path("/var/lib/ploopd/lio.json")
KERNEL_SECONDS = 30.0
"""For one change of the kernel's configuration."""

T = TypeVar("T")

log = logging.getLogger(__name__)


class Export(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for, and what came of it; see `ExportRequest` and `Exported`.

    `chap_file`: the file that has the account; the secret itself is never written anywhere.
    """

    device: str
    iqn: str
    lun: int
    portals: list[tuple[str, int]]
    acl: list[str]
    chap_file: str | None = None
    insecure: bool = False
    made: list[str] = []
    backstore_made: bool = True


class _Memory(msgspec.Struct, kw_only=True):
    exports: list[Export] = []


class LioExports:
    """Exports devices of `table`, which `front_end` serves.  `state`: where that is written down;
    `kernel` looks at the kernel's target as it is now.
    """

    def __init__(
        self,
        table: DeviceTable,
        front_end: KernelFrontEnd,
        *,
        state: Path = STATE_FILE,
        kernel: Callable[[], Lio] = Lio,
    ) -> None:
        self._table = table
        self._front_end = front_end
        self._state = state
        self._kernel = kernel
        self._changing = trio.Lock()
        self._limiter = trio.CapacityLimiter(2)

    async def export(
        self,
        device: Device,
        iqn: str,
        *,
        portals: list[tuple[str, int]],
        acl: list[str],
        chap_file: str | None,
        lun: int | None,
        insecure: bool = False,
    ) -> Export:
        """Export `device` as a LUN of the target `iqn`; `insecure`: even if that lets everybody on
        the network in.

        Raises PloopError; nothing of it is left in the kernel then.
        """
        async with self._changing:
            exports = await self._in_thread(self._load, "reading what is exported")
            for each in exports:
                if (each.device, each.iqn) == (device.name, iqn.lower()):
                    raise BusyError("is exported there already", field="device", value=device.name)
            request = await self._request(device, iqn, portals, acl, chap_file, lun, insecure)
            exported, made = await self._make(request)
            export = Export(
                device=device.name,
                iqn=exported.iqn,
                lun=exported.lun,
                portals=list(request.portals),
                acl=list(request.acl),
                chap_file=chap_file,
                insecure=insecure,
                made=list(exported.made),
                backstore_made=made,
            )
            try:
                await self._remember([*exports, export])
            except PloopError:
                await self._undo(export)
                raise
            return export

    async def unexport(self, device: str, iqn: str | None) -> list[Export]:
        """Take a device's LUNs away (that of `iqn`, or all), and its backstore with the last one.

        Raises NotFoundError if it was not exported here.
        """
        async with self._changing:
            exports = await self._in_thread(self._load, "reading what is exported")
            gone = [
                each
                for each in exports
                if each.device == device and (iqn is None or each.iqn == iqn.lower())
            ]
            if not gone:
                raise NotFoundError(
                    "is not exported", field="device", value=device, hint="see ploopctl lio list"
                )
            left = [each for each in exports if each not in gone]
            for export in gone:
                left = _inherited(left, export)
            for export in gone:
                await self._in_thread(partial(self._unmake, export, left), f"unexporting {device}")
            made = any(export.backstore_made for export in gone)
            if made and not any(each.device == device for each in left):
                await self._in_thread(
                    partial(self._delete_backstore, device), f"deleting the backstore {device}"
                )
            await self._remember(left)
            return gone

    async def restore(self) -> list[tuple[Export, PloopError | None]]:
        """Make again what was exported and is not there; what came of each."""
        results: list[tuple[Export, PloopError | None]] = []
        async with self._changing:
            exports = await self._in_thread(self._load, "reading what is exported")
            for number, export in enumerate(exports):
                try:
                    exports[number] = await self._restore(export)
                    results.append((export, None))
                except PloopError as error:
                    results.append((export, error))
            if exports != [export for export, _ in results]:
                await self._remember(exports)
        return results

    async def _restore(self, export: Export) -> Export:
        """The export as it is now: what others had made may have been made here this time."""
        device = self._table.get(export.device)
        here = await self._in_thread(
            lambda: self._kernel().backstores(), "looking at the kernel's target"
        )
        luns = {lun for each in here if each.name == device.name for lun in each.luns}
        if f"{export.iqn}/{export.lun}" in luns:
            return export
        request = await self._request(
            device,
            export.iqn,
            export.portals,
            export.acl,
            export.chap_file,
            export.lun,
            export.insecure,
        )
        exported, made = await self._make(request)
        return msgspec.structs.replace(
            export,
            made=_together(export.made, exported.made),
            backstore_made=export.backstore_made or made,
        )

    async def show(self) -> tuple[list[Export], list[Backstore]]:
        """What was exported here, and every backstore of our kind that the kernel has."""
        exports = await self._in_thread(self._load, "reading what is exported")
        try:
            here = await self._in_thread(
                lambda: self._kernel().backstores(), "looking at the kernel's target"
            )
        except UnsupportedError:
            here = []
        return exports, here

    def device_of(self, backstore: str) -> str | None:
        """The name of the device that serves a backstore of the kernel, if one does."""
        attachment = self._front_end.server.attached.get(backstore)
        return None if attachment is None else attachment.device.name

    def problem_of(self, backstore: str) -> str | None:
        """Why a backstore of the kernel is not served, if it could not be."""
        failure = self._front_end.server.failure(backstore)
        return None if failure is None else str(failure)

    # -- the steps -------------------------------------------------------------------------

    async def _request(
        self,
        device: Device,
        iqn: str,
        portals: list[tuple[str, int]],
        acl: list[str],
        chap_file: str | None,
        lun: int | None,
        insecure: bool,
    ) -> ExportRequest:
        for address, port in portals:
            _require_address(address, port)
        chap = None
        if chap_file is not None:
            chap = await self._in_thread(partial(_read_chap, chap_file), f"reading {chap_file}")
        return ExportRequest(
            backstore=device.name,
            config=device.name,
            size=device.size,
            serial=str(device.identity),
            iqn=iqn.lower(),
            portals=tuple(portals),
            lun=lun,
            acl=tuple(name.lower() for name in acl),
            chap=chap,
            insecure=insecure,
        )

    async def _make(self, request: ExportRequest) -> tuple[Exported, bool]:
        """Create, wait until it is served, link: the kernel asks for the disk when it is linked."""
        what = f"making the backstore {request.backstore}"
        made = await self._in_thread(lambda: self._kernel().create_backstore(request), what)
        try:
            await self._front_end.server.wait_attached(request.backstore, KERNEL_SECONDS)
            exported = await self._in_thread(
                lambda: self._kernel().export(request), f"exporting {request.backstore}"
            )
        except BaseException:
            if made:
                await self._quietly(
                    partial(self._delete_backstore, request.backstore), f"undoing: {what}"
                )
            raise
        return exported, made

    async def _undo(self, export: Export) -> None:
        """It could not be remembered, so it must not be there."""
        await self._quietly(partial(self._unmake, export), f"undoing: exporting {export.device}")
        if export.backstore_made:
            await self._quietly(
                partial(self._delete_backstore, export.device), f"undoing: {export.device}"
            )

    async def _quietly(self, blocking: Callable[[], None], what: str) -> None:
        """Undo as far as possible: the first error is what is told, the log has the others."""
        with trio.CancelScope(shield=True):
            try:
                await self._in_thread(blocking, what)
            except PloopError as error:
                log.error("event=lio-undo error=%r", str(error))  # noqa: TRY400

    def _unmake(self, export: Export, left: Sequence[Export] = ()) -> None:
        """What is still used by one of those that are `left` stays, see `_inherited`."""
        shared = any(each.iqn == export.iqn for each in left)
        self._kernel().unexport(
            Exported(
                backstore=export.device,
                iqn=export.iqn,
                lun=export.lun,
                portals=tuple(export.portals),
                made=() if shared else tuple(export.made),
            )
        )

    def _delete_backstore(self, name: str) -> None:
        with contextlib.suppress(NotFoundError):
            self._kernel().delete_backstore(name)

    async def _remember(self, exports: list[Export]) -> None:
        await self._in_thread(partial(self._save, exports), f"writing {self._state}")

    async def _in_thread(self, blocking: Callable[[], T], what: str) -> T:
        try:
            return await disownable(
                blocking,
                deadline=KERNEL_SECONDS,
                what=what,
                undo=lambda _: None,
                limiter=self._limiter,
            )
        except PloopError as error:
            if error.hint is None and "took longer" in error.message:
                error.hint = "the kernel waits: for a command to end, or a handler to answer"
            raise

    # -- memory ----------------------------------------------------------------------------

    def _load(self) -> list[Export]:
        try:
            data = self._state.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise PloopError(f"cannot be read: {error.strerror}", path=self._state) from error
        try:
            return msgspec.json.decode(data, type=_Memory).exports
        except (msgspec.ValidationError, msgspec.DecodeError) as error:
            raise PloopError(
                f"is not what ploopd wrote: {error}",
                path=self._state,
                hint="move it away and export again",
            ) from error

    def _save(self, exports: list[Export]) -> None:
        new = self._state.with_suffix(".new")
        try:
            self._state.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            with new.open("wb") as file:
                file.write(msgspec.json.format(msgspec.json.encode(_Memory(exports=exports))))
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self._state)
        except OSError as error:
            raise PloopError(f"cannot be written: {error.strerror}", path=self._state) from error


def _inherited(left: list[Export], gone: Export) -> list[Export]:
    """What was made for an export and is still used by another one goes with that one."""
    left = list(left)
    for number, export in enumerate(left):
        if export.iqn == gone.iqn:
            made = _together(export.made, gone.made)
            left[number] = msgspec.structs.replace(export, made=made)
            break
    for number, export in enumerate(left):
        if export.device == gone.device:
            made_here = export.backstore_made or gone.backstore_made
            left[number] = msgspec.structs.replace(export, backstore_made=made_here)
            break
    return left


def _together(one: list[str], other: Sequence[str]) -> list[str]:
    return [*one, *(each for each in other if each not in one)]


def _require_address(address: str, port: int) -> None:
    """The kernel resolves no names."""
    try:
        ipaddress.ip_address(address)
    except ValueError:
        raise UsageError(
            "is not an IP address, which the kernel's target needs", field="portal", value=address
        ) from None
    if port == 0:
        raise UsageError("has no port", field="portal", value=f"{address}:0")


def _read_chap(path: str) -> Chap:
    chap = read_chap_files([path])
    assert chap is not None
    account, mutual = chap.accounts[0], chap.mutual
    return Chap(
        user=account.user,
        secret=_text(account.secret, path),
        mutual_user=None if mutual is None else mutual.user,
        mutual_secret=None if mutual is None else _text(mutual.secret, path),
    )


def _text(secret: bytes, path: str) -> str:
    try:
        return secret.decode("ascii")
    except UnicodeDecodeError:
        raise UsageError("the kernel takes ASCII secrets only", path=path) from None
