"""A small XML reader and writer: elements, attributes and text; nothing that could expand or reach
out.

expat does the reading.  Document type declarations (and with them entities) and processing
instructions are refused; size and depth have limits.  Comments are not kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

from image_format.errors import DescriptorFormatError

MAX_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 16
_INDENT: Final = "    "


@dataclass(frozen=True, slots=True, kw_only=True)
class XmlElement:
    """An element: its tag, its attributes, its child elements and the text directly inside it."""

    tag: str
    attributes: tuple[tuple[str, str], ...] = ()
    children: tuple[XmlElement, ...] = ()
    text: str = ""

    def find_all(self, tag: str) -> list[XmlElement]:
        """The children called `tag`."""
        return [child for child in self.children if child.tag == tag]

    def others(self, *tags: str) -> tuple[XmlElement, ...]:
        """The children called otherwise."""
        return tuple(child for child in self.children if child.tag not in tags)


class _Node:
    """An element that is being read."""

    __slots__ = ("attributes", "children", "tag", "text")

    def __init__(self, tag: str, attributes: dict[str, str]) -> None:
        self.tag = tag
        self.attributes = tuple(attributes.items())
        self.children: list[XmlElement] = []
        self.text: list[str] = []

    def freeze(self) -> XmlElement:
        return XmlElement(
            tag=self.tag,
            attributes=self.attributes,
            children=tuple(self.children),
            text="".join(self.text).strip(),
        )


class _Builder:
    """Receives expat's events."""

    def __init__(self, file: str) -> None:
        self._file = file
        self._open: list[_Node] = []
        self.root: XmlElement | None = None
        self.parser = expat.ParserCreate()
        self.parser.buffer_text = True
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._characters
        self.parser.StartDoctypeDeclHandler = self._doctype
        self.parser.ProcessingInstructionHandler = self._instruction

    def _refuse(self, message: str, field: str, value: object) -> DescriptorFormatError:
        offset = self.parser.CurrentByteIndex
        return DescriptorFormatError(
            message, file=self._file, offset=offset, field=field, value=value
        )

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        if len(self._open) >= MAX_DEPTH:
            raise self._refuse(f"is nested deeper than {MAX_DEPTH} elements", "element", tag)
        self._open.append(_Node(tag, attributes))

    def _end(self, _tag: str) -> None:
        element = self._open.pop().freeze()
        if self._open:
            self._open[-1].children.append(element)
        else:
            self.root = element

    def _characters(self, text: str) -> None:
        if self._open:
            self._open[-1].text.append(text)

    def _doctype(self, name: str, _system: object, _public: object, _internal: object) -> None:
        raise self._refuse("document type declarations are refused", "DOCTYPE", name)

    def _instruction(self, target: str, _data: str) -> None:
        raise self._refuse("processing instructions are refused", "instruction", target)


def parse(data: bytes, *, file: str = "<bytes>") -> XmlElement:
    """The root element of an XML document.

    Raises DescriptorFormatError if it is larger than 1 MiB, nested deeper than 16 elements, not
    well formed, or has a document type declaration or a processing instruction.
    """
    if len(data) > MAX_BYTES:
        raise DescriptorFormatError(
            f"is larger than {MAX_BYTES} bytes", file=file, field="length", value=len(data)
        )
    builder = _Builder(file)
    try:
        builder.parser.Parse(data, True)
    except expat.ExpatError as error:
        raise DescriptorFormatError(
            f"is not well-formed XML: {expat.ErrorString(error.code)}",
            file=file,
            offset=max(builder.parser.ErrorByteIndex, 0),
            field="line",
            value=error.lineno,
        ) from error
    except (LookupError, ValueError) as error:
        raise DescriptorFormatError(
            f"is in an encoding that cannot be read: {error}", file=file, field="encoding"
        ) from error
    if builder.root is None:
        raise DescriptorFormatError("has no root element", file=file)
    return builder.root


def serialise(root: XmlElement) -> bytes:
    """The document as UTF-8, indented by four spaces."""
    lines = ['<?xml version="1.0" encoding="UTF-8"?>', *_lines(root, "")]
    return ("\n".join(lines) + "\n").encode()


def _lines(element: XmlElement, indent: str) -> Iterator[str]:
    attributes = "".join(f" {name}={quoteattr(value)}" for name, value in element.attributes)
    opening = f"{indent}<{element.tag}{attributes}"
    text = escape(element.text)
    if not element.children:
        yield f"{opening}>{text}</{element.tag}>" if text else f"{opening}/>"
        return
    yield f"{opening}>{text}"
    for child in element.children:
        yield from _lines(child, indent + _INDENT)
    yield f"{indent}</{element.tag}>"
