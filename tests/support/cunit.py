"""Reads the log of iscsi-test-cu: what each test did, not what CUnit's summary says.

CUnit counts a test that skipped itself as passed; here it is a skip.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import Enum

_SUITE = re.compile(r"Suite: (\S+)")
_ASSERTION = re.compile(r"\s+\d+\. (.*?)(?:\[SKIPPED\].*)?$")
_TEST = re.compile(r"\s+Test: (\S+) \.\.\.(.*)")


class Outcome(Enum):
    """What became of a test; `SKIP` also when only a part of it was skipped."""

    PASS = "pass"
    FAIL = "fail"
    SKIP = "skip"
    UNFINISHED = "unfinished"


@dataclass(slots=True)
class CunitTest:
    """One test: `SUITE.TEST`, its outcome and the reasons it printed."""

    name: str
    outcome: Outcome = Outcome.UNFINISHED
    reasons: list[str] = field(default_factory=list)
    skipped: bool = False

    def take(self, text: str) -> None:
        """One line of the test's output.

        What follows the closing word is about the suite, except for the numbered list of failed
        assertions.
        """
        if self.outcome is not Outcome.UNFINISHED:
            if self.outcome is Outcome.FAIL and (match := _ASSERTION.match(text)):
                self._add(match[1].strip())
            return
        word = text.strip()
        if word.startswith("FAILED"):
            self.outcome = Outcome.FAIL
        elif word.startswith("passed"):
            self.outcome = Outcome.SKIP if self.skipped else Outcome.PASS
        elif "[SKIPPED]" in text:
            self.skipped = True
            self._add(text.split("[SKIPPED]", 1)[1].strip())
        elif "[FAILED]" in text:
            self._add(text.split("[FAILED]", 1)[1].strip())

    def _add(self, reason: str) -> None:
        if reason not in self.reasons:
            self.reasons.append(reason)


def parse(log: str) -> dict[str, CunitTest]:
    """The tests of a log by name, in their order."""
    tests: dict[str, CunitTest] = {}
    suite = ""
    current: CunitTest | None = None
    for line in log.splitlines():
        if match := _SUITE.match(line):
            suite, current = match[1], None
        elif match := _TEST.match(line):
            current = CunitTest(name=f"{suite}.{match[1]}")
            tests[current.name] = current
            current.take(match[2])
        elif current is not None:
            current.take(line)
    return tests
