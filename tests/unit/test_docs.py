"""The documents name real files and real functions.

In the documents below every code span that looks like a path must
exist (`ploopd/gate/`, `ploopd/gate/filter.py`), and every `path.py:Name` or
`path.py:Class.method` must be defined in that file.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = ["docs/architecture.md", "docs/request-path.md", "docs/standby.md"]
SPAN = re.compile(r"`([^`\n]+)`")
TOP = ("ploopd/", "image_format/", "scst_shim/", "tests/", "docs/", "bench/", "systemd/", ".ci/")


def references(document: str) -> list[str]:
    """The code spans of a document that claim to be a place in the tree."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return [span for span in SPAN.findall(text) if span.startswith(TOP) and "*" not in span]


def defined_names(path: Path) -> set[str]:
    """Functions, classes, methods and module-level assignments, dotted below their class."""
    names: set[str] = set()

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names.add(prefix + node.name)
            elif isinstance(node, ast.ClassDef):
                names.add(prefix + node.name)
                visit(node.body, prefix + node.name + ".")
            elif isinstance(node, ast.Assign):
                names.update(prefix + t.id for t in node.targets if isinstance(t, ast.Name))
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(prefix + node.target.id)

    visit(ast.parse(path.read_text(encoding="utf-8")).body, "")
    return names


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_place_named_in_the_document_exists(document: str) -> None:
    places = references(document)
    assert len(places) >= 10, "the document lost its references, or the pattern is wrong"
    wrong = []
    for place in places:
        file, _, name = place.partition(":")
        path = ROOT / file
        if not path.exists() or (name and name not in defined_names(path)):
            wrong.append(place)
    assert not wrong, f"{document} names places that do not exist: {wrong}"


def test_the_check_can_fail() -> None:
    assert "no_such_function" not in defined_names(Path(__file__))
    assert "defined_names" in defined_names(Path(__file__))
