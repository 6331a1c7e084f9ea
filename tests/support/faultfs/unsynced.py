"""What a storage client's cache holds of a file: pages that were acknowledged and not yet written.

A page is filled from the file when it is first written to, as a page cache does it.
"""

from __future__ import annotations

import os
import random

PAGE = 4096


class Unsynced:
    """The dirty pages of one file, and how far they reach."""

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}
        self.end = 0

    def __len__(self) -> int:
        return len(self.pages) * PAGE

    def write(self, descriptor: int, offset: int, data: bytes) -> None:
        """Acknowledge `data`; `descriptor` is the file below, open for reading."""
        position = 0
        while position < len(data):
            number, within = divmod(offset + position, PAGE)
            piece = data[position : position + PAGE - within]
            page = self.pages.get(number)
            if page is None:
                page = bytearray(os.pread(descriptor, PAGE, number * PAGE).ljust(PAGE, b"\0"))
                self.pages[number] = page
            page[within : within + len(piece)] = piece
            position += len(piece)
        self.end = max(self.end, offset + len(data))

    def read(self, descriptor: int, offset: int, length: int) -> bytes:
        """What a reader of the file sees."""
        size = max(os.fstat(descriptor).st_size, self.end)
        length = max(0, min(length, size - offset))
        data = bytearray(os.pread(descriptor, length, offset).ljust(length, b"\0"))
        for number in range(offset // PAGE, -(-(offset + length) // PAGE)):
            page = self.pages.get(number)
            if page is None:
                continue
            start = max(offset, number * PAGE)
            stop = min(offset + length, (number + 1) * PAGE)
            data[start - offset : stop - offset] = page[start % PAGE : start % PAGE + stop - start]
        return bytes(data)

    def truncate(self, size: int) -> None:
        """The file below has been truncated to `size`."""
        self.pages = {n: page for n, page in self.pages.items() if n * PAGE < size}
        if size % PAGE and (last := self.pages.get(size // PAGE)) is not None:
            last[size % PAGE :] = bytes(PAGE - size % PAGE)
        self.end = min(self.end, size)

    def write_back(self, descriptor: int) -> None:
        """Everything to the file below; nothing is unsynced any more."""
        size = max(os.fstat(descriptor).st_size, self.end)
        for number, page in sorted(self.pages.items()):
            start = number * PAGE
            os.pwrite(descriptor, page[: max(0, min(PAGE, size - start))], start)
        self.forget()

    def lose(self, descriptor: int, *, keep: float, seed: int) -> None:
        """Drop it all, but for the share `keep` of the pages that had been written in time."""
        chosen = random.Random(seed)
        self.pages = {n: page for n, page in sorted(self.pages.items()) if chosen.random() < keep}
        if self.pages:
            self.end = min(self.end, (max(self.pages) + 1) * PAGE)
            self.write_back(descriptor)
        self.forget()

    def forget(self) -> None:
        self.pages.clear()
        self.end = 0
