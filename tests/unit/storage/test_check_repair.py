"""Repairs: what they keep, in which order they write, and what other tools say afterwards."""

from __future__ import annotations

import itertools
import random
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ploopd.errors import ImageFormatError, StorageError
from ploopd.fileio.crash_log import CrashLog
from ploopd.fileio.faults import Fault, FaultyOs
from ploopd.storage.check import check_image
from tests.support import oracles
from tests.unit.storage.broken_images import (
    CLUSTER,
    ENTRIES,
    IN_USE,
    ORDER,
    SECTORS,
    append,
    content,
    make,
    read_tolerantly,
    set_entry,
    set_word,
    truncate,
)


@pytest.fixture(params=[1, 2])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return make(tmp_path / "a.hds", request.param)


def unit(image: Path) -> int:
    return SECTORS if image.read_bytes()[:16] == b"WithoutFreeSpace" else 1


def assert_clean(image: Path) -> None:
    """Sound by our check, by QEMU's and by an independent reading of the BAT."""
    report = check_image(image)
    assert (report.corruptions, report.leaks, report.details) == (0, 0, ())
    oracles.qemu_check(image)
    assert oracles.bat_problems(image) == []


def test_both_users_of_a_cluster_keep_its_content(image: Path) -> None:
    set_entry(image, 30, 3 * unit(image))
    set_entry(image, 31, 3 * unit(image))
    report = check_image(image, repair="all")
    assert (report.corruptions, report.corruptions_fixed) == (0, 2)
    assert [(one.kind, one.fixed) for one in report.details] == [("duplicate", True)] * 2
    assert_clean(image)
    expected = {cluster: content(cluster) for cluster in ORDER}
    found = read_tolerantly(image.read_bytes())
    assert found == expected | {30: content(3), 31: content(3)}
    oracles.qemu_io(
        str(image),
        f"read -P 0x03 {30 * CLUSTER} 1",
        f"write -P 0x55 {30 * CLUSTER} {CLUSTER}",
        f"read -P 0x55 {30 * CLUSTER} {CLUSTER}",
        driver="parallels",
    )
    assert read_tolerantly(image.read_bytes())[3] == content(3)


def test_copies_go_into_holes_first(image: Path) -> None:
    set_entry(image, 0, 0)
    set_entry(image, 30, 3 * unit(image))
    size = image.stat().st_size
    check_image(image, repair="all")
    assert image.stat().st_size == size
    assert read_tolerantly(image.read_bytes())[30] == content(3)
    assert_clean(image)


@pytest.mark.parametrize("value", [6, 1000, 0xFFFFFF])
def test_entries_that_name_nothing_are_cleared(image: Path, value: int) -> None:
    set_entry(image, 5, value * unit(image))
    size = image.stat().st_size
    check_image(image, repair="all")
    assert image.stat().st_size == size
    assert read_tolerantly(image.read_bytes()) == {cluster: content(cluster) for cluster in ORDER}
    assert_clean(image)


def test_a_cut_cluster_is_made_whole(image: Path) -> None:
    truncate(image, 6 * CLUSTER - 1000)
    check_image(image, repair="all")
    assert image.stat().st_size == 6 * CLUSTER
    found = read_tolerantly(image.read_bytes())
    assert found[39] == content(39)[:-1000] + bytes(1000)
    assert_clean(image)


@pytest.mark.parametrize("word", [IN_USE, 77])
def test_the_in_use_word_is_cleared_last(image: Path, word: int) -> None:
    set_word(image, 44, word)
    before = image.read_bytes()
    report = check_image(image, repair="all")
    assert report.corruptions_fixed == 1
    assert image.read_bytes() == before[:44] + bytes(4) + before[48:]
    assert_clean(image)


def test_leaks_are_given_back(image: Path) -> None:
    set_entry(image, 0, 0)
    append(image, 5 * CLUSTER + 17)
    stored = image.stat().st_blocks * 512
    assert check_image(image).leaks == 7
    report = check_image(image, repair="leaks")
    assert (report.leaks, report.leaks_fixed, report.corruptions_fixed) == (0, 7, 0)
    assert image.stat().st_size == 6 * CLUSTER
    assert stored - image.stat().st_blocks * 512 >= 6 * CLUSTER
    assert_clean(image)


