"""`ploopctl image resize` and `ploopctl device resize`, with QEMU and libiscsi as the judges."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.support import images, oracles
from tests.support.images import KINDS, MIB
from tests.support.initiator import CHECK_CONDITION, Initiator
from tests.support.load import BLOCK, Journal, Load, Mix, initial_from
from tests.support.serve import ServeProcess

pytestmark = [pytest.mark.functional, pytest.mark.timeout(120)]

CLUSTER = 64 << 10
SIZE = 64 * MIB
LARGE = 3072 * MIB
"""Its BAT takes four clusters instead of one."""
READ_CAPACITY = bytes.fromhex("9e10 00000000 00000000 00000020 0000".replace(" ", ""))


def resize(path: Path, size: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ploopd.cli.ploopctl", "image", "resize", str(path)]
    return subprocess.run(
        [*command, "--size", size, *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def grown_file(raw: Path, size: int) -> Path:
    """The expected content of a disk that had that of `raw`."""
    larger = Path(shutil.copy(raw, raw.with_name("larger.raw")))
    with larger.open("r+b") as file:
        file.truncate(size)
    return larger


@pytest.mark.parametrize("kind", KINDS)
def test_qemu_sees_the_old_content_and_zeros(kind: str, tmp_path: Path) -> None:
    case = KINDS[kind](tmp_path)
    size = case.raw.stat().st_size + 600 * MIB
    result = resize(case.serve, "+600M")
    assert (result.returncode, result.stdout) == (0, "Image resized.\n"), result.stderr
    seen = oracles.read_through_qemu(case.layers, tmp_path / "seen.raw")
    oracles.assert_same_content(seen, grown_file(case.raw, size))
    oracles.qemu_check(case.top)
    assert oracles.bat_problems(case.top) == []
    info = oracles.run("qemu-img", "info", "--output=json", "-f", "parallels", str(case.top))
    assert json.loads(info)["virtual-size"] == size


def test_an_image_that_qemu_made_and_its_own_growth_by_libploop(tmp_path: Path) -> None:
    """Debian's ploop and ours leave the same table."""
    if not Path(oracles.PLOOP).exists():
        pytest.skip("ploop is not installed: apt-get install ploop")
    oracles.require_libploop_locks()
    raw = images.make_content(tmp_path / "raw", SIZE, seed=3)
    ours = images.qemu_image(tmp_path, "ours.hds", raw, "cluster_size=65536")
    theirs = Path(shutil.copy(ours, tmp_path / "theirs.hds"))
    oracles.run(oracles.PLOOP, "grow", "-s", f"{LARGE // MIB}M", str(theirs))
    assert resize(ours, "3G").returncode == 0
    one, other = (path.read_bytes() for path in (ours, theirs))
    entries = 4 * (LARGE // CLUSTER)
    assert struct.unpack_from("<IQ", one, 32) == struct.unpack_from("<IQ", other, 32)
    assert one[48:52] == other[48:52]
    assert one[64 : 64 + entries] == other[64 : 64 + entries]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        ("1M", "can only become larger"),
        ("much", "is not a size"),
        ("9000P", "at most"),
        ("+", "is not a size"),
    ],
)
def test_what_cannot_be_is_refused_as_qemu_img_does(tmp_path: Path, size: str, text: str) -> None:
    path = images.write_delta(tmp_path / "disk.hds", SIZE, {}, cluster_size=CLUSTER)
    before = path.read_bytes()
    result = resize(path, size)
    assert result.returncode == 1
    assert text in result.stderr
    assert result.stderr.count("\n") == 1
    assert path.read_bytes() == before


def test_its_json_and_what_is_rounded(tmp_path: Path) -> None:
    path = images.write_delta(tmp_path / "disk.hds", SIZE, {}, cluster_size=CLUSTER)
    told = json.loads(resize(path, str(SIZE + 1), "--output", "json").stdout)
    assert told == {
        "filename": str(path),
        "virtual-size": SIZE + CLUSTER,
        "previous-size": SIZE,
        "moved-clusters": 0,
    }
    assert "rounded up" in resize(path, str(SIZE + CLUSTER + 1)).stderr
    again = resize(path, str(SIZE + 2 * CLUSTER))
    assert (again.returncode, again.stdout) == (0, "Image has that size.\n")


def capacity(initiator: Initiator) -> int:
    data = initiator.good(initiator.submit(READ_CAPACITY, expect=32))
    return (int.from_bytes(data[:8], "big") + 1) * 512


def make_chain(directory: Path) -> Path:
    clusters = {index: bytes([index % 251 + 1]) * CLUSTER for index in range(0, 64, 2)}
    images.write_delta(directory / "base.hds", SIZE, clusters, cluster_size=CLUSTER)
    images.write_delta(directory / "disk.hds", SIZE, {}, cluster_size=CLUSTER)
    rows = [
        (images.guid(1), "Compressed", "base.hds"),
        (images.TOP_GUID, "Compressed", "disk.hds"),
    ]
    return images.write_descriptor(directory, SIZE, rows, cluster_size=CLUSTER)


