"""The kernel target's configuration, by rtslib-fb: backstores, targets, LUNs, access.

The only module that imports rtslib.  Everything blocks, some calls until the handler has answered
a command, so nothing here may run in the event loop's thread.

What others have made is left alone: a target that we did not create gets our LUN, portals and ACLs
only, and loses only those.  `Exported.made` remembers what was ours.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ploopd.errors import (
    BusyError,
    DeniedError,
    ExitCode,
    NotFoundError,
    PloopError,
    UnsupportedError,
    UsageError,
)
from ploopd.frontends.tcmu.names import SUBTYPE

if TYPE_CHECKING:
    from rtslib_fb import LUN, TPG, NodeACL, Target, UserBackedStorageObject

CONTROL = "nl_reply_supported=-1,max_data_area_mb=64"
"""Never wait for a netlink reply: if tcmu-runner runs as well, it answers first, and wrongly."""

HW_MAX_SECTORS = 8192
COMMAND_WINDOW = 128
PORTAL_GROUP = 1

EVERY_ADDRESS = ("0.0.0.0", "[::0]", "[::]")  # noqa: S104 - recognised, not bound to
"""Portals that have every other address."""

DATABASES = ("/etc/rtslib-fb-target", "/etc/target")
"""Debian's and everybody else's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chap:
    """A CHAP account, with the target's own if `mutual_user` is set.  Secrets are text here."""

    user: str
    secret: str
    mutual_user: str | None = None
    mutual_secret: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRequest:
    """How a device is exported: `backstore` is its name in the kernel, `size` in bytes, `serial`
    the unit serial number.  `lun` None takes the first free one.  `acl`: initiator names; empty for
    all.  `portals`: (address, port), at which a target is to be reached.  `insecure`: also where
    everybody on the network may log in."""

    backstore: str
    config: str
    size: int
    serial: str
    iqn: str
    portals: tuple[tuple[str, int], ...]
    lun: int | None = None
    acl: tuple[str, ...] = ()
    chap: Chap | None = None
    insecure: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A device that is exported.  `made`: what of it did not exist before: `target`, `portal
    ADDRESS:PORT`, `acl IQN`."""

    backstore: str
    iqn: str
    lun: int
    portals: tuple[tuple[str, int], ...]
    made: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Backstore:
    """A backstore of the kind user:ploop as the kernel has it; `luns` are `IQN/LUN`."""

    name: str
    config: str
    size: int
    luns: tuple[str, ...]


class Lio:
    """The kernel's target on this machine.

    Raises UnsupportedError without rtslib, LIO or configfs and DeniedError without the right to
    change it.
    """

    def __init__(self) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about a dbroot that is in use
                import rtslib_fb
        except ImportError as error:
            raise UnsupportedError(
                f"rtslib-fb is not installed: {error}", hint="pip install 'ploopd[lio]'"
            ) from error
        if os.geteuid() != 0:
            raise DeniedError("only root may change the kernel's target")
        self._rtslib: Any = rtslib_fb

        unusable = "the kernel's target (LIO) is not to be had here"
        with self._errors(unusable), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # rtslib makes more of them by itself, and has no other way to be told.
            rtslib_fb.RTSRoot._preferred_dbroot = property(lambda root: _database(root._dbroot))
            self._root = rtslib_fb.RTSRoot()

    # -- backstores ------------------------------------------------------------------------

    def backstores(self) -> list[Backstore]:
        """Those of the kind user:ploop."""
        luns = self._luns()
        return [
            Backstore(
                name=each.name,
                config=each.config.removeprefix(f"{SUBTYPE}/"),
                size=each.size,
                luns=tuple(luns.get(each.path, ())),
            )
            for each in self._ours()
        ]

    def _luns(self) -> dict[str, list[str]]:
        """`TARGET/LUN` of each backstore's path.  rtslib would look at all LUNs for each one."""
        luns: dict[str, list[str]] = {}
        with self._errors("the kernel's LUNs cannot be listed"):
            for group in sorted(Path(self._root.path).glob("*/*/tpgt_*/lun")):
                for lun, path in sorted(_linked(group).items()):
                    luns.setdefault(path, []).append(f"{group.parts[-3]}/{lun}")
        return luns

    def create_backstore(self, request: ExportRequest) -> bool:
        """Make the backstore, which the handler then finds; False if there is one for the same
        device already.  Raises BusyError if another one has the name."""
        with self._errors("the kernel's backstores cannot be listed"):
            existing = self._find(request.backstore)
        config = f"{SUBTYPE}/{request.config}"
        if existing is not None:
            if existing.plugin == "user" and existing.config == config:
                return False
            raise BusyError(
                "another backstore has that name", field="backstore", value=request.backstore
            )
        with self._errors(f"the backstore {request.backstore} cannot be made"):
            self._rtslib.UserBackedStorageObject(
                request.backstore,
                config,
                request.size,
                wwn=request.serial,
                hw_max_sectors=HW_MAX_SECTORS,
                control=CONTROL,
            )
        return True

    def delete_backstore(self, name: str) -> None:
        """Delete a backstore of ours that no LUN uses.  Raises BusyError otherwise."""
        backstore = self._ours_by_name(name)
        luns = self._luns().get(backstore.path)
        if luns:
            raise BusyError(f"is exported as {', '.join(luns)}", field="backstore", value=name)
        with self._errors(f"the backstore {name} cannot be deleted"):
            backstore.delete()

    def _ours(self) -> list[UserBackedStorageObject]:
        self._root.invalidate_caches()
        with self._errors("the kernel's backstores cannot be listed"):
            return [each for each in self._root.storage_objects if _is_ours(each)]

    def _find(self, name: str) -> Any | None:
        """The backstore called so, whoever made it.  rtslib would make an object of each one that
        there is, of which a machine may have hundreds."""
        self._root.invalidate_caches()
        for adapter in Path(self._root.path, "core").glob("*_[0-9]*"):
            path = adapter / name
            if path.is_dir():
                return self._rtslib.tcm.StorageObject.so_from_path(str(path))
        return None

    def _ours_by_name(self, name: str) -> UserBackedStorageObject:
        with self._errors("the kernel's backstores cannot be listed"):
            each: UserBackedStorageObject | None = self._find(name)
            if each is not None and _is_ours(each):
                return each
        names = ", ".join(each.name for each in self._ours()) or "none"
        raise NotFoundError(
            "no such backstore", field="backstore", value=name, hint=f"there are: {names}"
        )

    # -- exporting -------------------------------------------------------------------------

    def export(self, request: ExportRequest) -> Exported:
        """Make a LUN of the backstore, with everything that is needed for it and not there yet.

        What was made is unmade when something fails.  Raises PloopError.
        """
        made: list[str] = []
        impossible = f"{request.backstore} cannot be exported as {request.iqn}"
        with self._errors(impossible), ExitStack() as undo:
            target, tpg = self._portal_group(request, made, undo)
            lun = self._lun(request, tpg, undo)
            self._access(request, tpg, lun, made, undo)
            self._portals(request, tpg, made, undo)
            if "target" in made:
                tpg.enable = True
            undo.pop_all()
        return Exported(
            backstore=request.backstore,
            iqn=target.wwn,
            lun=lun.lun,
            portals=request.portals,
            made=tuple(made),
        )

    def _portal_group(
        self, request: ExportRequest, made: list[str], undo: ExitStack
    ) -> tuple[Target, TPG]:
        rtslib = self._rtslib
        fabric = rtslib.FabricModule("iscsi")
        target = self._target(request.iqn)
        if target is not None:
            return target, _others_portal_group(target, request)
        target = rtslib.Target(fabric, request.iqn, mode="create")
        made.append("target")
        undo.callback(self._quietly, target.delete)
        tpg = rtslib.TPG(target, PORTAL_GROUP, mode="create")
        tpg.set_attribute("default_cmdsn_depth", COMMAND_WINDOW)
        demo = not request.acl
        tpg.set_attribute("generate_node_acls", int(demo))
        tpg.set_attribute("cache_dynamic_acls", int(demo))
        tpg.set_attribute("demo_mode_write_protect", 0)
        tpg.set_attribute("authentication", int(request.chap is not None))
        if request.chap is not None and demo:
            _set_chap(tpg, request.chap)
        return target, tpg

    def _lun(self, request: ExportRequest, tpg: TPG, undo: ExitStack) -> LUN:
        taken = _linked(Path(tpg.path, "lun"))
        for number, path in taken.items():
            if os.path.basename(path) == request.backstore:
                raise BusyError(
                    "the device is a LUN of that target already",
                    field="LUN",
                    value=f"{request.iqn}/{number}",
                )
        if request.lun in taken:
            raise BusyError("that LUN is taken", field="LUN", value=f"{request.iqn}/{request.lun}")
        backstore = self._ours_by_name(request.backstore)
        free = next(each for each in itertools.count() if each not in taken)
        wanted = free if request.lun is None else request.lun
        lun = self._rtslib.LUN(tpg, wanted, storage_object=backstore)
        undo.callback(self._quietly, lun.delete)
        return lun

    def _access(
        self, request: ExportRequest, tpg: TPG, lun: LUN, made: list[str], undo: ExitStack
    ) -> None:
        known = {acl.node_wwn: acl for acl in tpg.node_acls}
        # As targetcli does: a new LUN of a target with ACLs is for all who may log in.
        for name in request.acl or (() if _lets_everybody_in(tpg) else tuple(known)):
            acl = known.get(name)
            if acl is None:
                acl = self._rtslib.NodeACL(tpg, name, mode="create")
                made.append(f"acl {acl.node_wwn}")
                undo.callback(self._quietly, acl.delete)
                if request.chap is not None:
                    _set_chap(acl, request.chap)
            elif request.chap is not None and acl.chap_userid != request.chap.user:
                raise BusyError(
                    f"has the CHAP account {acl.chap_userid or 'of nobody'} already",
                    field="acl",
                    value=name,
                )
            if all(mapped.tpg_lun.lun != lun.lun for mapped in acl.mapped_luns):
                self._rtslib.MappedLUN(acl, lun.lun, lun)

    def _portals(self, request: ExportRequest, tpg: TPG, made: list[str], undo: ExitStack) -> None:
        known = {(portal.ip_address, portal.port) for portal in tpg.network_portals}
        for address, port in request.portals:
            plain = f"[{address}]" if ":" in address else address
            if {(plain, port), *((every, port) for every in EVERY_ADDRESS)} & known:
                continue
            try:
                portal = self._rtslib.NetworkPortal(tpg, plain, port)
            except self._rtslib.RTSLibError as error:
                raise PloopError(
                    "the kernel cannot listen there",
                    field="portal",
                    value=f"{plain}:{port}",
                    hint="`ss -ltnp` tells who does; --portal takes another address",
                    exit_code=ExitCode.ADDRESS_IN_USE,
                ) from error
            made.append(f"portal {plain}:{port}")
            undo.callback(self._quietly, portal.delete)

    # -- unexporting -----------------------------------------------------------------------

    def unexport(self, exported: Exported) -> None:
        """Take the LUN away, and what was made for it; of the target and its ACLs only what nobody
        else uses.  Raises PloopError."""
        with self._errors(f"{exported.iqn}/{exported.lun} cannot be taken away"):
            target = self._target(exported.iqn)
            if target is None:
                return
            for tpg in target.tpgs:
                self._unexport_from(tpg, exported)
            if "target" in exported.made and not any(
                _linked(Path(tpg.path, "lun")) for tpg in target.tpgs
            ):
                target.delete()

    def _target(self, iqn: str) -> Target | None:
        fabric = self._rtslib.FabricModule("iscsi")
        if not fabric.exists:
            return None
        return next((each for each in fabric.targets if each.wwn == iqn), None)

    def _unexport_from(self, tpg: TPG, exported: Exported) -> None:
        path = _linked(Path(tpg.path, "lun")).get(exported.lun, "")
        if os.path.basename(path) == exported.backstore:
            self._rtslib.LUN(tpg, exported.lun).delete()  # and its mappings
        for acl in list(tpg.node_acls):
            if f"acl {acl.node_wwn}" in exported.made and not list(acl.mapped_luns):
                acl.delete()
        for portal in list(tpg.network_portals):
            if f"portal {portal.ip_address}:{portal.port}" in exported.made:
                portal.delete()

    def _quietly(self, delete: Callable[[], object]) -> None:
        """Undo as far as possible: the first error is what is told."""
        with contextlib.suppress(self._rtslib.RTSLibError, OSError):
            delete()

    # -- errors ----------------------------------------------------------------------------

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """rtslib's errors and the kernel's, as ours."""
        try:
            yield
        except PloopError:
            raise
        except self._rtslib.RTSLibError as error:
            raise _translated(what, error) from error
        except OSError as error:
            raise _translated(what, error) from error


