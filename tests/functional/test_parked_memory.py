"""What ten thousand parked commands cost, measured from outside."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.functional.conftest import Serve
from tests.support import images
from tests.support.images import MIB
from tests.support.initiator import GOOD, Initiator
from tests.support.stage import Operator, until

pytestmark = [pytest.mark.functional, pytest.mark.slow, pytest.mark.timeout(120)]

SESSIONS = 80
EACH = 125
"""Commands of a session; its window takes 128."""

PROMISED_MIB = 64
BLOCK = 4096


def test_ten_thousand_parked_commands(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reads and writes of 4 KiB, by eighty sessions; all of them are executed in the end."""
    disk = images.write_delta(tmp_path / "disk.hds", 64 * MIB, {}, cluster_size=65536)
    server = serve(disk, options=("--park-max", "forever"))
    with (
        Operator(server.control, server.device_names()[0]) as operator,
        ExitStack() as stack,
    ):
        sessions = [stack.enter_context(Initiator(server.url)) for _ in range(SESSIONS)]
        for number, session in enumerate(sessions):
            session.settle()
            session.good(session.write(number * EACH * 8, bytes(BLOCK)))
            session.good(session.read(number * EACH * 8, 8))
        before = server.memory_mib()
        operator.enter_standby()
        for number, session in enumerate(sessions):
            for place in range(EACH):
                block = number * EACH + place
                if place % 2:
                    session.write(block * 8, block.to_bytes(8, "little") * (BLOCK // 8))
                else:
                    session.read(block * 8, 8)
            session.poll(0.0)

        def poll(seconds: float) -> None:
            for session in sessions:
                assert session.poll(0.0) == []

        until(lambda: operator.details().parked_requests == SESSIONS * EACH, poll)
        cost = server.memory_mib() - before
        with capsys.disabled():
            print(f"\n  {SESSIONS * EACH:,} parked commands: {cost:.1f} MiB")
        assert cost < PROMISED_MIB
        server.ctl("device", "standby", operator.device, "leave")
        for session in sessions:
            answered = 0
            while answered < EACH:
                answers = session.poll(30)
                assert answers
                assert all(answer.status == GOOD for answer in answers)
                answered += len(answers)
        assert operator.details().parked_requests == 0
        sessions[0].good(sessions[0].write(0, bytes(BLOCK)))
