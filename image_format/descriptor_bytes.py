"""The bytes of a DiskDescriptor.xml: where its elements are, for changes in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from xml.parsers import expat

from image_format.descriptor import Descriptor, parse_descriptor
from image_format.errors import DescriptorFormatError

_UTF8: Final = frozenset({"utf-8", "utf8", "us-ascii", "ascii"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Element:
    """`place`: the names from the root's children down; `start`: of its start tag, `stop`: of its
    end tag, in bytes; `text`: what comes after its last child."""

    place: tuple[str, ...]
    start: int
    stop: int
    text: str

    def content(self, data: bytes) -> tuple[int, int] | None:
        """Where in `data` it is between its tags; None if it has only one."""
        begin = data.find(b">", self.start) + 1
        return (begin, self.stop) if 0 < begin <= self.stop else None


def elements(data: bytes) -> list[Element]:
    """The elements of a document that is known to be well formed, in the order of their ends; none
    for one in another encoding than UTF-8."""
    finder = _Finder()
    finder.parser.Parse(data, True)
    return finder.found if finder.utf8 else []


def says(data: bytes, wanted: Descriptor) -> bool:
    """Whether `data` is a document with that meaning."""
    try:
        return parse_descriptor(data) == wanted
    except DescriptorFormatError:
        return False


class _Finder:
    """Receives expat's events."""

    def __init__(self) -> None:
        self._path: list[tuple[str, int]] = []
        self._text: list[str] = []
        self.utf8 = True
        self.found: list[Element] = []
        self.parser = expat.ParserCreate()
        self.parser.XmlDeclHandler = self._declaration
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._text.append

    def _declaration(self, _version: str, encoding: str | None, _standalone: int) -> None:
        self.utf8 = encoding is None or encoding.lower() in _UTF8

    def _start(self, tag: str, _attributes: dict[str, str]) -> None:
        self._path.append((tag, self.parser.CurrentByteIndex))
        self._text.clear()

    def _end(self, _tag: str) -> None:
        place = tuple(tag for tag, _ in self._path[1:])
        _, start = self._path.pop()
        stop = self.parser.CurrentByteIndex
        self.found.append(Element(place=place, start=start, stop=stop, text="".join(self._text)))
        self._text.clear()
