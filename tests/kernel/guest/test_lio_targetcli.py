"""Debian's targetcli, unmodified: user:ploop as any other backstore."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.guest import kernel_target
from tests.kernel.guest.conftest import OpenIscsi
from tests.kernel.guest.kernel_target import (
    CONFIGFS,
    SAVED,
    TargetcliShell,
    backstores,
    targetcli,
    targets,
)
from tests.kernel.guest.run import disk_digest, sh, wait_until
from tests.support import images, oracles
from tests.support.images import MIB
from tests.support.serve import ServedUrl, ServeProcess

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(120)]

PLOOP = "/backstores/user:ploop"
IQN = "iqn.2026-01.org.example:disks"
URL = ServedUrl(host="127.0.0.1", port=3260, iqn=IQN, lun=0)


@pytest.fixture(scope="module")
def directory(lio: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("targetcli")


@pytest.fixture(scope="module")
def daemon(bus: None, directory: Path) -> Iterator[ServeProcess]:
    web = images.write_delta(directory / "web.hds", 64 * MIB, {})
    with kernel_target.serve(web, directory=directory) as daemon:
        wait_until(lambda: "dbus-name" in daemon.stderr, "the name on the bus")
        yield daemon
        assert daemon.stop() == 0, daemon.stderr


@pytest.fixture
def server(kernel: None, daemon: ServeProcess) -> ServeProcess:
    return daemon


def creation(name: str, config: object, size: str = "64M") -> tuple[str, ...]:
    """The words for a new backstore."""
    return (PLOOP, "create", f"name={name}", f"size={size}", f"cfgstring={config}")


def create(name: str, config: object, size: str = "64M", *, check: bool = True) -> str:
    return targetcli(*creation(name, config, size), check=check)


def export(name: str, iqn: str = IQN) -> None:
    """A target for everybody on 127.0.0.1, as an administrator would make it."""
    with TargetcliShell() as shell:
        shell("/iscsi", "create", iqn)
        for key, value in {
            "generate_node_acls": 1,
            "demo_mode_write_protect": 0,
            "cache_dynamic_acls": 1,
            "authentication": 0,
        }.items():
            shell(f"/iscsi/{iqn}/tpg1", "set", "attribute", f"{key}={value}")
        shell(f"/iscsi/{iqn}/tpg1/luns", "create", f"{PLOOP}/{name}")


def until_attached(server: ServeProcess, name: str) -> None:
    wait_until(
        lambda: any(
            row["name"] == name and row["device"]
            for row in server.ctl_json("lio", "list")["backstores"]
        ),
        f"{name} being served",
    )


def attribute(name: str, key: str) -> str:
    (path,) = CONFIGFS.glob(f"core/user_*/{name}/attrib/{key}")
    return path.read_text().strip()


def test_a_device_is_created_shown_and_deleted(server: ServeProcess) -> None:
    with TargetcliShell() as shell:
        assert "user:ploop" in shell("ls", "/", "2")
        assert "absolute path" in shell(PLOOP, "help", "create")
    assert "Created user-backed storage object web" in create("web", "web")
    until_attached(server, "web")
    assert "web (64.0MiB)" in targetcli(PLOOP, "ls")
    info = targetcli(f"{PLOOP}/web", "info")
    assert "config: ploop/web" in info
    assert f"size: {64 * MIB}" in info
    disk = kernel_target.loop_disk("web")
    subprocess.run(["dd", "if=/dev/urandom", f"of={disk}", "bs=1M", "count=4"], check=True)
    assert "activated" in targetcli(PLOOP, "ls")
    assert "Deleted storage object web" in targetcli(PLOOP, "delete", "web")  # and its LUNs
    assert backstores() == []
    assert server.device_names() == ["web"]


def test_a_chain_by_its_path(server: ServeProcess, scratch: Path, mountpoint: Path) -> None:
    """Odd characters in the path, an old snapshot below, ext4 on top; QEMU reads the same."""
    place = scratch / "a, b:c%"
    place.mkdir()
    size = 64 * MIB
    base = images.write_delta(place / "base.hds", size, {3: b"\x5a" * MIB})
    top = images.write_delta(place / "top.hds", size, {})
    rows = [(images.guid(1), "Compressed", "base.hds"), (images.TOP_GUID, "Compressed", "top.hds")]
    images.write_descriptor(place, size, rows)
    before = oracles.digest(base)
    escaped = str(place).replace("%", "%25").replace(",", "%2C").replace(" ", "%20")
    created = create("chain", f"{escaped.replace(':', '%3A')}/DiskDescriptor.xml")
    assert "Created" in created, created
    until_attached(server, "chain")
    export("chain")
    initiator_disk = kernel_target.loop_disk("chain")
    sh("mkfs.ext4", "-q", initiator_disk)
    sh("mount", initiator_disk, mountpoint)
    (mountpoint / "file").write_bytes(b"content" * 100_000)
    sh("umount", mountpoint)
    sh("e2fsck", "-f", "-n", initiator_disk)
    seen = disk_digest(initiator_disk)
    assert backstores() == ["chain"]
    targetcli(PLOOP, "delete", "chain")
    wait_until(lambda: server.device_names() == ["web"], "the image being closed")
    layers: list[oracles.Layer] = [("parallels", base), ("parallels", top)]
    # A colon or a comma in a name means something to QEMU.
    plain = scratch / "plain"
    place.rename(plain)
    layers = [(driver, plain / path.name) for driver, path in layers]
    assert oracles.digest(oracles.read_through_qemu(layers, scratch / "flat")) == seen
    assert oracles.digest(plain / "base.hds") == before


def test_a_bad_cfgstring_is_refused_with_a_reason(server: ServeProcess) -> None:
    with TargetcliShell() as shell:
        for config, reason in [
            ("mail", "there are: web"),
            ("/nowhere/disk.hds", "/nowhere/disk.hds"),
            ("/scratch/../scratch/disk.hds", "has `..` in its path"),
            ("disk:1", "has the character ':'"),
            ("/vz/a%zz", "two hexadecimal digits"),
            ("vz/disk.hds", "neither a device's name nor an absolute path"),
            ("/etc/hostname", "/etc/hostname"),
            ("/dev/null", "/dev/null"),
            ("/" + "x" * 300, "is longer than 255 bytes"),
        ]:
            answer = shell(*creation("bad", config))
            assert "cfgstring invalid" in answer, config
            assert reason in answer
            assert backstores() == []


def test_what_targetcli_does_not_pass_on_makes_nothing(server: ServeProcess) -> None:
    with TargetcliShell() as shell:
        for config in ("/vz/a b", "/vz/a,b"):
            assert "Created" not in shell(*creation("bad", config))
            assert backstores() == []
    assert "Created" not in create("bad", "/vz/a\nb", check=False)  # two lines for the shell
    assert backstores() == []


def test_an_image_in_use_is_refused(server: ServeProcess, scratch: Path) -> None:
    taken = images.write_delta(scratch / "taken.hds", 8 * MIB, {})
    with kernel_target.serve(taken, directory=scratch) as other:
        answer = create("bad", taken, "8M", check=False)
        assert f"is in use by process {other.pid} " in answer
        assert backstores() == []
        assert other.stop() == 0


def test_a_smaller_size_is_answered_not_ready(server: ServeProcess, directory: Path) -> None:
    """targetcli does not ask about sizes: the backstore is there, and every command says no."""
    before = oracles.digest(directory / "web.hds")
    create("odd", "web", "32M")
    wait_until(lambda: f"create the backstore with size={64 * MIB}" in server.stderr, "the log")
    (listed,) = server.ctl_json("lio", "list")["backstores"]
    assert listed["device"] is None
    assert f"create the backstore with size={64 * MIB}" in listed["error"]
    wwn = "naa.5001405000000002"
    targetcli("/loopback", "create", wwn)
    begin = time.monotonic()
    targetcli(f"/loopback/{wwn}/luns", "create", f"{PLOOP}/odd")
    assert time.monotonic() - begin < 20  # Linux would wait for 30 s
    kernel_target.assert_nothing_is_stuck()
    targetcli(PLOOP, "delete", "odd")
    assert oracles.digest(directory / "web.hds") == before


def verified_load(disk: Path, seconds: int) -> subprocess.Popen[str]:
    command = ["fio", "--name=v", f"--filename={disk}", "--rw=randwrite", "--bs=16k", "--size=48m"]
    command += ["--ioengine=libaio", "--iodepth=8", "--direct=1", "--time_based"]
    command += [f"--runtime={seconds}", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_clear_and_restore_while_data_is_verified(
    server: ServeProcess, initiator: OpenIscsi
) -> None:
    create("web", "web")
    until_attached(server, "web")
    export("web")
    assert "saved" in targetcli("saveconfig")
    wait_until(lambda: attribute("web", "emulate_write_cache") == "1", "the write cache")
    targetcli("saveconfig")
    saved = json.loads(SAVED.read_text())["storage_objects"][0]
    assert (saved["config"], saved["attributes"]["emulate_write_cache"]) == ("ploop/web", 1)
    initiator.discover(URL)
    disk = initiator.login(URL)
    load = verified_load(disk, 8)
    threading.Event().wait(2)
    sh("/usr/bin/targetctl", "clear")
    assert (backstores(), targets()) == ([], [])
    sh("/usr/bin/targetctl", "restore")
    assert (backstores(), targets()) == (["web"], [IQN])
    output, _ = load.communicate(timeout=80)
    assert load.returncode == 0, output
    initiator.logout(URL)
    assert attribute("web", "emulate_write_cache") == "1"
    assert "event=tcmu-refused" not in server.stderr.partition("event=tcmu-failed")[0]


def test_another_write_cache_is_saved_and_restored(server: ServeProcess) -> None:
    create("web", "web")
    wait_until(lambda: attribute("web", "emulate_write_cache") == "1", "the write cache")
    targetcli(f"{PLOOP}/web", "set", "attribute", "emulate_write_cache=0")
    targetcli("saveconfig")
    assert "All configuration cleared" in targetcli("clearconfig", "confirm=True")
    assert backstores() == []
    assert "restored" in targetcli("restoreconfig", str(SAVED)).lower()
    until_attached(server, "web")
    threading.Event().wait(1.5)  # the daemon would have changed it by now
    assert attribute("web", "emulate_write_cache") == "0"
    disk = kernel_target.loop_disk("web")
    cache = Path("/sys/block", disk.name, "queue/write_cache")
    assert cache.read_text().strip() == "write through"
    targetcli(f"{PLOOP}/web", "set", "attribute", "emulate_write_cache=1")
    targetcli(PLOOP, "delete", "web")


def test_changemedium_replaces_the_image(server: ServeProcess, scratch: Path) -> None:
    old = images.write_delta(scratch / "old.hds", 16 * MIB, {0: b"\x01" * MIB})
    new = images.write_delta(scratch / "new.hds", 16 * MIB, {0: b"\x02" * MIB})
    create("medium", old, "16M")
    until_attached(server, "medium")
    disk = kernel_target.loop_disk("medium")
    with TargetcliShell() as shell:
        for size, config, reason in [
            ("16M", "/nowhere", "/nowhere"),
            ("32M", new, "keeps its size"),
            ("16M", "web", "a medium is an image's path"),
        ]:
            words = ("name=medium", f"size={size}", f"cfgstring={config}")
            answer = shell(PLOOP, "changemedium", *words)
            assert "ChangeMedium failed" in answer
            assert reason in answer
    assert disk.open("rb").read(1) == b"\x01"
    words = ("name=medium", "size=16M", f"cfgstring={new}")
    assert "Medium Changed" in targetcli(PLOOP, "changemedium", *words)
    sh("blockdev", "--flushbufs", disk)
    assert disk.open("rb").read(1) == b"\x02"
    targetcli(PLOOP, "delete", "medium")
