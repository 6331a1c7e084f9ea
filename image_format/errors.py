"""Errors of this package: the bytes are not what the format says they must be."""

from __future__ import annotations


class FormatError(Exception):
    """The bytes break a rule of the format.

    `message` is one sentence.  `file` names the file, `offset` is the byte offset in it, `field`
    the field's name (``"cluster_sectors"``, ``"BAT[7]"``, ``"Disk_size"``) and `value` what was
    found there; each is None where it does not apply.
    """

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        offset: int | None = None,
        field: str | None = None,
        value: object = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = file
        self.offset = offset
        self.field = field
        self.value = value

    def __str__(self) -> str:
        text = self.message if self.file is None else f"{self.file}: {self.message}"
        details = []
        if self.field is not None:
            details.append(f"{self.field} = {self.value!r}")
        if self.offset is not None:
            details.append(f"at byte {self.offset}")
        return f"{text} ({', '.join(details)})" if details else text


class DescriptorFormatError(FormatError):
    """DiskDescriptor.xml breaks a rule of its schema, or its chain of images is contradictory."""
