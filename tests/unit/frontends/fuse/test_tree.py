"""The tree as a function of the devices: names, modes, contents, inode numbers."""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator

import pytest

from ploopd.errors import StorageError, UsageError
from ploopd.frontends.fuse.attributes import Attribute
from ploopd.frontends.fuse.tree import (
    ATTRIBUTE_SIZE,
    ROOT_INODE,
    Directory,
    Link,
    Node,
    Tree,
    inode_number,
    join,
    standby_path,
)
from ploopd.gate.limits import ParkLimits
from scst_shim import StandbyState
from tests.unit.frontends.fuse.harness import MIB, FakeDevice, layer


def walk(tree: Tree, path: str = "") -> Iterator[tuple[str, Node]]:
    node = tree.find(path)
    assert node is not None
    yield path, node
    if isinstance(node, Directory):
        for name in node.entries:
            yield from walk(tree, join(path, name))


def text(tree: Tree, path: str) -> str:
    node = tree.find(path)
    assert isinstance(node, Attribute), path
    return node.show()


def store(tree: Tree, path: str, value: str) -> None:
    node = tree.find(path)
    assert isinstance(node, Attribute)
    assert node.store is not None
    node.store(value)


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice("vm-1", layers=[layer(0, path="/i/top.hds"), layer(1, kind="raw")])


@pytest.fixture
def tree(device: FakeDevice) -> Tree:
    return Tree(lambda: [device, FakeDevice("other")])


def test_the_shape_is_that_of_sysfs(tree: Tree) -> None:
    root = tree.find("")
    assert isinstance(root, Directory)
    assert set(root.entries) == {"block", "devices", "disk"}
    link = tree.find("block/vm-1")
    assert link == Link(target="../devices/virtual/block/vm-1")
    assert tree.find("devices/virtual/block/vm-1") is not None
    assert standby_path("vm-1") == "devices/virtual/block/vm-1/queue/standby"


def test_every_attribute_is_one_line_in_a_file_of_4096_bytes(tree: Tree) -> None:
    count = 0
    for path, node in walk(tree):
        if not isinstance(node, Attribute):
            continue
        count += 1
        value = node.show()
        assert value.endswith("\n"), path
        assert value.count("\n") == 1, path
        status = tree.status(path, node)
        assert status.size == ATTRIBUTE_SIZE
        assert stat.S_IMODE(status.mode) == (0o644 if node.store else 0o444)
    assert count > 60


def test_only_these_can_be_written(tree: Tree) -> None:
    writable = {
        path.removeprefix("devices/virtual/block/vm-1/")
        for path, node in walk(tree, "devices/virtual/block/vm-1")
        if isinstance(node, Attribute) and node.store is not None
    }
    assert writable == {
        "pstate/aborted",
        "ptune/park_max",
        "ptune/park_max_bytes",
        "ptune/park_max_reqs",
    }


def test_inode_numbers_are_unique_and_stay(tree: Tree) -> None:
    numbers = {path: tree.inode(path) for path, _ in walk(tree)}
    assert len(set(numbers.values())) == len(numbers)
    assert numbers[""] == ROOT_INODE
    for path, number in numbers.items():
        assert 0 < number < 1 << 63
        assert tree.path(number) == path
        assert inode_number(path) == number
    assert tree.path(12345) is None


@pytest.mark.parametrize(
    "path", ["nothing", "block/nothing", "block/vm-1/queue", "disk/vm-1/x", "devices/virtual/net"]
)
def test_what_is_not_there_is_not_found(tree: Tree, path: str) -> None:
    assert tree.find(path) is None


def test_the_three_strings(tree: Tree, device: FakeDevice) -> None:
    path = standby_path("vm-1")
    assert text(tree, path) == "off\n"
    device.gate.enter_standby("test")
    assert text(tree, path) == f"{StandbyState.ON}\n"
    device.gate.leave_standby()
    device.unbind()
    assert text(tree, path) == "not supported\n"


def test_queue_and_size(tree: Tree) -> None:
    base = "devices/virtual/block/vm-1"
    assert text(tree, f"{base}/size") == f"{4 * MIB // 512}\n"
    assert text(tree, f"{base}/ro") == "0\n"
    assert text(tree, f"{base}/queue/logical_block_size") == "512\n"
    assert text(tree, f"{base}/queue/physical_block_size") == "4096\n"
    assert text(tree, f"{base}/queue/discard_granularity") == f"{MIB}\n"
    assert text(tree, f"{base}/queue/write_cache") == "write back\n"


