"""The disk as a file: the same content as initiators see, and used as programs use a file."""

from __future__ import annotations

import mmap
import os
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.functional.fuse_view.conftest import SIZE, sh
from tests.support import images, oracles
from tests.support.images import MIB, ImageCase
from tests.support.initiator import Initiator
from tests.support.serve import ServeProcess

pytestmark = [pytest.mark.functional, pytest.mark.fuse, pytest.mark.timeout(120)]


def test_the_content_of_every_kind_of_image(
    image: ImageCase, view: Callable[..., ServeProcess], directory: Path, tmp_path: Path
) -> None:
    expected = oracles.read_through_qemu(image.layers, tmp_path / "expected.raw")
    view(image.serve, options=("--read-only",))
    [disk] = (directory / "disk").iterdir()
    oracles.assert_same_content(disk, expected)
    sh(f"cp --sparse=always {disk} sparse.raw", cwd=tmp_path)
    oracles.assert_same_content(tmp_path / "sparse.raw", expected)
    refused = sh(f"echo > {disk}", cwd=tmp_path, check=False)
    assert ("Read-only file system" if os.geteuid() == 0 else "Permission denied") in refused


def test_writes_are_seen_by_initiators_and_theirs_by_readers(
    running: ServeProcess, directory: Path
) -> None:
    disk = directory / "disk/disk"
    with Initiator(running.url) as initiator, disk.open("r+b", 0) as file:
        initiator.settle()
        fd = file.fileno()
        for round_ in range(20):
            text = f"round {round_}".encode().ljust(4096, b".")
            initiator.good(initiator.write(8 * round_, text))
            assert os.pread(fd, 4096, 4096 * round_) == text
            assert os.pwrite(fd, b"file", 4096 * round_ + 100) == 4
            seen = initiator.good(initiator.read(8 * round_, 8))
            assert seen == text[:100] + b"file" + text[104:]
        with mmap.mmap(fd, 4096, access=mmap.ACCESS_READ) as mapped:
            assert mapped[100:104] == b"file"
        initiator.good(initiator.write(0, b"n" * 4096))
        with disk.open("rb", 0) as again, mmap.mmap(again.fileno(), 4096, prot=mmap.PROT_READ) as m:
            assert m[:4096] == b"n" * 4096


def test_part_of_a_block_is_written_atomically(disk: Path) -> None:
    """Many writers, each with its own bytes of the same blocks: none loses any."""
    with disk.open("r+b", 0) as file:

        def write(number: int) -> None:
            for block in range(50):
                os.pwrite(file.fileno(), bytes([number]) * 64, 512 * block + 64 * number)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = b"".join(bytes([number]) * 64 for number in range(8)) * 50
        assert os.pread(file.fileno(), len(expected), 0) == expected


def test_part_of_a_block_never_brings_back_what_an_initiator_has_overwritten(
    tmp_path: Path, view: Callable[..., ServeProcess], directory: Path
) -> None:
    image = images.write_delta(tmp_path / "disk.hds", SIZE, {}, cluster_size=65536)
    server = view(image, options=("--io", "io_uring"))
    ended = threading.Event()

    def scribble() -> None:
        with (directory / "disk/disk").open("r+b", 0) as file:
            while not ended.is_set():
                for block in range(8):
                    os.pwrite(file.fileno(), b"f", 512 * block)

    writer = threading.Thread(target=scribble)
    with Initiator(server.url) as initiator:
        initiator.settle()
        initiator.good(initiator.write(0, bytes(4096)))
        writer.start()
        try:
            for version in range(1, 250):
                data = bytes([version]) * 512
                tags = {initiator.write(block, data) for block in range(8)}
                while tags:
                    answers = initiator.poll(30)
                    assert answers, "an initiator waits for ever"
                    assert {answer.status for answer in answers} == {0}
                    tags -= {answer.tag for answer in answers}
                seen = initiator.good(initiator.read(0, 8))
                for block in range(8):
                    assert seen[512 * block + 1 : 512 * (block + 1)] == data[1:]
        finally:
            ended.set()
            writer.join()


