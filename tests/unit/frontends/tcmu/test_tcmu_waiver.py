"""Backstores that appear in configfs (here: plain directories) beside another handler."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from ploopd.frontends.tcmu.uio import Kernel
from ploopd.frontends.tcmu.waiver import Waiver, Watch


class Scene:
    """configfs' directory of backstores, and the watch."""

    def __init__(self, root: Path) -> None:
        self.kernel = Kernel(sys=root)
        self.kernel.core.mkdir(parents=True)
        self.wanted = True
        self.granted: set[str] = set()
        self.watch: Watch | None = None

    def begin(self) -> None:
        self.watch = Watch(self.kernel, lambda: self.wanted, self.granted)

    def make(self, name: str) -> None:
        """mkdir, after which the kernel has the files."""
        attributes = self.kernel.core / name / "attrib"
        attributes.mkdir(parents=True)
        (attributes / "dev_config").write_text("\n")
        (attributes / "nl_reply_supported").write_text("0\n")
        (self.kernel.core / name / "control").write_text("")

    def configure(self, name: str, config: str) -> None:
        directory = self.kernel.core / name
        (directory / "attrib/dev_config").write_text(f"{config}\n")
        (directory / "control").write_text(f"dev_config={config}")

    def look(self) -> None:
        assert self.watch is not None
        self.watch.look()

    def waits(self, name: str) -> bool:
        text = (self.kernel.core / name / "attrib/nl_reply_supported").read_text()
        return text != "-1\n"


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    scene = Scene(tmp_path)
    yield scene
    if scene.watch is not None:
        scene.watch.stop()
        scene.watch.close()


def test_ours_is_not_waited_for_and_others_are(scene: Scene) -> None:
    scene.begin()
    for name in ("user_0/web", "user_1/mail"):
        scene.make(name)
    scene.look()
    scene.configure("user_0/web", "ploop/web")
    scene.configure("user_1/mail", "qcow//vz/mail.qcow2")
    scene.look()
    assert (scene.waits("user_0/web"), scene.waits("user_1/mail")) == (False, True)
    assert scene.granted == {"user_0/web"}


def test_one_that_is_configured_before_we_look(scene: Scene) -> None:
    scene.begin()
    scene.make("user_0/web")
    scene.configure("user_0/web", "ploop/web")
    scene.look()
    assert not scene.waits("user_0/web")


def test_a_second_one_in_an_hba_that_was_there(scene: Scene) -> None:
    scene.make("user_0/old")
    scene.configure("user_0/old", "ploop/old")
    scene.begin()
    scene.make("user_0/new")
    scene.configure("user_0/new", "ploop/new")
    scene.look()
    assert (scene.waits("user_0/old"), scene.waits("user_0/new")) == (True, False)


def test_other_kinds_and_files_do_not_matter(scene: Scene) -> None:
    scene.begin()
    (scene.kernel.core / "iblock_0/x").mkdir(parents=True)
    (scene.kernel.core / "user_0").mkdir()
    (scene.kernel.core / "user_0/hba_info").write_text("")
    scene.look()
    scene.make("user_0/gone")
    scene.look()
    for path in sorted((scene.kernel.core / "user_0/gone").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (scene.kernel.core / "user_0/gone").rmdir()
    scene.look()
    scene.make("user_0/gone")  # again
    scene.configure("user_0/gone", "ploop/x")
    scene.look()
    assert scene.granted == {"user_0/gone"}


def test_without_another_handler_the_kernel_waits(scene: Scene) -> None:
    scene.begin()
    scene.wanted = False
    scene.make("user_0/web")
    scene.look()
    scene.configure("user_0/web", "ploop/web")
    scene.look()
    assert scene.waits("user_0/web")
    assert not scene.granted


def test_without_configfs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Watch(Kernel(sys=tmp_path), lambda: True, set())


@pytest.mark.trio
async def test_the_thread_ends_with_the_server(scene: Scene) -> None:
    waiver = Waiver(scene.kernel, lambda: True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waiver.serve)
        await trio.testing.wait_all_tasks_blocked()
        (thread,) = [each for each in threading.enumerate() if each.name == "new-backstores"]
        nursery.cancel_scope.cancel()
    thread.join(20)
    assert not thread.is_alive()
