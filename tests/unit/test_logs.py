"""A log that nobody reads must not stop the daemon."""

from __future__ import annotations

import fcntl
import io
import logging
import os
import select
import time
from collections.abc import Iterator

import pytest

from ploopd import logs
from ploopd.logs import BackgroundHandler


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("ploopd.test", logging.INFO, __file__, 1, text, None, None)


@pytest.fixture
def pipe() -> Iterator[tuple[int, io.TextIOWrapper]]:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    stream = os.fdopen(writer, "w")
    yield reader, stream
    os.close(reader)


def test_records_arrive_in_order_before_the_end() -> None:
    stream = io.StringIO()
    handler = BackgroundHandler(stream)
    for number in range(100):
        handler.emit(record(f"event={number}"))
    handler.close()
    assert stream.getvalue().splitlines() == [f"event={number}" for number in range(100)]


def test_a_reader_that_stops_reading_stops_nobody(
    pipe: tuple[int, io.TextIOWrapper], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "CAPACITY", 50)
    monkeypatch.setattr(logs, "FLUSH_SECONDS", 0.1)
    reader, stream = pipe
    handler = BackgroundHandler(stream)
    began = time.monotonic()
    for _ in range(2000):
        handler.emit(record("x" * 200))
    assert time.monotonic() - began < 2.0

    received = b""
    while received.count(b"\n") < 50:
        received += os.read(reader, 65536)
    time.sleep(0.05)
    handler.emit(record("reading again"))
    while b"reading again" not in received:
        received += os.read(reader, 65536)
    handler.close()
    lines = received.decode().splitlines()
    counts = [int(line.rpartition("=")[2]) for line in lines if "event=log-dropped" in line]
    written = sum(1 for line in lines if line.endswith("x" * 200))
    assert sum(counts) > 0
    assert written + sum(counts) == 2000
    stream.close()


def test_the_end_does_not_wait_for_ever(
    pipe: tuple[int, io.TextIOWrapper], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "FLUSH_SECONDS", 0.2)
    reader, stream = pipe
    handler = BackgroundHandler(stream)
    for _ in range(200):
        handler.emit(record("x" * 200))
    began = time.monotonic()
    handler.close()
    assert time.monotonic() - began < 1.5
    while handler._thread.is_alive():
        if select.select([reader], [], [], 0.05)[0]:
            os.read(reader, 65536)
    stream.close()


def test_a_reader_that_went_away_is_no_error(pipe: tuple[int, io.TextIOWrapper]) -> None:
    reader, stream = pipe
    handler = BackgroundHandler(stream)
    spare = os.dup(reader)
    os.close(reader)
    os.dup2(os.open(os.devnull, os.O_RDONLY), reader)
    os.close(spare)
    handler.emit(record("nobody reads this"))
    handler.close()
    assert not handler._thread.is_alive()