def test_write_through_and_read_only() -> None:
    device = FakeDevice(write_cache=False, read_only=True)
    tree = Tree(lambda: [device])
    base = "devices/virtual/block/disk"
    assert text(tree, f"{base}/queue/write_cache") == "write through\n"
    assert text(tree, f"{base}/ro") == "1\n"
    assert text(tree, f"{base}/pdelta/0/ro") == "1\n"
    disk = tree.find("disk/disk")
    assert disk is not None
    assert stat.S_IMODE(tree.status("disk/disk", disk).mode) == 0o400


def test_levels_are_counted_from_the_base_as_in_vz7(tree: Tree) -> None:
    base = "devices/virtual/block/vm-1"
    assert text(tree, f"{base}/pstate/top") == "1\n"
    assert text(tree, f"{base}/pdelta/1/image") == "/i/top.hds\n"
    assert text(tree, f"{base}/pdelta/1/format") == "ploop1\n"
    assert text(tree, f"{base}/pdelta/1/ro") == "0\n"
    assert text(tree, f"{base}/pdelta/0/format") == "raw\n"
    assert text(tree, f"{base}/pdelta/0/ro") == "1\n"
    assert text(tree, f"{base}/pdelta/0/level") == "0\n"


def test_a_path_with_a_newline_is_still_one_line() -> None:
    device = FakeDevice(layers=[layer(0, path="/a\nb\\c")])
    tree = Tree(lambda: [device])
    assert text(tree, "devices/virtual/block/disk/pdelta/0/image") == "/a\\nb\\\\c\n"


def test_the_disk_is_a_file_of_its_size(tree: Tree, device: FakeDevice) -> None:
    device.volume.mapped = MIB
    node = tree.find("disk/vm-1")
    assert node is not None
    status = tree.status("disk/vm-1", node)
    assert (status.size, status.blocks) == (4 * MIB, MIB // 512)
    assert status.mode == stat.S_IFREG | 0o600


def test_park_limits_can_be_set(tree: Tree, device: FakeDevice) -> None:
    base = "devices/virtual/block/vm-1/ptune"
    store(tree, f"{base}/park_max", "1.5\n")
    store(tree, f"{base}/park_max_reqs", "7\n")
    store(tree, f"{base}/park_max_bytes", "1048576")
    assert device.gate.limits == ParkLimits(park_max=1.5, max_requests=7, max_bytes=MIB)
    assert text(tree, f"{base}/park_max") == "1.5\n"
    store(tree, f"{base}/park_max", "forever\n")
    assert device.gate.limits.park_max is None
    assert text(tree, f"{base}/park_max") == "forever\n"


@pytest.mark.parametrize("value", ["", "x", "-1", "0", "nan", "inf"])
def test_a_park_limit_that_makes_no_sense_is_refused(
    tree: Tree, device: FakeDevice, value: str
) -> None:
    before = device.gate.limits
    with pytest.raises((ValueError, UsageError)):
        store(tree, "devices/virtual/block/vm-1/ptune/park_max", value)
    assert device.gate.limits == before


def test_a_shorter_park_max_holds_for_what_is_parked(tree: Tree, device: FakeDevice) -> None:
    told: list[float | None] = []
    device.gate.notify_parked(lambda: told.append(device.gate.next_deadline()))
    device.gate.enter_standby("test")
    device.gate.read(0, memoryview(bytearray(512)), lambda error: None)
    store(tree, "devices/virtual/block/vm-1/ptune/park_max", "2")
    assert told[-1] == device.clock.now + 2


def test_aborted_is_the_latch_and_only_zero_clears_it(tree: Tree, device: FakeDevice) -> None:
    path = "devices/virtual/block/vm-1/pstate/aborted"
    assert text(tree, path) == "0\n"
    device.gate.judge(StorageError(errno.ENXIO, "write"))
    assert text(tree, path) == "1\n"
    with pytest.raises(ValueError, match="cleared"):
        store(tree, path, "1\n")
    store(tree, path, "0\n")
    assert text(tree, path) == "0\n"
    assert device.gate.latched is None


def test_counters_follow_the_gate(tree: Tree, device: FakeDevice) -> None:
    base = "devices/virtual/block/vm-1"
    device.gate.enter_standby("test")
    device.gate.write(0, memoryview(bytes(1024)), lambda error: None)
    assert text(tree, f"{base}/pstate/queued_bios") == "1\n"
    assert text(tree, f"{base}/pstat/parked_bytes") == "1024\n"
    assert text(tree, f"{base}/pstate/state") == "standby\n"