def _linked(directory: Path) -> dict[int, str]:
    """The LUNs in the `lun` directory of a portal group: the path of each one's backstore, empty
    if it has lost it.  One link is one system call here: a target may have hundreds of LUNs."""
    found: dict[int, str] = {}
    for lun in os.scandir(directory):
        links = [each.path for each in os.scandir(lun.path) if each.is_symlink()]
        paths = [os.path.join(lun.path, os.readlink(link)) for link in links]
        found[int(lun.name.removeprefix("lun_"))] = os.path.normpath(paths[0]) if paths else ""
    return found


def _is_ours(backstore: Any) -> bool:
    return backstore.plugin == "user" and (backstore.config or "").startswith(f"{SUBTYPE}/")


def _translated(what: str, error: Exception) -> PloopError:
    text = str(error)
    number = re.search(r"\[Errno (\d+)\]", text)
    code = int(number[1]) if number else getattr(error, "errno", None)
    if code is not None:
        return PloopError(f"{what}: {os.strerror(code)}", hint="see dmesg for the kernel's reason")
    if "not valid" in text:
        return UsageError(f"{what}: {text}", hint="an IQN is like iqn.2026-01.org.example:disk")
    if re.search("configfs|module", text, re.IGNORECASE):
        return UnsupportedError(
            f"{what}: {text}", hint="modprobe target_core_user iscsi_target_mod"
        )
    return PloopError(f"{what}: {text}")