def test_leak_repair_leaves_corruption_alone(image: Path) -> None:
    set_word(image, 44, IN_USE)
    set_entry(image, 30, 3 * unit(image))
    append(image, CLUSTER)
    before = image.read_bytes()
    report = check_image(image, repair="leaks")
    assert (report.corruptions, report.leaks, report.leaks_fixed) == (2, 0, 1)
    assert image.read_bytes() == before[:-CLUSTER]


def test_leak_repair_keeps_a_cut_cluster(image: Path) -> None:
    truncate(image, 6 * CLUSTER - 1000)
    before = image.read_bytes()
    assert check_image(image, repair="leaks").corruptions == 1
    assert image.read_bytes() == before


def test_misaligned_entries_are_never_touched(tmp_path: Path) -> None:
    # QEMU 7.2 truncates such a file and loses data.
    image = make(tmp_path / "a.hds", version=1)
    set_entry(image, 5, 6 * SECTORS + 8)
    set_word(image, 44, IN_USE)
    append(image, 2 * CLUSTER)
    before = image.read_bytes()
    for repair in ("leaks", "all"):
        assert check_image(image, repair=repair).corruptions == 2  # type: ignore[arg-type]
    assert image.read_bytes() == before


def test_slots_beyond_the_disk_are_cleared(image: Path) -> None:
    for slot in (ENTRIES, ENTRIES + 5, CLUSTER // 4 - 17):
        set_entry(image, slot, 0x1234)
    report = check_image(image, repair="all")
    assert report.corruptions_fixed == 3
    assert image.read_bytes()[64 + 4 * ENTRIES : CLUSTER] == bytes(CLUSTER - 64 - 4 * ENTRIES)
    assert_clean(image)


def test_images_that_can_only_be_read_are_not_repaired(image: Path) -> None:
    set_word(image, 44, IN_USE)
    set_word(image, 32, ENTRIES + 1)  # one entry too many
    before = image.read_bytes()
    assert check_image(image).corruptions == 1
    with pytest.raises(ImageFormatError):
        check_image(image, repair="all")
    assert image.read_bytes() == before


def test_debian_ploop_agrees(image: Path) -> None:
    set_entry(image, 30, 3 * unit(image))
    set_word(image, 44, IN_USE)
    append(image, 2 * CLUSTER)
    check_image(image, repair="all")
    full = image.with_name("full.hds")  # it refuses sparse files
    subprocess.run(["cp", "--sparse=never", str(image), str(full)], check=True)
    done = subprocess.run(
        ["/usr/sbin/ploop", "check", "-f", str(full)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


# Any damage to the metadata.

entries = st.one_of(
    st.integers(0, 8), st.integers(0, 8), st.integers(0, 0xFFFFFFFF), st.just(0xFFFFFFFF)
)
damages = st.fixed_dictionaries(
    {
        "entries": st.dictionaries(st.integers(0, ENTRIES - 1), entries, max_size=12),
        "slots": st.dictionaries(st.integers(ENTRIES, ENTRIES + 9), entries, max_size=2),
        "in_use": st.sampled_from([0, 0, IN_USE, 1]),
        "extension": st.sampled_from([0, 0, 0, 6 * SECTORS, 12345]),
        "length": st.integers(-1000, 3 * CLUSTER),
    }
)


def damaged(**changes: object) -> dict[str, object]:
    """One particular damage."""
    return {"entries": {}, "slots": {}, "in_use": 0, "extension": 0, "length": 0} | changes


def apply(image: Path, damage: dict[str, object], version: int) -> None:
    scale = SECTORS if version == 1 else 1
    for group in ("entries", "slots"):
        for cluster, value in damage[group].items():  # type: ignore[attr-defined]
            set_entry(image, cluster, min(value * scale, 0xFFFFFFFF // scale * scale))
    set_word(image, 44, damage["in_use"])  # type: ignore[arg-type]
    set_word(image, 56, damage["extension"])  # type: ignore[arg-type]
    length = damage["length"]
    assert isinstance(length, int)
    if length < 0:
        truncate(image, 6 * CLUSTER + length)
    else:
        append(image, length)


def same_content(one: bytes, other: bytes) -> bool:
    """Equal to the guest, for whom a cluster without an entry is zeros."""
    a, b = read_tolerantly(one), read_tolerantly(other)
    zeros = bytes(CLUSTER)
    return all(a.get(i, zeros) == b.get(i, zeros) for i in range(ENTRIES))


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=damages, version=st.sampled_from([1, 2]))
def test_any_damage_is_repaired_without_loss(
    tmp_path: Path, damage: dict[str, object], version: int
) -> None:
    image = make(tmp_path / "any.hds", version)
    apply(image, damage, version)
    before = image.read_bytes()
    first = check_image(image)
    assert image.read_bytes() == before
    repaired = check_image(image, repair="all")
    assert (repaired.corruptions, repaired.leaks) == (0, 0)
    assert repaired.corruptions_fixed == first.corruptions
    after = image.read_bytes()
    assert same_content(before, after)
    assert oracles.bat_problems(image) == []
    # Again: nothing to do, and nothing done.
    assert check_image(image, repair="all").details == ()
    assert image.read_bytes() == after


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example(damage=damaged(entries={30: 3}, in_use=IN_USE), version=2, seed=1)
@example(damage=damaged(length=-1000, in_use=IN_USE), version=2, seed=1)
@example(damage=damaged(entries={5: 99}, slots={41: 1}, in_use=IN_USE), version=1, seed=1)
@given(damage=damages, version=st.sampled_from([1, 2]), seed=st.integers(0, 1 << 30))
def test_a_power_cut_at_any_write_loses_nothing(
    tmp_path: Path, damage: dict[str, object], version: int, seed: int
) -> None:
    image = make(tmp_path / "cut.hds", version)
    apply(image, damage, version)
    before = image.read_bytes()
    for state in crash_states(image, "all", random.Random(seed)):
        assert same_content(before, state)
        image.write_bytes(state)
        if damage["in_use"] and state[44:48] == bytes(4):
            # Only an image that is whole again may say that it was closed.
            assert check_image(image).corruptions == 0
        repaired = check_image(image, repair="all")
        assert (repaired.corruptions, repaired.leaks) == (0, 0)
        assert same_content(before, image.read_bytes())


def crash_states(image: Path, repair: str, chance: random.Random) -> Iterator[bytes]:
    """What a power cut during each call of the repair may leave: three samples a call."""
    before = image.read_bytes()
    calls = 0
    while True:
        calls += 1
        image.write_bytes(before)
        layer = FaultyOs(record=True)
        for op in ("write", "fsync", "fallocate", "truncate"):
            layer.add(Fault(op=op))  # counted below, harmless
        stop = StopAfter(layer, calls)
        try:
            check_image(image, repair=repair, layer=stop)  # type: ignore[arg-type]
        except StorageError:
            finished = False
        else:
            finished = True
        log = layer.log(image)
        yield from after_power_cut(log, chance)
        if finished:
            return


def after_power_cut(log: CrashLog, chance: random.Random) -> Iterator[bytes]:
    """Durable changes with every subset of the others if they are few, else with some."""
    numbers = [record.number for record in log.unsynced]
    if len(numbers) <= 3:
        for count in range(len(numbers) + 1):
            for keep in itertools.combinations(numbers, count):
                yield log.state(keep)
        return
    for _ in range(4):
        yield log.state([number for number in numbers if chance.random() < 0.5])


class StopAfter:
    """Lets `calls` changing calls through to `layer`, then the power is gone."""

    def __init__(self, layer: FaultyOs, calls: int) -> None:
        self._layer = layer
        self._left = calls

    def __getattr__(self, name: str) -> Callable[..., object]:
        call = getattr(self._layer, name)
        if name not in ("pwritev", "fsync", "ftruncate", "fallocate"):
            return call  # type: ignore[no-any-return]

        def counted(*arguments: object) -> object:
            if self._left == 0:
                self._layer.power_cut()
            self._left -= 1
            return call(*arguments)

        return counted


def test_the_repair_of_a_large_table_is_quick(tmp_path: Path) -> None:
    """4 TiB with a million wrong entries: pages are written together, not entries."""
    image = tmp_path / "big.hds"
    entries = 4 << 20
    first = -(-(64 + 4 * entries) // (1 << 20))
    header = struct.pack(
        "<16sIIIIIQIIIQ", b"WithouFreSpacExt", 2, 16, 1, 2048, entries, entries * 2048, 0,
        first * 2048, 0, 0,
    )  # fmt: skip
    table = bytearray(4 * entries)
    for cluster in range(0, entries, 4):
        struct.pack_into("<I", table, 4 * cluster, 0xFFFFFFFF)
    with image.open("wb") as file:
        file.write(header + table)
        file.truncate(first << 20)
    layer = FaultyOs()
    report = check_image(image, repair="all", layer=layer)
    assert report.corruptions_fixed == entries // 4
    assert sum(1 for op, _ in layer.calls if op == "write") < 10