def test_a_served_disk_grows_and_initiators_are_told(tmp_path: Path) -> None:
    descriptor = make_chain(tmp_path)
    with ServeProcess(descriptor, directory=tmp_path) as server:
        (name,) = server.device_names()
        with Initiator(server.url) as initiator:
            initiator.settle()
            assert capacity(initiator) == SIZE
            initiator.good(initiator.write(0, b"\x5a" * 4096))
            beyond = initiator.wait(initiator.read(SIZE // 512, 8))
            assert beyond.sense_text == "sense 05/21/00"
            result = server.ctl("device", "resize", name, "--size", "3G")
            assert "grow: from 67108864 to 3221225472 bytes, 1 clusters moved" in result.stderr
            told = initiator.wait(initiator.test_unit_ready())
            assert (told.status, told.sense_text) == (CHECK_CONDITION, "sense 06/2a/09")
            assert initiator.wait(initiator.test_unit_ready()).status == 0
            assert capacity(initiator) == LARGE
            assert initiator.good(initiator.read(0, 8)) == b"\x5a" * 4096
            assert initiator.good(initiator.read(SIZE // 512, 8)) == bytes(4096)
            initiator.good(initiator.write(LARGE // 512 - 8, b"\xa5" * 4096))
        assert str(LARGE) in oracles.run("iscsi-readcapacity16", str(server.url)).replace(",", "")
        grown = server.ctl_json("device", "resize", name, "--size", "+64K")
        assert grown == {"device": name, "size": LARGE + CLUSTER, "previous": LARGE}
        assert server.stop() == 0, server.stderr
    layers = [("parallels", tmp_path / each) for each in ("base.hds", "disk.hds")]
    oracles.qemu_io(
        oracles.chain_spec(layers),
        "read -P 0x5a 0 4k",
        "read -P 1 4k 60k",
        f"read -P 0 {SIZE} 64k",
        f"read -P 0xa5 {LARGE - 4096} 4k",
        driver=None,
        read_only=True,
    )
    oracles.qemu_check(tmp_path / "disk.hds")


def test_under_load_nothing_is_lost(tmp_path: Path) -> None:
    descriptor = make_chain(tmp_path)
    layers = [("parallels", tmp_path / each) for each in ("base.hds", "disk.hds")]
    raw = oracles.read_through_qemu(layers, tmp_path / "before.raw")
    journal = Journal(7, initial_from(raw))
    mix = Mix(write=0.6, read=0.3, flush=0.05, largest=32)
    with (
        ServeProcess(descriptor, directory=tmp_path) as server,
        Initiator(server.url) as initiator,
    ):
        initiator.settle()
        (name,) = server.device_names()
        ended = threading.Event()

        def grow() -> None:
            try:
                for _ in range(4):
                    server.ctl("device", "resize", name, "--size", "+700M")
            finally:
                ended.set()

        thread = threading.Thread(target=grow)
        thread.start()
        load = Load(initiator, journal, range(SIZE // BLOCK), seed=7, mix=mix)
        load.repeat = True  # as initiators do
        load.run(until=ended.is_set)
        load.run(requests=200)
        thread.join()
        assert load.attentions == ["sense 06/2a/09"] * 4
        assert capacity(initiator) == SIZE + 4 * 700 * MIB
        assert load.verify()
        assert server.stop() == 0, server.stderr
    oracles.qemu_check(tmp_path / "disk.hds")


def test_refusals_leave_a_device_as_it_was(tmp_path: Path) -> None:
    image = images.write_delta(tmp_path / "disk.hds", SIZE, {}, cluster_size=CLUSTER)
    with ServeProcess(image, directory=tmp_path) as server:
        for arguments, code, text in [
            (("disk", "--size", "1M"), 2, "can only become larger"),
            (("disk", "--size", "x"), 2, "is not a size"),
            (("other", "--size", "1G"), 4, "other"),
        ]:
            result = server.ctl("device", "resize", *arguments, check=False)
            assert (result.returncode, text in result.stderr) == (code, True), result.stderr
        offline = resize(image, "1G")
        assert offline.returncode == 1
        assert f"is in use by process {server.pid}" in offline.stderr
        server.ctl("device", "standby", "disk", "enter")
        result = server.ctl("device", "resize", "disk", "--size", "1G", check=False)
        assert result.returncode == 6
        assert "is in standby" in result.stderr
        server.ctl("device", "standby", "disk", "leave")
        server.ctl("device", "resize", "disk", "--size", "1G")
        assert server.stop() == 0


def test_a_full_file_system_damages_nothing(tmp_path: Path) -> None:
    """The room for the longer table is not there; later it is."""
    if oracles.have("unshare"):
        pytest.skip("unshare is not installed: apt-get install util-linux")
    clusters = dict.fromkeys((0, 1, 2), b"\x07" * CLUSTER)
    image = images.write_delta(tmp_path / "disk.hds", SIZE, clusters, cluster_size=CLUSTER)
    script = """
set -e
mount -t tmpfs -o size=3m tmpfs "$1"
cp "$3" "$1/disk.hds"
cd "$1"
resize="$2 -m ploopd.cli.ploopctl image resize --size 400G disk.hds"
read="qemu-io -f parallels -r -c"
dd if=/dev/zero of=full bs=4096 status=none 2>/dev/null || true
if $resize; then exit 1; fi
qemu-img check -q -f parallels disk.hds
$read 'read -P 7 0 192k' disk.hds
rm full
mount -o remount,size=64m "$1"
$resize
$read 'read -P 7 0 192k' disk.hds
qemu-img check -q -f parallels disk.hds
"""
    place = tmp_path / "small"
    place.mkdir()
    command = ["unshare", "-m", "-r", "sh", "-c", script, "sh", str(place), sys.executable]
    command.append(str(image))
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if "unshare" in result.stderr and "not permitted" in result.stderr:
        pytest.skip(f"no mount namespaces here: {result.stderr.strip()}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "No space left" in result.stderr or "ENOSPC" in result.stderr
    assert "Image resized." in result.stdout
    assert "failed" not in result.stdout
