"""`ploopctl lio`: devices as LUNs of the kernel's own iSCSI target, and open-iscsi as the judge."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ploopd.control import messages
from ploopd.control.client import ControlClient
from ploopd.errors import BusyError, PloopError
from ploopd.frontends.tcmu.lio import Chap, ExportRequest, Lio
from tests.kernel.guest import kernel_target
from tests.kernel.guest.conftest import INITIATOR_NAME, OpenIscsi
from tests.kernel.guest.kernel_target import TargetcliShell, backstores, targetcli, targets
from tests.kernel.guest.run import sh, wait_until
from tests.support import images
from tests.support.images import MIB
from tests.support.serve import ServedUrl, ServeProcess

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(120)]

IQN = "iqn.2026-01.org.example:disks"
URL = ServedUrl(host="127.0.0.1", port=3260, iqn=IQN, lun=0)
CHAP = """\
user = "guest"
secret = "correct horse battery"
mutual_user = "target"
mutual_secret = "staple and a dozen"
"""


@pytest.fixture(scope="module")
def directory(lio: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def daemon(bus: None, directory: Path) -> Iterator[ServeProcess]:
    disks = [images.write_delta(directory / f"{name}.hds", 64 * MIB, {}) for name in ("web", "db")]
    with kernel_target.serve(*disks, directory=directory) as daemon:
        yield daemon
        assert daemon.stop() == 0, daemon.stderr


@pytest.fixture
def server(kernel: None, daemon: ServeProcess) -> ServeProcess:
    return daemon


def refused(server: ServeProcess, *words: str) -> tuple[int, str]:
    """Exit code and the line on stderr of an export that must not leave anything behind."""
    result = server.ctl("lio", *words, check=False)
    assert result.returncode, result.stdout
    assert result.stderr.count("\n") == 1
    return result.returncode, result.stderr


def test_an_export_takes_a_second_and_leaves_nothing(
    server: ServeProcess, initiator: OpenIscsi
) -> None:
    seconds = []
    for _ in range(3):  # the machine may have something else to do
        begin = time.monotonic()
        assert server.ctl("lio", "export", "web", "--iqn", IQN).stdout == f"{URL}\n"
        seconds.append(time.monotonic() - begin)
        server.ctl("lio", "unexport", "web")
        assert (backstores(), targets()) == ([], [])
    assert min(seconds) <= 1.0, seconds
    server.ctl("lio", "export", "web", "--iqn", IQN)
    assert IQN in initiator.discover(URL)
    disk = initiator.login(URL)
    assert sh("blockdev", "--getsize64", disk).strip() == str(64 * MIB)
    rows = server.ctl("lio", "list").stdout.split("\n")
    assert rows[1].split() == ["web", "64", "MiB", "web", f"{IQN}/0", "127.0.0.1:3260", "-"]
    initiator.logout(URL)
    server.ctl("lio", "unexport", "web", "--iqn", IQN)
    assert server.ctl_json("lio", "list") == {"exports": [], "backstores": []}


def test_chap_both_ways(server: ServeProcess, initiator: OpenIscsi, directory: Path) -> None:
    secrets = directory / "chap.toml"
    secrets.write_text(CHAP)
    secrets.chmod(0o600)
    server.ctl("lio", "export", "web", "--iqn", IQN, "--chap-file", str(secrets))
    initiator.discover(URL)
    with pytest.raises(AssertionError, match="authorization"):
        initiator.login(URL)
    settings = {
        "authmethod": "CHAP",
        "username": "guest",
        "password": "correct horse battery",
        "username_in": "target",
        "password_in": "staple and a dozen",
    }
    for key, value in settings.items():
        initiator.update(URL, f"node.session.auth.{key}", value)
    initiator.login(URL)
    initiator.logout(URL)
    initiator.update(URL, "node.session.auth.password_in", "not what it says")
    with pytest.raises(AssertionError):  # the initiator does not believe the target
        initiator.login(URL)
    assert "staple" not in kernel_target.MEMORY.read_text()


def test_only_who_is_named_may_log_in(server: ServeProcess, initiator: OpenIscsi) -> None:
    other = "iqn.2026-01.org.example:somebody"
    server.ctl("lio", "export", "web", "--iqn", IQN, "--acl", other)
    initiator.discover(URL)
    with pytest.raises(AssertionError, match="authorization"):
        initiator.login(URL)
    server.ctl("lio", "unexport", "web")
    server.ctl("lio", "export", "web", "--iqn", IQN, "--acl", other, "--acl", INITIATOR_NAME)
    initiator.login(URL)
    initiator.logout(URL)


def test_two_devices_share_a_target(server: ServeProcess, initiator: OpenIscsi) -> None:
    server.ctl("lio", "export", "web", "--iqn", IQN)
    second = server.ctl("lio", "export", "db", "--iqn", IQN, "--lun", "7").stdout
    assert second == f"iscsi://127.0.0.1:3260/{IQN}/7\n"
    initiator.discover(URL)
    initiator.login(URL)
    wait_until(lambda: initiator.disks(IQN, "7"), "the second disk")
    initiator.logout(URL)
    code, line = refused(server, "export", "web", "--iqn", IQN)
    assert (code, "exported there already" in line) == (6, True)
    server.ctl("lio", "unexport", "web")
    assert (backstores(), targets()) == (["db"], [IQN])
    server.ctl("lio", "unexport", "db")
    assert (backstores(), targets()) == ([], [])


def test_somebody_elses_target_is_used_and_left_alone(
    server: ServeProcess, initiator: OpenIscsi, directory: Path
) -> None:
    with TargetcliShell() as shell:
        shell("/backstores/fileio", "create", "theirs", str(directory / "theirs"), "8M")
        shell("/iscsi", "create", IQN)
        shell(f"/iscsi/{IQN}/tpg1/luns", "create", "/backstores/fileio/theirs")
    assert "lets no initiator in" in refused(server, "export", "web", "--iqn", IQN)[1]
    secrets = directory / "theirs.toml"
    secrets.write_text(CHAP)
    secrets.chmod(0o600)
    with_chap = ("--acl", INITIATOR_NAME, "--chap-file", str(secrets))
    assert "nobody for CHAP" in refused(server, "export", "web", "--iqn", IQN, *with_chap)[1]
    server.ctl("lio", "export", "web", "--iqn", IQN, "--acl", INITIATOR_NAME)
    before = targetcli("ls", f"/iscsi/{IQN}/tpg1")
    assert "lun1" in before
    second = ServedUrl(host="127.0.0.1", port=3260, iqn=IQN, lun=1)
    initiator.discover(second)
    initiator.login(second)
    initiator.logout(second)
    server.ctl("lio", "unexport", "web")
    assert backstores() == ["theirs"]
    after = targetcli("ls", f"/iscsi/{IQN}/tpg1")
    assert "lun0" in after
    assert "lun1" not in after
    assert INITIATOR_NAME not in after
    assert "3260" in after  # their portal
    targetcli(f"/iscsi/{IQN}/tpg1", "set", "attribute", "generate_node_acls=1")
    refusal = refused(server, "export", "web", "--iqn", IQN)[1]
    assert "lets everybody on the network in" in refusal  # their portal is 0.0.0.0
    assert backstores() == ["theirs"]


def test_what_fails_leaves_nothing(server: ServeProcess) -> None:
    taken = f"127.0.0.1:{server.url.port}"
    for words, code, reason in [
        (("web", "--iqn", IQN, "--portal", taken), 15, "cannot listen"),
        (("web", "--iqn", IQN, "--portal", "0.0.0.0"), 2, "--insecure"),
        (("web", "--iqn", IQN, "--portal", "localhost:3260"), 2, "IP address"),
        (("web", "--iqn", IQN, "--portal", "127.0.0.1:0"), 2, "no port"),
        (("web", "--iqn", "web"), 2, "an IQN is like"),
        (("web", "--iqn", IQN, "--acl", "nobody"), 2, "an IQN is like"),
        (("web", "--iqn", IQN, "--chap-file", "/nowhere.toml"), 4, "/nowhere.toml"),
        (("mail", "--iqn", IQN), 4, "there are: web, db"),
    ]:
        got, line = refused(server, "export", *words)
        assert reason in line
        assert got == code, line
        assert (backstores(), targets()) == ([], []), words
    assert refused(server, "unexport", "web")[0] == 4
    targetcli("/backstores/ramdisk", "create", "web", "8M")
    assert "another backstore has that name" in refused(server, "export", "web", "--iqn", IQN)[1]
    assert backstores() == ["web"]


STEPS = [
    "Target",
    "TPG",
    "TPG.set_attribute",
    "LUN",
    "NodeACL",
    "NodeACL.chap_userid",
    "NodeACL.chap_mutual_password",
    "MappedLUN",
    "NetworkPortal",
    "TPG.enable",
]


@pytest.mark.parametrize("step", STEPS)
def test_every_step_that_fails_is_undone(
    kernel: None, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """rtslib fails at this step of an export; the kernel's target is as before."""
    rtslib = pytest.importorskip("rtslib_fb")
    lio = Lio()
    request = ExportRequest(
        backstore="alone",
        config="alone",
        size=MIB,
        serial="1",
        iqn=IQN,
        portals=(("127.0.0.1", 3260),),
        acl=(INITIATOR_NAME,),
        chap=Chap(user="a", secret="b" * 12, mutual_user="c", mutual_secret="d" * 12),
    )
    lio.create_backstore(request)

    def fail(*_: object, **__: object) -> None:
        raise rtslib.RTSLibError("the step failed")

    name, _, member = step.partition(".")
    if not member:
        monkeypatch.setattr(rtslib, name, fail)
    elif member == "set_attribute":
        monkeypatch.setattr(getattr(rtslib, name), member, fail)
    else:
        old = getattr(getattr(rtslib, name), member)

        def set_or_fail(node: object, value: object) -> None:
            if value:  # rtslib disables what it deletes
                fail()
            old.fset(node, value)

        monkeypatch.setattr(getattr(rtslib, name), member, property(old.fget, set_or_fail))
    with pytest.raises(PloopError, match=r"the step failed|cannot listen"):
        lio.export(request)
    assert targets() == []
    monkeypatch.undo()
    exported = lio.export(request)
    assert exported.made == ("target", f"acl {INITIATOR_NAME}", "portal 127.0.0.1:3260")
    with pytest.raises(BusyError, match=f"is exported as {IQN}/0"):
        lio.delete_backstore("alone")
    lio.unexport(exported)
    lio.delete_backstore("alone")
    assert (backstores(), targets()) == ([], [])


