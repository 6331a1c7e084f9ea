"""The kernel's iSCSI initiator and its file systems on ploopd's target."""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

import pytest

from tests.kernel.guest.conftest import OpenIscsi
from tests.kernel.guest.files import assert_tree, fill
from tests.kernel.guest.run import sh, wait_until
from tests.support import images, oracles
from tests.support.images import MIB
from tests.support.serve import ServeProcess

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(120)]


def assert_image_is_sound(layers: list[oracles.Layer]) -> None:
    for driver, path in layers:
        if driver == "parallels":
            assert oracles.bat_problems(path) == []
            assert oracles.in_use_word(path) == 0
    assert not oracles.qemu_check(layers[-1][1]).get("leaks")


def test_ext4_from_mkfs_to_fsck(initiator: OpenIscsi, scratch: Path, mountpoint: Path) -> None:
    """Discovery, login, mkfs, mount, write, logout, login, compare, fsck; then QEMU reads it."""
    image = scratch / "disk.hds"
    oracles.run("qemu-img", "create", "-q", "-f", "parallels", str(image), "1G")
    with ServeProcess(image, directory=scratch) as server:
        url = server.url
        assert url.iqn in initiator.discover(url)
        disk = initiator.login(url)
        assert "ploopd" in sh("cat", f"/sys/block/{disk.name}/device/vendor").lower()
        sh("mkfs.ext4", "-q", disk)
        sh("mount", disk, mountpoint)
        digests = fill(mountpoint, 1, 40 * MIB)
        sh("umount", mountpoint)
        initiator.logout(url)
        disk = initiator.login(url)
        sh("mount", "-o", "ro", disk, mountpoint)
        assert_tree(mountpoint, digests)
        sh("umount", mountpoint)
        sh("e2fsck", "-f", "-n", disk)
        initiator.logout(url)
        assert server.stop() == 0, server.stderr
    assert_image_is_sound([("parallels", image)])
    raw = oracles.read_through_qemu([("parallels", image)], scratch / "disk.raw")
    sh("e2fsck", "-f", "-n", raw)
    sh("mount", "-o", "loop,ro", raw, mountpoint)
    assert_tree(mountpoint, digests)


def test_xfs_on_a_chain_with_discard(initiator: OpenIscsi, scratch: Path, mountpoint: Path) -> None:
    """A file system in the base, changed through a top delta, trimmed; the base stays as it was."""
    size = 512 * MIB
    raw = scratch / "base.raw"
    with raw.open("wb") as file:
        file.truncate(size)
    sh("mkfs.xfs", "-q", raw)
    base = images.qemu_image(scratch, "base.hds", raw)
    raw.unlink()
    images.write_delta(scratch / "top.hds", size, {})
    rows = [(images.guid(1), "Compressed", "base.hds"), (images.TOP_GUID, "Compressed", "top.hds")]
    descriptor = images.write_descriptor(scratch, size, rows)
    layers: list[oracles.Layer] = [("parallels", base), ("parallels", scratch / "top.hds")]
    before = oracles.digest(base)
    with ServeProcess(descriptor, directory=scratch) as server:
        initiator.discover(server.url)
        disk = initiator.login(server.url)
        sh("mount", disk, mountpoint)
        kept = fill(mountpoint, 2, 8 * MIB)
        (mountpoint / "large").write_bytes(os.urandom(48 * MIB))
        sh("sync", "-f", mountpoint)
        grown = (scratch / "top.hds").stat().st_blocks
        (mountpoint / "large").unlink()
        sh("sync", "-f", mountpoint)
        assert "trimmed" in sh("fstrim", "-v", mountpoint)
        sh("umount", mountpoint)
        initiator.logout(server.url)
        assert server.stop() == 0, server.stderr
    assert oracles.digest(base) == before
    assert_image_is_sound(layers)
    assert (scratch / "top.hds").stat().st_blocks < grown - 60_000, "discard gave nothing back"
    flat = oracles.read_through_qemu(layers, scratch / "flat.raw")
    sh("xfs_repair", "-n", flat)
    sh("mount", "-o", "loop,ro", flat, mountpoint)
    assert_tree(mountpoint, kept)