def _database(now: str) -> str:
    """Where the kernel's target keeps what reservations and ALUA must not forget.  rtslib insists
    on a directory, Debian's on another one than the original; whichever is in use may stay."""
    if now in DATABASES:
        return now
    return next((each for each in DATABASES if os.path.isdir(each)), now)


def _lets_everybody_in(tpg: TPG) -> bool:
    return bool(tpg.get_attribute("generate_node_acls") == "1")


def _others_portal_group(target: Target, request: ExportRequest) -> TPG:
    """The portal group of a target that exists, if what is asked for agrees with how it is.

    Raises BusyError: nothing of it is changed, and nobody is let in whom the caller keeps out.
    """

    def refused(what: str, hint: str) -> BusyError:
        return BusyError(f"the target exists and {what}", field="iqn", value=target.wwn, hint=hint)

    tpg = next((each for each in target.tpgs if each.tag == PORTAL_GROUP), None)
    if tpg is None:
        raise refused("has no portal group 1", "export to another --iqn")
    if not tpg.enable:
        raise refused("is disabled", f"targetcli /iscsi/{target.wwn}/tpg1 enable")
    everybody = _lets_everybody_in(tpg)
    asks = tpg.get_attribute("authentication") == "1"
    if request.acl and everybody:
        raise refused("lets every initiator in", "export to another --iqn, or without --acl")
    if request.chap is not None and not asks:
        raise refused("asks nobody for CHAP", "export to another --iqn, or without --chap-file")
    if request.chap is not None and not request.acl:
        raise refused(
            "has its own CHAP accounts", "give --acl, too, or leave --chap-file out to use them"
        )
    if not (everybody or request.acl or list(tpg.node_acls)):
        raise refused("lets no initiator in", "give --acl")
    open_to_all = everybody and not asks and not request.insecure
    if open_to_all and any(not _is_loopback(each.ip_address) for each in tpg.network_portals):
        raise refused(
            "lets everybody on the network in", "export to another --iqn, or say --insecure"
        )
    return tpg


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.strip("[]")).is_loopback


def _set_chap(where: TPG | NodeACL, chap: Chap) -> None:
    where.chap_userid = chap.user
    where.chap_password = chap.secret
    if chap.mutual_user is not None and chap.mutual_secret is not None:
        where.chap_mutual_userid = chap.mutual_user
        where.chap_mutual_password = chap.mutual_secret
