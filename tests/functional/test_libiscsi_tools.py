"""libiscsi's own tools: discovery, INQUIRY, CHAP, several LUNs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.functional.conftest import Serve
from tests.support import oracles
from tests.support.images import MIB, ImageCase, make_content, qemu_image
from tests.support.oracles import OracleError, qemu_io
from tests.support.serve import ServeError, ServeProcess

pytestmark = pytest.mark.functional


def test_discovery_lists_the_target_and_its_luns(simple: ImageCase, serve: Serve) -> None:
    server = serve(simple.serve)
    url = server.url
    listing = oracles.run("iscsi-ls", "-s", url.portal)
    assert f"Target:{url.iqn}" in listing
    assert f"{url.host}:{url.port}" in listing
    assert f"Lun:{url.lun}" in listing


def test_inquiry_names_us_and_the_pages(simple: ImageCase, serve: Serve) -> None:
    server = serve(simple.serve)
    standard = oracles.run("iscsi-inq", str(server.url))
    assert "Vendor:PLOOPD" in standard
    assert "DIRECT_ACCESS" in standard
    pages = oracles.run("iscsi-inq", "-e", "1", "-c", "0", str(server.url))
    for page in ("SUPPORTED_VPD_PAGES", "UNIT_SERIAL_NUMBER", "DEVICE_IDENTIFICATION"):
        assert page in pages
    for page in ("BLOCK_LIMITS", "BLOCK_DEVICE_CHARACTERISTICS", "LOGICAL_BLOCK_PROVISIONING"):
        assert page in pages


def test_the_serial_survives_a_restart(simple: ImageCase, serve: Serve) -> None:
    server = serve(simple.serve)
    serials = []
    for _ in range(2):
        serials.append(oracles.run("iscsi-inq", "-e", "1", "-c", "128", str(server.url)))
        assert server.stop() == 0
        server.restart()
    assert serials[0] == serials[1]


def test_two_luns_are_two_disks(tmp_path: Path, serve: Serve) -> None:
    cases = []
    for number in (1, 2):
        raw = make_content(tmp_path / f"{number}.raw", 8 * MIB, seed=number)
        cases.append((raw, qemu_image(tmp_path, f"{number}.hds", raw)))
    server = serve(*(image for _, image in cases))
    assert len({url.lun for url in server.urls}) == 2
    for (raw, _), url in zip(cases, server.urls, strict=True):
        seen = oracles.read_through_iscsi(str(url), tmp_path / "seen.raw")
        oracles.assert_same_content(seen, raw)
    qemu_io(str(server.urls[1]), "write -P 7 0 64k", "flush")
    first = oracles.read_through_iscsi(str(server.urls[0]), tmp_path / "seen.raw")
    oracles.assert_same_content(first, cases[0][0])
    serials = {oracles.run("iscsi-inq", "-e", "1", "-c", "128", str(u)) for u in server.urls}
    assert len(serials) == 2


@pytest.fixture
def chap_file(tmp_path: Path) -> Path:
    path = tmp_path / "chap.toml"
    # libiscsi 1.19 knows only MD5.
    path.write_text('user = "alice"\nsecret = "correct horse battery"\nallow_md5 = true\n')
    path.chmod(0o600)
    return path


def test_chap(simple: ImageCase, serve: Serve, chap_file: Path, tmp_path: Path) -> None:
    server = serve(simple.serve, options=("--chap-file", str(chap_file)))
    good = server.url.with_credentials("alice", "correct horse battery")
    seen = oracles.read_through_iscsi(good, tmp_path / "seen.raw")
    oracles.assert_same_content(seen, simple.raw)
    with pytest.raises(OracleError):
        oracles.run("iscsi-inq", str(server.url), timeout=30)
    wrong = server.url.with_credentials("alice", "wrong horse battery")
    with pytest.raises(OracleError):
        oracles.run("iscsi-inq", wrong, timeout=30)
    assert "correct horse" not in server.stderr


def test_acl(simple: ImageCase, serve: Serve) -> None:
    allowed = "iqn.2026-01.org.example:allowed"
    server = serve(simple.serve, options=("--acl", allowed))
    oracles.run("iscsi-inq", "-i", allowed, str(server.url))
    with pytest.raises(OracleError):
        oracles.run("iscsi-inq", "-i", "iqn.2026-01.org.example:other", str(server.url))


def test_port_taken(simple: ImageCase, serve: Serve, tmp_path: Path) -> None:
    server = serve(simple.serve)
    other = qemu_image(tmp_path, "other.hds", simple.raw)
    before = oracles.digest(other)
    second = ServeProcess(other, directory=tmp_path, portal=f"{server.url.host}:{server.url.port}")
    with pytest.raises(ServeError) as caught:
        second.start()
    assert caught.value.returncode == 15
    assert str(server.url.port) in caught.value.stderr
    assert "Traceback" not in caught.value.stderr
    assert oracles.digest(other) == before


def test_an_image_is_never_opened_by_two_writers(
    simple: ImageCase, serve: Serve, tmp_path: Path
) -> None:
    serve(simple.serve)
    with pytest.raises(OracleError, match="lock"):
        qemu_io(str(simple.serve), "write -P 1 0 4k", driver="parallels")
    with pytest.raises(ServeError) as caught:
        ServeProcess(simple.serve, directory=tmp_path).start()
    assert caught.value.returncode == 6
    assert "Traceback" not in caught.value.stderr


def test_an_image_that_qemu_writes_is_refused(simple: ImageCase, tmp_path: Path) -> None:
    writer = subprocess.Popen(
        ["qemu-io", "-f", "parallels", str(simple.serve)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert writer.stdin is not None
    assert writer.stdout is not None
    try:
        writer.stdin.write(b"read 0 512\n")
        writer.stdin.flush()
        writer.stdout.readline()
        with pytest.raises(ServeError) as caught:
            ServeProcess(simple.serve, directory=tmp_path).start()
    finally:
        writer.communicate(b"quit\n", timeout=20)
    assert caught.value.returncode == 6
    assert str(simple.serve) in caught.value.stderr
