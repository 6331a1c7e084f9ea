from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from ploopd.frontends.tcmu.server import TcmuServer
from tests.unit.frontends.tcmu.rig import SIZE, Daemon, Disk, Machine, Rig
from tests.unit.scsi.harness import make_bench


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    machine = Machine(tmp_path)
    daemon = Daemon({"disk": Disk("disk", make_bench(SIZE))})
    async with trio.open_nursery() as nursery:
        state = tmp_path / "state"
        yield Rig(machine, daemon, state, nursery, TcmuServer(daemon, state, kernel=machine))
        nursery.cancel_scope.cancel()


@pytest.fixture
def clock(autojump_clock: trio.testing.MockClock) -> trio.testing.MockClock:
    """Jumps only when no worker thread has come back for a while, either."""
    autojump_clock.autojump_threshold = 0.02
    return autojump_clock
