"""Somebody has promised the kernel replies to every event, for good: it waits until one comes."""

from __future__ import annotations

import re
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ploopd.frontends.tcmu import netlink
from tests.kernel.guest import kernel_target
from tests.kernel.guest.kernel_target import backstores
from tests.kernel.guest.run import sh, wait_until
from tests.kernel.guest.tcmu_disk import Backstore, put
from tests.support import images
from tests.support.images import MIB

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(120)]

MANUAL = Path(__file__).parents[3] / "docs/lio.md"
SIZE = 64 * MIB
SET_FEATURES, SUPPORTS_REPLIES = 7, 9


@pytest.fixture
def promise(kernel: None) -> Iterator[None]:
    """SET_FEATURES by a program that has ended; forgotten with the module only."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, netlink.NETLINK_GENERIC) as channel:
        channel.bind((0, 0))
        channel.send(netlink.family_request())
        family = netlink.parse_family(channel.recv(1 << 16)).message_type
        attribute = struct.pack("=HHB3x", 5, SUPPORTS_REPLIES, 1)
        body = struct.pack("=BBH", SET_FEATURES, netlink.VERSION, 0) + attribute
        request_and_acknowledge = 1 | 4
        header = struct.pack("=IHHII", 16 + len(body), family, request_and_acknowledge, 7, 0)
        channel.send(header + body)
        (error,) = struct.unpack_from("=i", channel.recv(1 << 16), 16)
        assert error == 0
    yield
    kernel_target.clear()
    sh("rmmod", "target_core_user")
    sh("modprobe", "target_core_user")


def way_out() -> str:
    """What the manual says to type when nobody is there to reply."""
    (row,) = [line for line in MANUAL.read_text().splitlines() if "reset_netlink" in line]
    found: list[str] = re.findall(r"`(cd [^`]*reset_netlink[^`]*)`", row)
    return found[0]


def test_ploopd_keeps_it_and_without_anybody_there_is_a_way_out(
    promise: None, scratch: Path
) -> None:
    web = images.write_delta(scratch / "web.hds", SIZE, {})
    made = Backstore("web", "web", SIZE)
    with kernel_target.serve(web, directory=scratch) as server:
        made.create("hw_max_sectors=1024").wait_served()
        assert made.attribute("nl_reply_supported") == "1"
        put(made.path / "attrib/dev_size", SIZE)  # as a restore does
        made.delete()
        assert server.stop() == 0, server.stderr
    made.path.mkdir()
    put(made.path / "control", f"dev_config=ploop/web,dev_size={SIZE}")
    with subprocess.Popen(["sh", "-c", f"echo 1 >{made.path}/enable"]) as enabling:
        state = Path(f"/proc/{enabling.pid}/stat")
        wait_until(lambda: state.read_text().split()[2] == "D", "the kernel to wait")
        sh("sh", "-c", way_out())
        assert enabling.wait(10) != 0
    made.path.rmdir()
    assert backstores() == []
    kernel_target.assert_nothing_is_stuck()