def test_a_lun_is_taken_away_under_an_initiator(server: ServeProcess, initiator: OpenIscsi) -> None:
    server.ctl("lio", "export", "web", "--iqn", IQN)
    initiator.discover(URL)
    disk = initiator.login(URL)
    sh("dd", "if=/dev/zero", f"of={disk}", "bs=1M", "count=8", "oflag=direct")
    server.ctl("lio", "unexport", "web")
    assert (backstores(), targets()) == ([], [])
    with pytest.raises(AssertionError):
        initiator.discover(URL)
    initiator.forget(URL)
    kernel_target.assert_nothing_is_stuck()


def test_what_was_exported_comes_back(
    server: ServeProcess, initiator: OpenIscsi, directory: Path
) -> None:
    """Somebody clears the target; then the machine starts: an empty kernel and a new daemon."""
    secrets = directory / "one.toml"
    secrets.write_text('user = "guest"\nsecret = "correct horse battery"\n')
    secrets.chmod(0o600)
    server.ctl("lio", "export", "web", "--iqn", IQN, "--acl", INITIATOR_NAME)
    closed = "iqn.2026-01.org.example:closed"
    server.ctl("lio", "export", "db", "--iqn", closed, "--chap-file", str(secrets), "--lun", "3")
    for restart in (False, True):
        memory = kernel_target.MEMORY.read_bytes()
        sh("/usr/bin/targetctl", "clear")
        assert "missing: ploopctl lio restore" in server.ctl("lio", "list").stdout
        if restart:
            assert server.stop() == 0, server.stderr
            server.restart()
        server.ctl("lio", "restore")
        assert kernel_target.MEMORY.read_bytes() == memory
        assert (backstores(), targets()) == (["db", "web"], [closed, IQN])
        initiator.discover(URL)
        initiator.login(URL)
        initiator.logout(URL)
        again = server.ctl("lio", "restore")  # what is there stays
        assert again.stderr.count("exported") == 2
    secrets.unlink()
    sh("/usr/bin/targetctl", "clear")
    result = server.ctl("lio", "restore", check=False)
    assert "1 of 2 exports could not be restored" in result.stderr
    assert str(secrets) in result.stderr
    assert targets() == [IQN]
    server.ctl("lio", "unexport", "web")
    server.ctl("lio", "unexport", "db")  # although it is not there
    assert (backstores(), targets()) == ([], [])