def test_like_a_block_device_it_keeps_its_size(disk: Path, tmp_path: Path) -> None:
    sh(f"head -c 100000 /dev/urandom > data; dd if=data of={disk}", cwd=tmp_path)
    sh(f"cmp -n 100000 data {disk}", cwd=tmp_path)
    assert disk.stat().st_size == SIZE
    sh(f"truncate -s {SIZE} {disk}", cwd=tmp_path)
    assert "Invalid argument" in sh(f"truncate -s 10 {disk}", cwd=tmp_path, check=False)
    assert "No space left" in sh(f"echo more >> {disk}", cwd=tmp_path, check=False)
    assert disk.stat().st_size == SIZE


def test_holes_are_punched_in_the_image(disk: Path, tmp_path: Path, directory: Path) -> None:
    before = disk.stat().st_blocks
    sh(f"dd if=/dev/urandom of={disk} bs=1M count=8 conv=notrunc; cp {disk} was", cwd=tmp_path)
    assert disk.stat().st_blocks == before + 8 * 2048
    sh(f"fallocate -p -o 1000 -l {4 * MIB} {disk}", cwd=tmp_path)
    sh(f"cmp -n 1000 was {disk}", cwd=tmp_path)
    sh(f"cmp -n {4 * MIB} -i 1000:0 {disk} /dev/zero", cwd=tmp_path)
    after = 1000 + 4 * MIB
    sh(f"cmp -n 100000 -i {after}:{after} was {disk}", cwd=tmp_path)
    assert disk.stat().st_blocks < before + 5 * 2048
    with disk.open("rb", 0) as file:
        assert os.lseek(file.fileno(), 0, os.SEEK_HOLE) == 65536
        assert os.lseek(file.fileno(), 65536, os.SEEK_DATA) == 4 * MIB
    sh(f"fallocate -z -o 5000000 -l 777 {disk}", cwd=tmp_path)
    sh(f"cmp -n 777 -i 5000000:0 {disk} /dev/zero", cwd=tmp_path)
    refused = sh(f"fallocate -l 4096 {disk}", cwd=tmp_path, check=False)
    assert "not supported" in refused


@pytest.mark.parametrize(
    "job",
    [
        "--rw=randrw --bs=4k --ioengine=libaio --iodepth=16 --direct=1",
        "--rw=randwrite --bsrange=512-64k --bs_unaligned --ioengine=psync --fsync=32",
        "--rw=randwrite --bs=4k --ioengine=mmap",
    ],
)
def test_fio_verifies(disk: Path, tmp_path: Path, job: str) -> None:
    if oracles.have("fio"):
        pytest.skip("fio is not installed: apt-get install fio")
    common = "--size=16M --verify=crc32c --verify_fatal=1 --do_verify=1 --randseed=5"
    said = sh(f"fio --name=v --filename={disk} {common} {job}", cwd=tmp_path, check=False)
    if "mmap" in job and "No such device" in said:
        pytest.skip("this kernel has no shared mappings of files with direct I/O (Linux 6.6)")
    assert "err= 0" in said, said


@pytest.mark.parametrize("direct", ["off", "on"])
def test_a_file_system_on_a_loop_device(disk: Path, tmp_path: Path, direct: str) -> None:
    mount = tmp_path / "mnt"
    mount.mkdir()
    attach = subprocess.run(
        ["losetup", "--find", "--show", f"--direct-io={direct}", str(disk)],
        capture_output=True,
        text=True,
        check=False,
    )
    if attach.returncode:
        pytest.skip(f"no loop devices here: {attach.stderr.strip()}")
    loop = attach.stdout.strip()
    try:
        sh(f"mkfs.ext4 -q -F {loop} && mount {loop} {mount}", cwd=tmp_path)
        try:
            sh(
                "mkdir tree; for i in $(seq 40); do"
                " head -c $((i * 3001)) /dev/urandom > tree/$i; done",
                cwd=tmp_path,
            )
            sh(
                f"cp -r tree {mount}/ && sync -f {mount} && rm {mount}/tree/1 && fstrim {mount}",
                cwd=tmp_path,
            )
            sh("rm tree/1", cwd=tmp_path)
        finally:
            sh(f"umount {mount}", cwd=tmp_path)
        sh(f"e2fsck -fn {loop}", cwd=tmp_path)
        sh(f"mount -o ro {loop} {mount}", cwd=tmp_path)
        try:
            sh(f"diff -r tree {mount}/tree", cwd=tmp_path)
        finally:
            sh(f"umount {mount}", cwd=tmp_path)
    finally:
        sh(f"losetup -d {loop}", cwd=tmp_path)
