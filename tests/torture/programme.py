"""What a programme is, and what it returns."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, cast

from tests.torture import programmes


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One batch: `errors` that an initiator saw, `mismatches` of content or order.

    `notes` say what went wrong, or what else is worth keeping.  `worst` are measurements of which
    the ledger keeps the largest: milliseconds, bytes, as their names say.
    """

    episodes: int
    errors: int = 0
    mismatches: int = 0
    notes: tuple[str, ...] = ()
    worst: Mapping[str, float] = field(default_factory=dict)

    @property
    def good(self) -> bool:
        return not self.errors and not self.mismatches


class Programme(Protocol):
    """A module of `tests.torture.programmes`."""

    name: str
    goal: int
    what: str

    def missing(self) -> str | None:
        """What this machine lacks for it, in one line."""

    def run(self, seed: int, directory: Path) -> Result:
        """One batch of episodes that `seed` decides."""


def find() -> dict[str, Programme]:
    """All programmes by name."""
    found = {}
    for module in pkgutil.iter_modules(programmes.__path__):
        loaded = importlib.import_module(f"{programmes.__name__}.{module.name}")
        programme = cast(Programme, loaded)
        found[programme.name] = programme
    return dict(sorted(found.items()))
