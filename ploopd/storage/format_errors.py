"""The edge between `image_format` and the rest: its errors become ploopd's."""

from __future__ import annotations

from image_format import DescriptorFormatError, FormatError
from ploopd.errors import DescriptorError, ImageFormatError, PloopError


def convert(error: FormatError) -> PloopError:
    """The error to raise `from` a `FormatError`: same sentence, file, field and value."""
    kind = DescriptorError if isinstance(error, DescriptorFormatError) else ImageFormatError
    return kind(error.message, path=error.file, field=error.field, value=error.value)
