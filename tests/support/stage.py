"""What standby episodes on the wire are played with: a chain on storage that fails, an operator."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from ploopd.control import messages
from ploopd.control.client import ControlClient
from tests.support import images, oracles
from tests.support.faultfs import FaultFs
from tests.support.images import MIB
from tests.support.load import BLOCK

SIZE = 64 * MIB
CLUSTER = 65536
BLOCKS_PER_CLUSTER = CLUSTER // BLOCK
PATIENCE = 30.0
"""Seconds that anything may take."""


class Chain:
    """A base in which every cluster has content, and an empty top, on a fault file system."""

    def __init__(self, storage: FaultFs, name: str, *, seed: int) -> None:
        self.storage = storage
        self.place = storage.source / name
        self.top = "top.hds"
        self._content = random.Random(seed).randbytes(MIB)
        self.place.mkdir()
        clusters = {index: self.cluster(index) for index in range(SIZE // CLUSTER)}
        images.write_delta(self.place / "base.hds", SIZE, clusters, cluster_size=CLUSTER)
        images.write_delta(self.place / self.top, SIZE, {}, cluster_size=CLUSTER)
        rows = [
            (images.guid(1), "Compressed", "base.hds"),
            (images.TOP_GUID, "Compressed", self.top),
        ]
        descriptor = images.write_descriptor(self.place, SIZE, rows, cluster_size=CLUSTER)
        self.descriptor = self.mounted(descriptor.name)

    def mounted(self, name: str) -> Path:
        """A file of the chain where ploopd sees it."""
        return self.storage.mountpoint / self.place.name / name

    def glob(self, name: str) -> str:
        """The same for the rules of the fault file system."""
        return f"{self.place.name}/{name}"

    def cluster(self, index: int) -> bytes:
        """The base's content, which differs from cluster to cluster."""
        start = index * 4099 % (MIB - CLUSTER)
        return self._content[start : start + CLUSTER]

    def initial(self, block: int) -> bytes:
        index, within = divmod(block, BLOCKS_PER_CLUSTER)
        return self.cluster(index)[within * BLOCK : (within + 1) * BLOCK]

    def copy_top(self, name: str) -> str:
        """What an operator does who has a copy elsewhere; returns the name it replaces."""
        old, self.top = self.top, name
        shutil.copyfile(self.place / old, self.place / name)
        return old

    def end_of_clusters(self) -> int:
        """Where the next cluster of the top will be, by the BAT in its file."""
        raw = (self.place / self.top).read_bytes()[: 64 + 4 * (SIZE // CLUSTER)]
        last = max(memoryview(raw)[64:].cast("I"), default=0)  # 0: only header and BAT
        return (last + 1) * CLUSTER

    def read_through_qemu(self, raw: Path) -> Path:
        """The content after ploopd has ended; what a closed image must be is checked, too."""
        top = self.place / self.top
        assert oracles.bat_problems(top) == []
        assert oracles.in_use_word(top) == 0
        layers = [("parallels", self.place / "base.hds"), ("parallels", top)]
        return oracles.read_through_qemu(layers, raw)

    def remove(self) -> None:
        shutil.rmtree(self.place)


class Operator:
    """One who watches one device through the control socket and brings it back."""

    def __init__(self, control: Path, device: str) -> None:
        self.client = ControlClient(control, timeout=PATIENCE)
        self.device = device

    def __enter__(self) -> Operator:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def details(self) -> messages.DeviceDetails:
        name = messages.DeviceName(name=self.device)
        reply = self.client.call(messages.SHOW_DEVICE, messages.ShowReply, name, waiting="details")
        return reply.device

    def wait_for(self, wanted: str) -> None:
        """Until the state string is `wanted`."""
        parameters = messages.StandbyWaitParameters(
            name=self.device, standby=wanted, timeout=PATIENCE
        )
        state = self.client.call(
            messages.STANDBY_WAIT, messages.StandbyState, parameters, waiting="standby"
        )
        assert state.standby == wanted

    def enter_standby(self) -> None:
        name = messages.DeviceName(name=self.device)
        self.client.call(messages.STANDBY_ENTER, messages.StandbyState, name, waiting="standby")

    def replace(self, image: Path, *, force: bool = False) -> None:
        """A replace that succeeds."""
        parameters = messages.ReplaceParameters(name=self.device, image=str(image), force=force)
        steps = self.client.stream(
            messages.REPLACE_DEVICE, messages.ReplaceStep, parameters, waiting="the replace"
        )
        assert [step.step for step in steps][-1] == "done"

    def recover(self, chain: Chain, *, copy: str | None = None) -> None:
        """Replace the top by itself, or by a copy of that name."""
        if copy is None:
            self.replace(chain.mounted(chain.top))
            return
        old = chain.copy_top(copy)
        self.replace(chain.mounted(copy), force=True)  # the copy carries the in-use word
        (chain.place / old).unlink()


def until(condition: Callable[[], bool], poll: Callable[[float], object]) -> None:
    """`poll` in small steps until the condition holds."""
    for _ in range(int(PATIENCE / 0.01)):
        if condition():
            return
        poll(0.01)
    raise AssertionError(f"not within {PATIENCE} s")
