"""The runner of the long programmes: it resumes, adds up, stops at failures, and reports."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from tests.torture import __main__ as runner
from tests.torture import ledger as ledgers
from tests.torture import programmes, report
from tests.torture.ledger import Ledger, LedgerError
from tests.torture.programme import Programme, Result, find

BAD_SEED = 4


class Sums(ModuleType):
    """A programme of ten episodes a batch; one seed fails, another one breaks when told to."""

    name = "sums"
    goal = 50
    what = "sums are sums"

    def __init__(self) -> None:
        super().__init__("sums")
        self.seeds: list[int] = []
        self.lacking: str | None = None
        self.bad: dict[int, Result | BaseException] = {}

    def missing(self) -> str | None:
        return self.lacking

    def run(self, seed: int, directory: Path) -> Result:
        assert directory.is_dir()
        self.seeds.append(seed)
        outcome = self.bad.get(seed, Result(episodes=10, worst={"ms": float(seed)}))
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sums:
    programme = Sums()
    monkeypatch.setattr(runner, "find", lambda: {"sums": programme})
    monkeypatch.setattr(ledgers, "RECORDED", tmp_path / "none")
    monkeypatch.setattr(
        ledgers, "now", iter(f"2026-01-01 00:{n:02}:00" for n in range(60)).__next__
    )
    return programme


def torture(tmp_path: Path, *arguments: str) -> int:
    return runner.main(["--ledger", str(tmp_path / "torture.json"), *arguments])


def test_it_plays_until_the_goal_and_goes_on_where_it_stopped(sums: Sums, tmp_path: Path) -> None:
    assert torture(tmp_path, "--episodes", "20") == 0
    assert sums.seeds == [1, 2]
    assert torture(tmp_path) == 0
    assert sums.seeds == [1, 2, 3, 4, 5]
    assert torture(tmp_path) == 0, "the goal is reached: nothing to do"
    assert sums.seeds == [1, 2, 3, 4, 5]
    one, two = Ledger(tmp_path / "torture.json", tmp_path / "none").of("sums")
    assert (one.episodes, one.seeds, one.worst) == (20, [[1, 3]], {"ms": 2.0})
    assert (two.episodes, two.seeds, two.batches) == (30, [[3, 6]], 3)


@pytest.mark.parametrize(
    "outcome",
    [Result(episodes=3, mismatches=1, notes=("7 is not 8",)), ValueError("broken")],
    ids=["mismatch", "exception"],
)
def test_a_failure_stops_and_says_how_to_play_it_again(
    outcome: Result | Exception, sums: Sums, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sums.bad[BAD_SEED] = outcome
    assert torture(tmp_path) == 1
    assert sums.seeds[-1] == BAD_SEED
    said = capsys.readouterr().err
    assert "make torture TORTURE_ARGS='--programme sums --seed 4'" in said
    assert ("7 is not 8" if isinstance(outcome, Result) else "broken") in said
    entry = Ledger(tmp_path / "torture.json", tmp_path / "none").of("sums")[0]
    assert entry.failed
    assert entry.notes[0].startswith("seed 4: ")
    # The same batch again, outside the ledger; then, mended, the count begins anew.
    assert torture(tmp_path, "--programme", "sums", "--seed", "4") == 1
    sums.bad.clear()
    sums.seeds.clear()
    assert torture(tmp_path, "--programme", "sums", "--seed", "4") == 0
    assert torture(tmp_path) == 0
    assert sums.seeds == [4, 5, 6, 7, 8, 9]


def test_what_is_not_there_is_said_and_no_failure(
    sums: Sums, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sums.lacking = "there is no abacus"
    assert torture(tmp_path) == 0
    assert "sums: not played: there is no abacus" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_had_ended(sums: Sums, tmp_path: Path) -> None:
    sums.bad[3] = KeyboardInterrupt()
    assert torture(tmp_path) == 130
    (entry,) = Ledger(tmp_path / "torture.json", tmp_path / "none").of("sums")
    assert (entry.episodes, entry.seeds, entry.failed) == (20, [[1, 3]], False)


def test_two_runs_at_once_keep_both_results(tmp_path: Path) -> None:
    ledger = [Ledger(tmp_path / "torture.json", tmp_path / "none") for _ in range(2)]
    entries = [each.begin(name) for each, name in zip(ledger, ("one", "two"), strict=True)]
    for each, entry in zip(ledger, entries, strict=True):
        entry.add(1, Result(episodes=5), 1.0)
        each.save()
    entries[0].add(2, Result(episodes=5), 1.0)
    ledger[0].save()
    found = Ledger(tmp_path / "torture.json", tmp_path / "none")
    assert [each.episodes for each in (*found.of("one"), *found.of("two"))] == [10, 5]


def test_a_ledger_that_cannot_be_read_is_an_error(
    sums: Sums, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torture.json").write_text("[{}]")
    assert torture(tmp_path) == 2
    assert "torture.json" in capsys.readouterr().err
    with pytest.raises(LedgerError, match="move it away"):
        Ledger(tmp_path / "torture.json", tmp_path / "none")


def test_the_report_is_written_between_its_marks(
    sums: Sums, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums.bad[BAD_SEED] = Result(episodes=3, errors=1, notes=("7 is not 8",))
    torture(tmp_path)
    sums.bad.clear()
    torture(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    ledger = Ledger(tmp_path / "torture.json", tmp_path / "recorded.json")
    found: dict[str, Programme] = {"sums": sums}
    report.write(ledger, found, page)
    text = page.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    assert "| `sums` | sums are sums | 50 | 83 | 50 | 1 | 0 | ms 9 |" in text
    assert "* `sums` seed 4: 7 is not 8" in text
    # A new checkout begins with what is recorded.
    fresh = Ledger(tmp_path / "elsewhere.json", tmp_path / "recorded.json")
    assert fresh.since_the_last_failure("sums") == 50
    page.write_text("nothing")
    with pytest.raises(report.ReportError, match="has no lines"):
        report.write(ledger, found, page)


def test_every_programme_of_the_directory_is_found() -> None:
    names = {path.stem for path in Path(programmes.__path__[0]).glob("[a-z]*.py")}
    found = find()
    assert len(found) == len(names)
    assert {"wire", "aborts"} <= set(found)
    for name, programme in found.items():
        assert programme.goal > 0
        assert programme.what
        assert "|" not in programme.what
        assert name == programme.name
