"""`ploopd run` reads its files again while initiators work: SIGHUP and `ploopctl reload`."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ploopd.config_file import load_config
from ploopd.control import messages
from ploopd.control.client import ControlClient
from tests.functional.test_run_service import Manager, RunProcess, manager
from tests.functional.test_standby_e2e import Director
from tests.support import images, oracles
from tests.support.faultfs import FaultFs
from tests.support.images import MIB
from tests.support.initiator import GOOD, Initiator, ProtocolError
from tests.support.load import BLOCK, Journal, Load
from tests.support.serve import ServedUrl

pytestmark = [pytest.mark.functional, pytest.mark.timeout(120)]

__all__ = ["manager"]  # a fixture

SIZE = 16 * MIB
LUNS_CHANGED = "sense 06/3f/0e"


class Service:
    """A daemon with the file that it reads; `a`, `b` and `c` are images."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.images = {
            name: images.write_delta(directory / f"{name}.hds", SIZE, {}, cluster_size=65536)
            for name in "abc"
        }
        self.server = RunProcess(self.images["a"], self.images["b"], directory=directory)

    def write(self, *devices: str, more: str = "", daemon: str = "", iscsi: str = "") -> None:
        """Each device is its table; `IMAGE x` in it stands for the path of an image."""
        tables = "".join(f"[[device]]\n{device}\n" for device in devices)
        for name, path in self.images.items():
            tables = tables.replace(f"IMAGE {name}", f'image = "{path}"')
        (self.directory / "ploopd.toml").write_text(
            f'[daemon]\ncontrol = "{self.server.control}"\n{daemon}\n'
            f'[iscsi]\nportals = ["127.0.0.1:0"]\n{iscsi}\n{more}\n{tables}'
        )

    def reload(self, *options: str, code: int = 0) -> dict[str, list[object]]:
        """`ploopctl reload`."""
        result = self.server.ctl("reload", "--output", "json", *options, check=False)
        assert result.returncode == code, result.stderr + self.server.stderr[-2000:]
        answer: dict[str, list[object]] = json.loads(result.stdout) if result.stdout else {}
        return answer

    def refused(self) -> str:
        """The line with which `ploopctl reload` fails."""
        result = self.server.ctl("reload", check=False)
        assert result.returncode not in (0, 6), result.stdout
        return result.stderr.strip()

    def hang_up(self, line: str) -> None:
        """SIGHUP, and wait until `line` is in the log once more."""
        before = self.server.stderr.count(line)
        os.kill(self.server.pid, signal.SIGHUP)
        wait_until(lambda: self.server.stderr.count(line) > before)

    def url(self, lun: int) -> ServedUrl:
        return replace(self.server.url, lun=lun)

    def served(self) -> dict[str, int]:
        """The LUN of each device."""
        rows = self.server.ctl_json("device", "list")
        return {row["name"]: int(row["urls"][0].rpartition("/")[2]) for row in rows}


def wait_until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.05)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    found = Service(tmp_path)
    found.write("IMAGE a", "IMAGE b")
    with found.server:
        yield found
        if found.server.process is not None:
            assert found.server.stop() == 0, found.server.stderr[-2000:]
        assert "Traceback" not in found.server.stderr


def reported(initiator: Initiator) -> list[int]:
    """REPORT LUNS."""
    data = initiator.good(initiator.submit(bytes([0xA0]) + bytes(5) + b"\0\0\1\0\0\0", expect=256))
    end = 8 + int.from_bytes(data[:4], "big")
    return [int.from_bytes(data[at : at + 2], "big") for at in range(8, end, 8)]


def ready(url: ServedUrl) -> str:
    """What TEST UNIT READY of a new session says in the end."""
    with Initiator(url) as initiator:
        for _ in range(4):
            answer = initiator.wait(initiator.test_unit_ready())
            if not answer.sense_text.startswith("sense 06"):
                break
        initiator.logout()
    return "" if answer.status == GOOD else answer.sense_text


