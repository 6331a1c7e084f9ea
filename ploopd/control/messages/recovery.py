"""What is done to a device under its initiators: replace, reload, resize, clear the latch."""

from __future__ import annotations

from ploopd.control.messages.base import Message


class ReplaceParameters(Message, frozen=True, kw_only=True):
    """Put `image` under the device instead of one of its deltas.

    Which: the top, or the delta of `level` (0 is the top) or `guid`.  `force` accepts an unclean
    image, `keep_name` renames `image` to the old file's name, `keep_descriptor` leaves the
    DiskDescriptor.xml as it is, `dry_run` only checks.
    """

    name: str
    image: str
    force: bool = False
    level: int | None = None
    guid: str | None = None
    keep_name: bool = False
    keep_descriptor: bool = False
    dry_run: bool = False


class ReloadParameters(Message, frozen=True, kw_only=True):
    """Close all files of the device and open them again; `dry_run` only checks."""

    name: str
    dry_run: bool = False


class RecoveryStep(Message, frozen=True, kw_only=True):
    """A step that was done, or in a dry run what it would do."""

    step: str
    elapsed: float
    detail: str = ""


class RecoveryReport(Message, frozen=True, kw_only=True):
    """A recovery that has succeeded, or would (`dry_run`).

    `image` is what is served now in the place of `previous`; `level` is None when everything was
    opened again.
    """

    device: str
    image: str
    previous: str
    identity: str
    level: int | None
    guid: str | None
    dry_run: bool
    elapsed: float
    steps: list[RecoveryStep]


class ReplaceStep(Message, frozen=True, kw_only=True):
    """One step of a recovery, sent when it is done; the last reply has `image` and `report` set.

    `elapsed` counts from the call.  `planned`: a dry run; the step was not done, and `detail` says
    what it would do.
    """

    step: str
    elapsed: float
    detail: str = ""
    planned: bool = False
    image: str | None = None
    report: RecoveryReport | None = None


class ResizeParameters(Message, frozen=True, kw_only=True):
    """Give the device and its image `size` bytes, rounded up to whole clusters."""

    name: str
    size: int


class ResizeStep(Message, frozen=True, kw_only=True):
    """One step of a resize, sent when it is done; the last reply has `size` and `previous` set.

    `elapsed` counts from the call.
    """

    step: str
    elapsed: float
    detail: str = ""
    size: int | None = None
    previous: int | None = None


class ClearLatchReply(Message, frozen=True, kw_only=True):
    """The failure that had made the device read-only."""

    failure: str
