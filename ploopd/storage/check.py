"""`check_image`: is one delta sound, and if wanted, make it so.  Words and numbers as
qemu-img's."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Final, Literal

from image_format import HEADER_SIZE
from ploopd.errors import ReadOnlyError, UnsupportedError
from ploopd.fileio.file import File
from ploopd.fileio.locks import lock_image
from ploopd.fileio.oslayer import REAL, OsLayer
from ploopd.storage.chain_files import ImageFile, locate
from ploopd.storage.check_repair import repair_all, repair_leaks
from ploopd.storage.check_scan import Finding, Scan, Severity, findings, scan
from ploopd.storage.opener import open_image, open_stack
from ploopd.storage.probe import ImageFormat, probe_format

Repair = Literal["leaks", "all"]

FORMAT_NAME: Final = "parallels"
"""What qemu-img calls this format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """The state of a delta after the check, and after the repair if there was one.

    `image_end_offset`: byte after the last cluster in use.  `corruptions`, `leaks`: what is wrong
    now; `…_fixed`: what a repair removed.  `fragmented_clusters`: allocated clusters that do not
    follow the one before.  `check_errors`: always 0 here, since a check that fails raises; qemu-img
    has it.
    """

    filename: str
    format: str
    image_end_offset: int
    total_clusters: int
    allocated_clusters: int
    fragmented_clusters: int
    corruptions: int
    leaks: int
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    check_errors: int = 0
    details: tuple[Finding, ...] = ()

    def as_dict(self) -> dict[str, object]:
        """The report under qemu-img's names, with the details as `details`."""
        values: dict[str, object] = {
            field.name.replace("_", "-"): getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "details"
        }
        values["details"] = [
            {
                "kind": one.kind,
                "severity": one.severity.value,
                "message": one.message,
                "count": one.count,
                "field": one.field,
                "value": one.value,
                "fixed": one.fixed,
            }
            for one in self.details
        ]
        return values


def check_all(
    path: str | os.PathLike[str], *, repair: Repair | None = None, layer: OsLayer = REAL
) -> list[CheckReport]:
    """Check every delta of the image at `path` (a delta, DiskDescriptor.xml or its directory), base
    first; a raw base is passed over.

    Raises like `check_image`, DescriptorError for a descriptor that cannot be used, and
    CorruptImageError if its deltas do not fit together.
    """
    files = locate(os.fspath(path), None, ImageFormat.AUTO)
    if files.descriptor is None:
        return [check_image(path, repair=repair, layer=layer)]
    deltas = [image for image in files.images if image.format is not ImageFormat.RAW]
    if not deltas:
        raise UnsupportedError("is a raw image: there are no metadata to check", path=files.path)
    reports = [_check(image, files.path, repair, layer) for image in deltas]
    _, stack = open_stack(path, locking=False)
    try:
        stack.verify()
    finally:
        stack.close()
    return reports


def check_image(
    path: str | os.PathLike[str], *, repair: Repair | None = None, layer: OsLayer = REAL
) -> CheckReport:
    """Check the delta `path`; without `repair` nothing is written.

    `repair="leaks"` gives back space that nothing uses; `"all"` also repairs corruption.  Blocking.

    Raises UnsupportedError for a file that is no delta (raw images have no metadata) or must not be
    repaired, ImageFormatError for a header that gives no geometry, LockedError if the image is in
    use elsewhere, and what opening and reading raise.
    """
    name = os.fspath(path)
    image = ImageFile(path=name, root=None, format=ImageFormat.AUTO, guid=None)
    return _check(image, name, repair, layer)


def _check(image: ImageFile, descriptor: str, repair: Repair | None, layer: OsLayer) -> CheckReport:
    name = image.full_path
    file = _open(image, descriptor, repair is not None, layer)
    try:
        lock_image(file.fd, path=name, writer=repair is not None)
        size = file.size()
        if probe_format(file.pread(min(size, HEADER_SIZE), 0), name) is ImageFormat.RAW:
            raise UnsupportedError("is a raw image: there are no metadata to check", path=name)
        before = scan(file)
        if repair is None:
            return _report(before, name)
        if repair == "leaks":
            repair_leaks(file, before)
        else:
            repair_all(file, before)
        return _compare(before, scan(file), name)
    finally:
        file.close()


def _open(image: ImageFile, descriptor: str, writable: bool, layer: OsLayer) -> File:
    try:
        return open_image(image, descriptor, read_only=not writable, engine=None, layer=layer)
    except ReadOnlyError as error:
        error.hint = "check it without --repair"
        raise


def _report(found: Scan, name: str) -> CheckReport:
    return CheckReport(
        filename=name,
        format=FORMAT_NAME,
        image_end_offset=found.end,
        total_clusters=found.header.bat_entries,
        allocated_clusters=found.bat.allocated,
        fragmented_clusters=found.fragmented,
        corruptions=found.corruptions,
        leaks=found.leaks,
        details=tuple(findings(found, name)),
    )


def _compare(before: Scan, after: Scan, name: str) -> CheckReport:
    report = _report(after, name)
    left = {(one.kind, one.field) for one in report.details}
    gone = tuple(
        dataclasses.replace(one, fixed=True)
        for one in findings(before, name)
        if one.severity is not Severity.NOTE and (one.kind, one.field) not in left
    )
    return dataclasses.replace(
        report,
        corruptions_fixed=max(0, before.corruptions - after.corruptions),
        leaks_fixed=max(0, before.leaks - after.leaks),
        details=gone + report.details,
    )