def test_devices_come_and_go_under_a_load_on_another(service: Service) -> None:
    """The load on LUN 0 hears that the LUNs have changed, and nothing else."""
    with Initiator(service.url(0)) as initiator, Initiator(service.url(1)) as idle:
        initiator.settle()
        idle.settle()
        load = Load(initiator, Journal(1), range(SIZE // BLOCK), repeat=True)

        def play() -> None:
            service.write("IMAGE a\npark_max = 7", "IMAGE c")
            assert service.reload() == {
                "added": ["c"],
                "removed": ["b"],
                "changed": ["a.park_max"],
                "refused": [],
                "needs_restart": ["c.lun"],
            }
            assert service.served() == {"a": 0, "c": 2}  # not 1: b was that
            # Who had b finds nothing there; what it finds after a scan is c.
            assert idle.wait(idle.test_unit_ready()).sense_text == "sense 05/25/00"
            assert reported(idle) == [0, 2]
            assert ready(service.url(2)) == ""
            service.write("IMAGE a", "IMAGE c\nlun = 2", "IMAGE b\nlun = 1")
            service.hang_up("event=reloaded")
            assert service.served() == {"a": 0, "c": 2, "b": 1}
            assert ready(service.url(1)) == ""

        load.run(requests=300)
        director = Director(play)
        director.start()
        load.run(until=director.ended.is_set)
        director.join()
        if director.error is not None:
            raise director.error
        load.run(requests=300)
        load.flush()
        load.verify()
        assert set(load.attentions) == {LUNS_CHANGED}
        initiator.logout()
        idle.logout()
    assert service.server.stop() == 0, service.server.stderr[-2000:]
    for path in service.images.values():
        assert oracles.in_use_word(path) == 0
    seen = oracles.read_through_qemu(
        [("parallels", service.images["a"])], service.directory / "final.raw"
    )
    assert load.journal.verify_file(seen, size=SIZE) > 0


def test_a_lun_that_works_is_taken_away_when_its_commands_have_ended(service: Service) -> None:
    """Every write is either answered, and then in the image, or refused."""
    with Initiator(service.url(1)) as initiator:
        initiator.settle()
        service.write("IMAGE a")
        answers: dict[int, str] = {}
        data = bytes(range(256)) * 16
        tags: dict[int, int] = {}
        for block in range(2000):
            tags[initiator.write(block * 8, data)] = block
            while len(tags) - len(answers) >= 32:
                for answer in initiator.poll(0.1):
                    answers[tags[answer.tag]] = answer.sense_text if answer.status else ""
            if block == 500:
                os.kill(service.server.pid, signal.SIGHUP)
            if "sense 05/25/00" in answers.values():
                break
        while len(answers) < len(tags):
            for answer in initiator.poll(0.1):
                answers[tags[answer.tag]] = answer.sense_text if answer.status else ""
        wait_until(lambda: "event=device-removed device=b" in service.server.stderr)
        events = service.server.ctl_json("events", "--device", "b")
        assert [event["event"] for event in events] == ["device-added", "device-removed"]
        initiator.logout()
    assert set(answers.values()) <= {"", "sense 05/25/00"}
    assert "sense 05/25/00" in answers.values()
    assert len(answers) > 500
    assert oracles.in_use_word(service.images["b"]) == 0
    seen = oracles.read_through_qemu(
        [("parallels", service.images["b"])], service.directory / "final.raw"
    )
    content = seen.read_bytes()
    for block, text in answers.items():
        if not text:
            assert content[block * BLOCK : (block + 1) * BLOCK] == data


MISTAKES = [
    pytest.param(
        "IMAGE a\ncolour = 1", "ploopd.toml: line 12: there is no such key: colour", id="key"
    ),
    pytest.param("IMAGE a\npark_max = -1", "device 2.park_max = -1", id="value"),
    pytest.param("IMAGE a\nname =", "is not TOML", id="syntax"),
    pytest.param('IMAGE a\n[[device]]\nimage = "/nowhere/x"', "/nowhere/x", id="image"),
    pytest.param(
        "IMAGE a\nlun = 0\n[[device]]\nIMAGE c\nlun = 1\n[[device]]\nIMAGE b",
        "b has that LUN until",
        id="lun",
    ),
]


@pytest.mark.parametrize(("device", "text"), MISTAKES)
def test_a_mistake_changes_nothing(service: Service, device: str, text: str) -> None:
    before = service.server.ctl_json("device", "list")
    # A right change beside it is not made either.
    service.write("IMAGE c", device, daemon='log_level = "debug"')
    line = service.refused()
    assert text in line
    assert "\n" not in line
    service.hang_up("event=reload-failed")
    assert service.server.ctl_json("device", "list") == before
    assert "event=reloaded" not in service.server.stderr
    assert oracles.in_use_word(service.images["c"]) == 0
    assert ready(service.url(0)) == ready(service.url(1)) == ""


def test_what_needs_a_restart_is_named_and_left(service: Service, tmp_path: Path) -> None:
    service.write(
        'IMAGE a\nlun = 4\nread_only = true\nname = "root"',
        'IMAGE b\njournal = "on"\nrecovery = "reopen"',
        daemon=f'sysfs = "{tmp_path}"\nlog_level = "debug"',
        iscsi='iqn = "iqn.2026-11.org.example:other"\nacl = ["iqn.2004-10.com.example:a"]',
    )
    answer = service.reload()
    keys = ["daemon.sysfs", "iscsi.iqn", "a.read_only", "a.name", "a.lun", "b.journal", "b.lun"]
    assert answer["needs_restart"] == keys
    assert answer["changed"] == ["daemon.log_level", "iscsi.acl", "b.recovery"]
    assert service.server.logged(f"event=reload-needs-restart keys={','.join(keys)}")
    assert service.served() == {"a": 0, "b": 1}
    assert service.server.ctl_json("device", "show", "b")["recovery"] == "reopen"
    # Access rules are for new logins.
    with pytest.raises(ProtocolError, match="0202"):
        Initiator(service.url(0))
    with Initiator(service.url(0), name="iqn.2004-10.com.example:a") as initiator:
        initiator.settle()
        initiator.good(initiator.write(0, bytes(4096)))
        # The configuration of now is what holds, not what is wanted.
        with ControlClient(service.server.control) as client:
            text = client.call(messages.GET_CONFIG, messages.ConfigText, waiting="it").toml
        (tmp_path / "saved.toml").write_text(text)
        saved = load_config(tmp_path / "saved.toml").serve
        assert [(one.name, one.read_only, one.recovery) for one in saved.devices] == [
            ("a", False, "manual"),
            ("b", False, "reopen"),
        ]
        assert (saved.iscsi.acl, saved.sysfs) == (("iqn.2004-10.com.example:a",), None)
        service.write("IMAGE a", "IMAGE b")
        assert service.reload()["needs_restart"] == []
        initiator.good(initiator.write(0, bytes(4096)))
        initiator.logout()


def test_a_device_in_standby_stays_unless_it_is_forced(service: Service) -> None:
    service.server.ctl("device", "standby", "b", "enter")
    with Initiator(service.url(1)) as initiator:
        initiator.settle()
        parked = initiator.write(0, bytes(4096))
        initiator.poll(0.2)
        service.write("IMAGE a")
        (refusal,) = service.reload(code=6)["refused"]
        assert isinstance(refusal, dict)
        assert refusal["device"] == "b"
        assert "in standby" in refusal["reason"]
        assert service.served() == {"a": 0, "b": 1}
        assert service.reload("--force")["removed"] == ["b"]
        assert initiator.wait(parked).status != GOOD
        assert initiator.wait(initiator.test_unit_ready()).sense_text == "sense 05/25/00"
        initiator.logout()
    assert service.served() == {"a": 0}


@pytest.mark.fuse
def test_a_storage_that_hangs_keeps_its_device_unless_it_is_forced(
    storage: FaultFs, tmp_path: Path
) -> None:
    service = Service(tmp_path)
    service.images["b"] = images.write_delta(storage.source / "b.hds", SIZE, {}, cluster_size=65536)
    service.images["b"] = storage.mountpoint / "b.hds"
    service.write("IMAGE a", "IMAGE b")
    with service.server:
        with Initiator(service.url(0)) as other, Initiator(service.url(1)) as initiator:
            other.settle()
            initiator.settle()
            initiator.good(initiator.write(0, bytes(4096)))
            storage.hang("b.hds", "fsync")
            hangs = initiator.synchronize_cache()
            initiator.poll(0.1)
            wait_until(lambda: storage.status()["hanging"] > 0)
            service.write("IMAGE a")
            (refusal,) = service.reload(code=6)["refused"]
            assert isinstance(refusal, dict)
            assert "did not end within 10 s" in refusal["reason"]
            assert service.served() == {"a": 0, "b": 1}
            assert service.reload("--force")["removed"] == ["b"]
            assert initiator.wait(hangs).status != GOOD
            assert initiator.wait(initiator.test_unit_ready()).sense_text == "sense 05/25/00"
            # The other disk has not noticed but for the attention.
            assert other.wait(other.test_unit_ready()).sense_text == LUNS_CHANGED
            other.good(other.write(0, bytes(4096)))
            other.logout()
            initiator.logout()
        storage.clear()
        assert service.server.stop() == 0, service.server.stderr[-2000:]
        assert "Traceback" not in service.server.stderr


@pytest.mark.fuse
def test_the_end_does_not_wait_for_a_reload(storage: FaultFs, tmp_path: Path) -> None:
    service = Service(tmp_path)
    images.write_delta(storage.source / "b.hds", SIZE, {}, cluster_size=65536)
    service.images["b"] = storage.mountpoint / "b.hds"
    service.write("IMAGE a", "IMAGE b")
    with service.server:
        with Initiator(service.url(1)) as initiator:
            initiator.settle()
            initiator.good(initiator.write(0, bytes(4096)))
            storage.hang("b.hds", "fsync")
            initiator.synchronize_cache()
            initiator.poll(0.1)
            wait_until(lambda: storage.status()["hanging"] > 0)
            service.write("IMAGE a")
            os.kill(service.server.pid, signal.SIGHUP)
            wait_until(lambda: len(reported(initiator)) == 1)  # b is being taken away
            process = service.server.process
            assert process is not None
            process.terminate()
            storage.clear()
            assert process.wait(30) == 0, service.server.stderr[-2000:]
        service.server._forget()
        assert "Traceback" not in service.server.stderr
    for image in service.images.values():
        assert oracles.in_use_word(image) == 0


def test_the_service_manager_is_told(tmp_path: Path, manager: Manager) -> None:
    service = Service(tmp_path)
    service.write("IMAGE a", "IMAGE b")
    service.server.env = {"NOTIFY_SOCKET": manager.path}
    with service.server:
        manager.wait_for("READY=1")
        manager.said.clear()
        before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        service.write("IMAGE a")
        os.kill(service.server.pid, signal.SIGHUP)
        manager.wait_for("READY=1")
        assert manager.said[0] == "RELOADING=1"
        key, _, time_text = manager.said[1].partition("=")
        assert key == "MONOTONIC_USEC"
        assert before <= int(time_text) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        assert manager.said[2:4] == ["STATUS=serving 1 devices", "READY=1"]
        # A mistake is no reason to be not ready.
        manager.said.clear()
        service.write("IMAGE a\nx = 1")
        os.kill(service.server.pid, signal.SIGHUP)
        manager.wait_for("READY=1")
        assert service.server.stop() == 0


@pytest.mark.fuse
def test_the_view_follows(tmp_path: Path) -> None:
    missing = oracles.missing_for_fuse()
    if missing is not None or importlib.util.find_spec("pyfuse3") is None:
        pytest.skip(missing or "pyfuse3 is not installed")
    view = tmp_path / "view"
    view.mkdir()
    daemon = f'sysfs = "{view}"'
    service = Service(tmp_path)
    service.write("IMAGE a", "IMAGE b", daemon=daemon)
    try:
        with service.server:
            assert sorted(os.listdir(view / "block")) == ["a", "b"]
            service.write("IMAGE a", "IMAGE c", daemon=daemon)
            attribute = (view / "block/b/queue/standby").open()
            assert attribute.read() == "off\n"
            with (view / "disk/b").open("r+b", buffering=0) as disk:
                disk.write(b"x" * 4096)
                (refusal,) = service.reload(code=6)["refused"]
                assert isinstance(refusal, dict)
                assert "view is open 1 times" in refusal["reason"]
                disk.write(b"y" * 4096)
            wait_until(lambda: not service.reload()["refused"])
            assert sorted(os.listdir(view / "block")) == ["a", "c"]
            assert sorted(os.listdir(view / "disk")) == ["a", "c"]
            assert (view / "block/c/queue/standby").read_text() == "off\n"
            attribute.seek(0)
            with pytest.raises(OSError, match="No such device"):
                attribute.read()
            attribute.close()
            service.server.ctl("device", "standby", "c", "enter")
            assert (view / "block/c/queue/standby").read_text() == "on\n"
            service.server.ctl("device", "standby", "c", "leave")
            assert service.server.stop() == 0, service.server.stderr[-2000:]
            assert "Traceback" not in service.server.stderr
    finally:
        subprocess.run(["fusermount3", "-u", "-z", view], stderr=subprocess.DEVNULL, check=False)


def test_serve_has_nothing_to_read_again(serve: Callable[..., RunProcess], tmp_path: Path) -> None:
    path = images.write_delta(tmp_path / "disk.hds", SIZE, {})
    server = serve(path)
    result = server.ctl("reload", check=False)
    assert result.returncode == 16
    assert "without configuration files" in result.stderr
    assert server.process is not None
    os.kill(server.pid, signal.SIGHUP)  # the terminal is closed
    assert server.process.wait(20) == 0
    server.kill()