def fio(disk: Path, *extra: str) -> None:
    sh(
        "fio",
        "--name=verify",
        f"--filename={disk}",
        "--rw=randwrite",
        "--bsrange=512-64k",
        "--bs_unaligned=0",
        "--blockalign=512",
        "--size=96m",
        "--io_size=48m",
        "--ioengine=libaio",
        "--direct=1",
        "--iodepth=32",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--randrepeat=1",
        "--fsync=64",
        *extra,
    )


def test_fio_verify_across_a_new_login(initiator: OpenIscsi, scratch: Path) -> None:
    image = images.write_delta(scratch / "disk.hds", 128 * MIB, {}, cluster_size=65536)
    with ServeProcess(image, directory=scratch) as server:
        initiator.discover(server.url)
        disk = initiator.login(server.url)
        fio(disk, "--do_verify=1")
        initiator.logout(server.url)
        disk = initiator.login(server.url)
        fio(disk, "--verify_only=1")
        initiator.logout(server.url)
        assert server.stop() == 0, server.stderr
    assert_image_is_sound([("parallels", image)])


def test_a_killed_daemon_comes_back_under_a_mounted_file_system(
    initiator: OpenIscsi, scratch: Path, mountpoint: Path
) -> None:
    """kill -9 while files are written: the kernel logs in again and the writer sees no error."""
    image = scratch / "disk.hds"
    oracles.run("qemu-img", "create", "-q", "-f", "parallels", str(image), "256M")
    with ServeProcess(image, directory=scratch) as server:
        initiator.discover(server.url)
        disk = initiator.login(server.url)
        sh("mkfs.ext4", "-q", disk)
        sh("mount", disk, mountpoint)
        digests: dict[str, str] = {}
        errors: list[BaseException] = []

        def write() -> None:
            try:
                digests.update(fill(mountpoint, 3, 24 * MIB))
            except BaseException as error:
                errors.append(error)

        writer = threading.Thread(target=write)
        writer.start()
        wait_until(lambda: any(mountpoint.glob("d*/f*")), "the first file")
        server.kill()
        server.restart(timeout=40)
        writer.join(80)
        assert not writer.is_alive()
        assert not errors, errors
        sh("umount", mountpoint)
        sh("e2fsck", "-f", "-n", disk)
        sh("mount", "-o", "ro", disk, mountpoint)
        assert_tree(mountpoint, digests)
        sh("umount", mountpoint)
        initiator.logout(server.url)
        assert server.stop() == 0, server.stderr
    assert_image_is_sound([("parallels", image)])


def test_a_read_only_lun(initiator: OpenIscsi, scratch: Path, mountpoint: Path) -> None:
    raw = scratch / "fs.raw"
    with raw.open("wb") as file:
        file.truncate(64 * MIB)
    sh("mkfs.ext4", "-q", raw)
    image = images.qemu_image(scratch, "disk.hds", raw)
    before = oracles.digest(image)
    with ServeProcess(image, directory=scratch, options=("--read-only",)) as server:
        initiator.discover(server.url)
        disk = initiator.login(server.url)
        assert sh("blockdev", "--getro", disk).strip() == "1"
        sh("mount", "-o", "ro", disk, mountpoint)
        assert (mountpoint / "lost+found").is_dir()
        sh("umount", mountpoint)
        initiator.logout(server.url)
        assert server.stop() == 0
    assert oracles.digest(image) == before


def test_chap_login(initiator: OpenIscsi, scratch: Path) -> None:
    image = images.write_delta(scratch / "disk.hds", 16 * MIB, {})
    secrets = scratch / "chap.toml"
    secrets.write_text('user = "guest"\nsecret = "correct horse battery"\n')
    secrets.chmod(0o600)
    with ServeProcess(image, directory=scratch, options=("--chap-file", str(secrets))) as server:
        initiator.discover(server.url)
        for key, value in {
            "node.session.auth.authmethod": "CHAP",
            "node.session.auth.username": "guest",
            "node.session.auth.password": "correct horse battery",
            "node.session.auth.chap_algs": "SHA3-256,SHA256,SHA1",
        }.items():
            initiator.update(server.url, key, value)
        disk = initiator.login(server.url)
        subprocess.run(["dd", f"if={disk}", "of=/dev/null", "bs=1M", "count=4"], check=True)
        initiator.logout(server.url)
        initiator.update(server.url, "node.session.auth.password", "wrong horse battery")
        with pytest.raises(AssertionError, match="authorization"):
            initiator.login(server.url)
        assert server.stop() == 0