def test_sixty_four_devices_at_once(kernel: None, initiator: OpenIscsi, scratch: Path) -> None:
    disks = [images.write_delta(scratch / f"d{n:02}.hds", 4 * MIB, {}) for n in range(64)]
    with kernel_target.serve(*disks, directory=scratch) as server:
        client = ControlClient(server.control, timeout=60)
        begin = time.monotonic()
        for image in disks:
            export = messages.LioExportParameters(
                name=image.stem, iqn=IQN, portals=["127.0.0.1:3260"]
            )
            client.call(messages.LIO_EXPORT, messages.LioReply, export, waiting="export")
        seconds = (time.monotonic() - begin) / len(disks)
        print(f"\n64 exports: {seconds:.2f} s each")
        assert len(backstores()) == 64
        initiator.discover(URL)
        initiator.login(URL)
        wait_until(lambda: len(initiator.disks(IQN)) == 64, "64 disks", 60)
        for name in initiator.disks(IQN):
            disk = Path("/dev", name)
            wait_until(disk.exists, name)
            with disk.open("rb", buffering=0) as file:
                assert file.read(4096) == bytes(4096)
        initiator.logout(URL)
        begin = time.monotonic()
        for image in disks:
            unexport = messages.LioUnexportParameters(name=image.stem)
            client.call(messages.LIO_UNEXPORT, messages.LioReply, unexport, waiting="unexport")
        print(f"64 unexports: {(time.monotonic() - begin) / len(disks):.2f} s each")
        client.close()
        assert (backstores(), targets()) == ([], [])
        assert server.stop() == 0, server.stderr
    assert seconds <= 1.0
