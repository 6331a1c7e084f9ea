"""Records with fields for systemd's journal, as its native protocol has them."""

from __future__ import annotations

import io
import logging
import os
import socket
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ploopd import journal_log, logs
from ploopd.gate.events import Event, EventBus, EventKind
from ploopd.journal_log import datagram, is_journal


def fields(data: bytes) -> dict[str, str]:
    """What journald reads in a datagram."""
    found = {}
    while data:
        line, _, rest = data.partition(b"\n")
        if b"=" in line:
            name, _, value = line.partition(b"=")
        else:
            name = line
            (length,) = struct.unpack("<Q", rest[:8])
            value, rest = rest[8 : 8 + length], rest[8 + length :]
            assert rest[:1] == b"\n"
            rest = rest[1:]
        found[name.decode()] = value.decode()
        data = rest
    return found


def record(text: str, level: int = logging.INFO) -> logging.LogRecord:
    return logging.LogRecord("ploopd.x", level, __file__, 1, text, None, None)


def test_a_plain_record() -> None:
    found = fields(datagram(record("starting", logging.WARNING), "starting"))
    assert found == {
        "MESSAGE": "starting",
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "ploopd",
        "PLOOPD_LOGGER": "ploopd.x",
    }


def test_a_text_with_line_ends_and_what_is_not_utf_8() -> None:
    text = "a=b\nc\n\udcff"
    assert fields(datagram(record(text), text))["MESSAGE"] == "a=b\nc\n\\udcff"


def test_event_and_device_are_taken_from_a_line_that_begins_with_them() -> None:
    text = "event=device-opened device=root lun=0"
    found = fields(datagram(record(text), text))
    assert (found["PLOOPD_EVENT"], found["PLOOPD_DEVICE"]) == ("device-opened", "root")


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A journal at a socket of its own, and JOURNAL_STREAM for a stream that leads to it."""
    with (
        tempfile.TemporaryDirectory(prefix="ploopd-journal.") as directory,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening,
    ):
        path = str(Path(directory) / "s")
        listening.bind(path)
        listening.settimeout(5)
        monkeypatch.setattr(logs.JournalHandler.__init__, "__defaults__", (path,))
        yield listening


def test_an_event_reaches_the_journal_with_its_fields(
    journal: socket.socket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with (tmp_path / "stderr").open("w") as stream:
        status = os.fstat(stream.fileno())
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        root = logging.getLogger()
        level = root.level
        handler = logs.start_logging("info", stream)
        try:
            EventBus().publish(
                Event(
                    kind=EventKind.STANDBY_ENTERED,
                    device="root",
                    time=1.0,
                    details={"errno": "ENOTCONN", "op": "write", "offset": 4096},
                )
            )
            found = fields(journal.recv(1 << 16))
        finally:
            root.removeHandler(handler)
            root.setLevel(level)
            handler.close()
    assert found["PLOOPD_EVENT"] == "standby-entered"
    assert found["PLOOPD_DEVICE"] == "root"
    assert found["PLOOPD_ERRNO"] == "ENOTCONN"
    assert found["ERRNO"] == "107"
    assert found["PLOOPD_OP"] == "write"
    assert found["PLOOPD_OFFSET"] == "4096"
    assert found["PRIORITY"] == "4"
    assert found["MESSAGE"].startswith("event=standby-entered device=root errno=ENOTCONN")
    assert len(bytes.fromhex(found["MESSAGE_ID"])) == 16
    assert (tmp_path / "stderr").read_text() == ""


def test_message_ids_stay_as_they_are() -> None:
    """People write filters with them."""
    event = Event(kind=EventKind.STANDBY_ENTERED, device="d", time=0.0)
    assert journal_log.event_fields(event)["MESSAGE_ID"] == "0c55a1b9b68456988596a12e8ba5aaa0"


def test_a_journal_that_is_gone_leaves_the_stream() -> None:
    stream = io.StringIO()
    handler = logs.JournalHandler(stream, "/nonexistent/journal")
    handler.emit(record("hello"))
    handler.close()
    assert stream.getvalue() == "hello\n"


def test_only_the_stream_that_is_named_is_the_journal(tmp_path: Path) -> None:
    with (tmp_path / "a").open("w") as stream:
        status = os.fstat(stream.fileno())
        assert is_journal(stream, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
        assert not is_journal(stream, {"JOURNAL_STREAM": f"{status.st_dev}:1"})
        assert not is_journal(stream, {})
    assert not is_journal(io.StringIO(), {"JOURNAL_STREAM": "1:1"})
