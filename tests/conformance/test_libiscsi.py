"""libiscsi's conformance suite against a thin LUN, held against a list of every single test.

`expected.txt` names all tests of the suite with the result each must have.  A test that does better
than listed fails the comparison as well, so that the list never lags behind.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support import cunit, oracles
from tests.support.cunit import CunitTest, Outcome
from tests.support.serve import ServeProcess

pytestmark = [pytest.mark.functional, pytest.mark.timeout(400)]

HERE = Path(__file__).resolve().parent
EXPECTED = HERE / "expected.txt"
# The tool's second loop asks for the status of LBA i+1 and expects a descriptor that begins at LBA
# i+8 where a physical block has 8 logical ones; SBC-3 5.5.2 wants it to begin at the LBA asked for.
TOOL_ERRORS = ("GetLBAStatus.UnmapSingle",)
OUT = Path(os.environ.get("PLOOPD_TEST_OUT", HERE.parents[1] / "out"))


def read_expectations() -> dict[str, Outcome]:
    """Lines `NAME RESULT [REASON]`; # begins a comment."""
    found = {}
    for line in EXPECTED.read_text().splitlines():
        words = line.split("#", 1)[0].split()
        if words:
            assert words[0] not in found, f"{words[0]} is listed twice"
            found[words[0]] = Outcome(words[1])
    return found


def write_table(tests: dict[str, CunitTest], expected: dict[str, Outcome]) -> None:
    """out/conformance.md: every test with its result."""
    counts = {o: sum(t.outcome is o for t in tests.values()) for o in Outcome}
    lines = [
        "# iscsi-test-cu",
        "",
        ", ".join(f"{counts[o]} {o.value}" for o in Outcome if counts[o]),
        "",
        "| test | result | expected | reason |",
        "|---|---|---|---|",
    ]
    for test in tests.values():
        wanted = expected.get(test.name)
        word = wanted.value if wanted else "not listed"
        reason = "; ".join(test.reasons).replace("|", "\\|")
        lines.append(f"| {test.name} | {test.outcome.value} | {word} | {reason} |")
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "conformance.md").write_text("\n".join(lines) + "\n")


def run_suite(directory: Path, *options: str) -> str:
    """What the whole suite prints against a thin LUN served with `options`."""
    if oracles.have("iscsi-test-cu", "qemu-img"):
        pytest.skip("iscsi-test-cu or qemu-img is missing: apt-get install libiscsi-bin qemu-utils")
    image = directory / "thin.hds"
    oracles.run("qemu-img", "create", "-q", "-f", "parallels", str(image), "256M")
    with ServeProcess(image, directory=directory, options=options) as server:
        url = str(server.url)
        # The second URL is a second path to the same disk: without it the multipath tests skip.
        result = subprocess.run(
            ["iscsi-test-cu", "--dataloss", "--test", "ALL", url, url],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=350,
            check=False,
        )
        assert server.process is not None
        assert server.process.poll() is None, f"ploopd died: {server.stderr[-3000:]}"
        assert "Traceback" not in server.stderr
    assert oracles.bat_problems(image) == []
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CunitTest]:
    output = run_suite(tmp_path_factory.mktemp("conformance"))
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / "conformance.log").write_text(output)
    tests = cunit.parse(output)
    write_table(tests, read_expectations())
    return tests


def test_the_whole_suite_ran(results: dict[str, CunitTest]) -> None:
    assert list(results) == list(read_expectations())


def test_every_result_is_the_expected_one(results: dict[str, CunitTest]) -> None:
    expected = read_expectations()
    different = [
        f"{t.name}: {t.outcome.value}, expected {expected[t.name].value}: {'; '.join(t.reasons)}"
        for t in results.values()
        if t.outcome is not expected.get(t.name)
    ]
    assert not different, "\n" + "\n".join(different)


def test_nothing_fails_outside_reservations_and_extended_copy() -> None:
    """The list itself may hold failures only where the commands are not there yet."""
    excused = ("Prout", "Prin", "Reserve6", "ExtendedCopy", "ReceiveCopyResults", *TOOL_ERRORS)
    failing = [name for name, outcome in read_expectations().items() if outcome is Outcome.FAIL]
    assert [name for name in failing if not name.startswith(excused)] == []


def test_nothing_at_all_fails_with_small_physical_blocks(tmp_path: Path) -> None:
    """Where a physical block is a logical one, the tool's own error cannot show."""
    tests = cunit.parse(run_suite(tmp_path, "--physical-block-size", "512"))
    assert len(tests) == len(read_expectations())
    assert [test.name for test in tests.values() if test.outcome is Outcome.FAIL] == []
