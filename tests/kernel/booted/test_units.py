"""The units under a real systemd, with a real kernel's target, under load.

In one order: the daemon is started once, and what one test leaves is what the next one needs.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.booted.conftest import (
    PROGRAMS,
    ROOT,
    Load,
    ctl,
    ctl_json,
    drop_in,
    journal,
    main_process,
    restart,
    show,
    status_of,
)
from tests.kernel.guest.conftest import OpenIscsi
from tests.kernel.guest.run import sh, wait_until
from tests.support.serve import ServedUrl

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(120)]

IMAGES = Path("/scratch/images")
SAVED = Path("/etc/rtslib-fb-target/saveconfig.json")
DISK = Path("/out/disk")
IQN = "iqn.2026-11.org.ploopd:booted"
URL = ServedUrl(host="127.0.0.1", port=3260, iqn=IQN, lun=0)
CAPABILITIES = 1 << 0 | 1 << 1 | 1 << 3 | 1 << 10 | 1 << 12
"""CHOWN, DAC_OVERRIDE, FOWNER, NET_BIND_SERVICE, NET_ADMIN."""
SECRET = "twelve-bytes-or-more"
CONFIG = f"""
[daemon]
#sysfs = "/run/ploopd/sys"
[lio]
serve = LIO
[iscsi]
portals = ["127.0.0.1:3261"]
iqn = "{IQN}"
chap_files = ["credential:chap_alice.toml"]
[[device]]
image = "{IMAGES}/a.raw"
[[device]]
image = "{IMAGES}/b.raw"
"""


@pytest.fixture(scope="module")
def service(installed: None) -> Iterator[str]:
    """ploopd.service, started; with a watchdog that does not wait for long."""
    IMAGES.mkdir()
    for name in ("a", "b"):
        with (IMAGES / f"{name}.raw").open("wb") as image:
            image.truncate(16 << 20)
    secrets = Path("/etc/ploopd/chap.d/alice.toml")
    secrets.write_text(f'user = "alice"\nsecret = "{SECRET}"\nallow_md5 = true\n')
    secrets.chmod(0o600)
    configure(CONFIG)
    drop_in("ploopd.service", "watchdog", "[Service]\nWatchdogSec=6\nTimeoutAbortSec=1\n")
    restart("ploopd.service")
    yield "ploopd.service"
    sh("systemctl", "stop", "ploopd.service", "ploopd-embedded.service")


def configure(text: str, lio: str = "true") -> None:
    Path("/etc/ploopd/ploopd.toml").write_text(text.replace("LIO", lio))


def test_started_is_ready(service: str) -> None:
    # `systemctl start` has returned: READY=1 was seen, and everything can be used.
    assert show(service, "ActiveState") == "active"
    assert show(service, "StatusText") == "serving 2 devices"
    pid = main_process(service)
    assert ctl_json("info")["pid"] == pid
    assert [one["name"] for one in ctl_json("device", "list")] == ["a", "b"]
    assert f"PID={pid}" in sh("busctl", "status", "org.kernel.TCMUService1").splitlines()


def test_the_journal_has_fields(service: str) -> None:
    def entries() -> list[dict[str, str]]:
        return [one for one in journal(service) if one.get("PLOOPD_EVENT") == "device-added"]

    wait_until(lambda: len(entries()) == 2, "the entries of both devices")
    assert [one["PLOOPD_DEVICE"] for one in entries()] == ["a", "b"]
    assert {one["_PID"] for one in entries()} == {str(main_process(service))}
    engines = [one for one in journal(service) if one.get("PLOOPD_EVENT") == "io-engine"]
    assert "kind=io_uring" in engines[-1]["MESSAGE"]  # the filter of system calls lets it


def test_root_with_little_to_say(service: str) -> None:
    status = status_of(main_process(service))
    for which in ("CapEff", "CapPrm", "CapBnd"):
        assert int(status[which], 16) == CAPABILITIES, which
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert show(service, "NRestarts") == "0"
    score = Path(f"/proc/{main_process(service)}/oom_score_adj").read_text()
    assert score == "-900\n"


def test_the_configuration_is_read_again(service: str) -> None:
    before = main_process(service)
    with (IMAGES / "c.raw").open("wb") as image:
        image.truncate(16 << 20)
    configure(f'{CONFIG}[[device]]\nimage = "{IMAGES}/c.raw"\n')
    sh("systemctl", "reload", service)  # has been done when this returns
    assert [one["name"] for one in ctl_json("device", "list")] == ["a", "b", "c"]
    configure(f"{CONFIG}[[devices]]\n")
    assert "failed" in sh("systemctl", "reload", service, check=False)
    assert len(ctl_json("device", "list")) == 3
    configure(CONFIG)
    sh("systemctl", "reload", service)
    assert [one["name"] for one in ctl_json("device", "list")] == ["a", "b"]
    assert show(service, "ActiveState") == "active"
    assert show(service, "StatusText") == "serving 2 devices"
    assert main_process(service) == before


def test_a_restart_a_hang_and_a_stop_under_load(service: str, initiator: OpenIscsi) -> None:
    ctl("lio", "export", "a", "--iqn", IQN, "--acl", "iqn.2026-01.org.ploopd:guest")
    initiator.discover(URL)
    initiator.update(URL, "node.session.timeo.replacement_timeout", "120")
    disk = initiator.login(URL)
    with Load(disk).running() as load:
        sh("systemctl", "reload", service)
        load.goes_on()

        before = main_process(service)
        sh("systemctl", "restart", service)
        assert main_process(service) != before
        load.goes_on()

        before = main_process(service)
        os.kill(before, signal.SIGSTOP)
        wait_until(lambda: show(service, "NRestarts") == "1", "the watchdog", 30)
        wait_until(lambda: show(service, "ActiveState") == "active", "the next daemon", 30)
        assert main_process(service) != before
        load.goes_on(40)

        sh("systemctl", "stop", service)
        assert show(service, "Result") == "success"
        # What the next daemon has to know outlives this one.
        assert (Path("/run/ploopd/tcmu") / "0-a.json").exists()
        restart(service)
        load.goes_on()
    messages = [one["MESSAGE"] for one in journal(service)]
    assert any("Watchdog timeout" in message for message in messages)
    resets = [one for one in journal(service) if one.get("PLOOPD_EVENT") == "tcmu-reset"]
    assert len(resets) == 1, "only the daemon that hung left a ring that was to be reset"
    initiator.logout(URL)


def test_the_exports_come_back_with_the_daemon(service: str) -> None:
    ctl("lio", "export", "b", "--iqn", f"{IQN}-b")
    sh("systemctl", "start", "ploopd-exports.service")
    sh("systemctl", "stop", service, "ploopd-exports.service")
    sh("/usr/bin/targetctl", "clear")
    assert not list(Path("/sys/kernel/config/target/iscsi").glob("iqn.*"))
    restart(service)  # wants them
    wait_until(lambda: show("ploopd-exports.service", "ActiveState") == "active", "the exports")
    assert exported() == {"a": [f"{IQN}/0"], "b": [f"{IQN}-b/0"]}


def exported() -> dict[str, list[str]]:
    """The LUNs of each backstore."""
    return {one["name"]: one["luns"] for one in ctl_json("lio", "list")["backstores"]}


def test_what_a_machine_that_is_started_again_finds(service: str) -> None:
    """What is left in /out is what `after_boot` sees; `boot.sh` puts it where it was."""
    ctl("lio", "unexport", "b")
    SAVED.parent.mkdir(exist_ok=True)
    sh("/usr/bin/targetctl", "save", SAVED)  # has a alone
    ctl("lio", "export", "b", "--iqn", f"{IQN}-b")
    sh("systemctl", "stop", service)
    for path in (Path("/etc/ploopd"), SAVED, Path("/var/lib/ploopd/lio.json"), IMAGES):
        kept = DISK / path.relative_to("/")
        kept.parent.mkdir(parents=True, exist_ok=True)
        sh("cp", "-a", path, kept)
    (DISK / "restore.sh").write_text(
        f"PREFIX=/usr/local BINDIR={PROGRAMS} {ROOT}/tools/install data\n"
        "for directory in etc var scratch; do cp -a /out/disk/$directory/. /$directory/; done\n"
        "systemctl --quiet --root=/ enable ploopd.service rtslib-fb-targetctl.service\n"
    )
    sh("/usr/bin/targetctl", "clear")


def test_without_any_privilege(service: str) -> None:
    sh("chown", "-R", "ploopd:", IMAGES)
    configure(CONFIG, lio="false")
    unit = "ploopd-embedded.service"
    restart(service)
    restart(unit)
    assert show(service, "ActiveState") == "inactive"  # it has its place
    status = status_of(main_process(unit))
    uid = sh("id", "-u", "ploopd").strip()
    assert status["Uid"].split() == [uid] * 4
    for which in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb"):
        assert int(status[which], 16) == 0, which
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    # The account is in a file that this user cannot read.
    url = ServedUrl(host="127.0.0.1", port=3261, iqn=IQN, lun=0)
    capacity = "iscsi-readcapacity16"
    assert "16777216" in sh(capacity, url.with_credentials("alice", SECRET))
    assert "16777216" not in sh(capacity, str(url), check=False)
    secrets = "/etc/ploopd/chap.d/alice.toml"
    denied = sh("setpriv", f"--reuid={uid}", "--clear-groups", "cat", secrets, check=False)
    assert "Permission denied" in denied
    assert ctl_json("info")["pid"] == main_process(unit)  # root's ploopctl finds it
    sh("systemctl", "reload", unit)
    assert ctl_json("info")["pid"] == main_process(unit)
    sh("systemctl", "stop", unit)
    assert show(unit, "Result") == "success"


def test_the_view_is_seen_by_everybody(service: str) -> None:
    directory = Path("/etc/systemd/system") / f"{service}.d"
    shutil.copy("/usr/local/share/doc/ploopd/ploopd-view.conf", directory)
    sh("systemctl", "daemon-reload")
    configure(CONFIG.replace("#sysfs", "sysfs"), lio="false")
    restart(service)
    assert Path("/run/ploopd/sys/block/a/queue/standby").read_text() == "off\n"
    status = status_of(main_process(service))
    assert int(status["CapEff"], 16) == CAPABILITIES | 1 << 21
    assert status["Seccomp"] == "2"
    sh("systemctl", "stop", service)
    assert not os.path.ismount("/run/ploopd/sys")
    assert show(service, "Result") == "success"
