"""Images of every kind that ploopd serves, made by other tools or by our own struct code."""

from __future__ import annotations

import random
import struct
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import oracles
from tests.support.oracles import Layer

MIB = 1 << 20
HEADER = struct.Struct("<16sIIIIIQIIIQ")
MAGIC_V1 = b"WithoutFreeSpace"
MAGIC_V2 = b"WithouFreSpacExt"
TOP_GUID = "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
NO_GUID = "{00000000-0000-0000-0000-000000000000}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageCase:
    """One image: what to serve, the content it must have and the files QEMU reads it from.

    `serve`: the path given to ploopd.  `raw`: the expected content.  `layers`: base first.
    """

    name: str
    serve: Path
    raw: Path
    layers: list[Layer] = field(default_factory=list)

    @property
    def top(self) -> Path:
        return self.layers[-1][1]


def make_content(path: Path, size: int, *, seed: int, density: float = 0.5) -> Path:
    """A raw file of `size` bytes: random stretches of 4 KiB…1 MiB between holes, from `seed`."""
    generator = random.Random(seed)
    with path.open("wb") as file:
        file.truncate(size)
        offset = 0
        while offset < size:
            length = min(4096 * generator.randint(1, 256), size - offset)
            if generator.random() < density:
                file.seek(offset)
                file.write(generator.randbytes(length))
            offset += length
        file.seek(size - 512)
        file.write(generator.randbytes(512))
    return path


def write_delta(
    path: Path,
    size: int,
    clusters: dict[int, bytes],
    *,
    cluster_size: int = MIB,
    version: int = 2,
    order: Sequence[int] | None = None,
) -> Path:
    """A delta written by struct alone: `clusters` maps a cluster's index to its bytes.

    `order`: the indexes in the order of their places in the file (default: shuffled, as on disks
    in use).  Sizes are bytes; `size` is rounded up to whole clusters in the BAT only.
    """
    entries = -(-size // cluster_size)
    header_clusters = -(-(64 + 4 * entries) // cluster_size)
    places = list(clusters) if order is None else list(order)
    if order is None:
        random.Random(size).shuffle(places)
    table = [0] * entries
    unit = 1 if version == 2 else cluster_size // 512
    for position, index in enumerate(places):
        table[index] = (header_clusters + position) * unit
    header = HEADER.pack(
        MAGIC_V2 if version == 2 else MAGIC_V1,
        2,
        16,
        size // 512 // 512,
        cluster_size // 512,
        entries,
        size // 512,
        0,
        header_clusters * cluster_size // 512,
        0,
        0,
    )
    with path.open("wb") as file:
        file.write(header)
        file.write(struct.pack(f"<{entries}I", *table))
        for position, index in enumerate(places):
            file.seek((header_clusters + position) * cluster_size)
            file.write(clusters[index].ljust(cluster_size, b"\0"))
        file.truncate((header_clusters + len(places)) * cluster_size)
    return path


def clusters_of(raw: Path, cluster_size: int) -> dict[int, bytes]:
    """The clusters of a raw file that are not all zeros."""
    found = {}
    with raw.open("rb") as file:
        index = 0
        while block := file.read(cluster_size):
            if any(block):
                found[index] = block
            index += 1
    return found


def write_descriptor(
    directory: Path,
    size: int,
    images: Sequence[tuple[str, str, str]],
    *,
    cluster_size: int = MIB,
    top_guid: str | None = None,
) -> Path:
    """DiskDescriptor.xml for `images` = (GUID, "Compressed" | "Plain", file), base first."""
    sectors = size // 512
    image_nodes = "".join(
        f"<Image><GUID>{guid}</GUID><Type>{kind}</Type><File>{file}</File></Image>"
        for guid, kind, file in images
    )
    parents = [NO_GUID, *(guid for guid, _, _ in images)]
    shots = "".join(
        f"<Shot><GUID>{guid}</GUID><ParentGUID>{parent}</ParentGUID></Shot>"
        for (guid, _, _), parent in zip(images, parents, strict=False)
    )
    top = f"<TopGUID>{top_guid}</TopGUID>" if top_guid else ""
    text = (
        '<?xml version="1.0" encoding="UTF-8"?>\n<Parallels_disk_image Version="1.0">'
        f"<Disk_Parameters><Disk_size>{sectors}</Disk_size><Cylinders>{sectors // 512}</Cylinders>"
        "<Heads>16</Heads><Sectors>32</Sectors><Padding>0</Padding></Disk_Parameters>"
        f"<StorageData><Storage><Start>0</Start><End>{sectors}</End>"
        f"<Blocksize>{cluster_size // 512}</Blocksize><Preallocated>0</Preallocated>"
        f"{image_nodes}</Storage></StorageData><Snapshots>{top}{shots}</Snapshots>"
        "</Parallels_disk_image>\n"
    )
    path = directory / "DiskDescriptor.xml"
    path.write_text(text)
    return path


def guid(number: int) -> str:
    """A GUID that is the same in every run."""
    return "{" + str(uuid.UUID(int=0x1234_5678_0000_4000_8000_0000_0000_0000 + number)) + "}"


def qemu_image(directory: Path, name: str, raw: Path, *options: str) -> Path:
    """`raw` converted by qemu-img to a parallels image."""
    path = directory / name
    extra = [word for option in options for word in ("-o", option)]
    oracles.run("qemu-img", "convert", "-f", "raw", "-O", "parallels", *extra, str(raw), str(path))
    return path


def v2_1m(directory: Path) -> ImageCase:
    raw = make_content(directory / "expected.raw", 64 * MIB, seed=1)
    path = qemu_image(directory, "disk.hds", raw)
    return ImageCase(name="v2-1m", serve=path, raw=raw, layers=[("parallels", path)])


def v2_64k_long_bat(directory: Path) -> ImageCase:
    """64 KiB clusters and a disk of 2 GiB: 32,768 entries, three clusters of header and BAT."""
    size = 2048 * MIB
    raw = directory / "expected.raw"
    generator = random.Random(2)
    clusters = {}
    with raw.open("wb") as file:
        file.truncate(size)
        chosen = [0, 16367, 16368, 32751, 32752, 32767, *generator.sample(range(32768), 60)]
        for index in dict.fromkeys(chosen):
            clusters[index] = generator.randbytes(65536)
            file.seek(index * 65536)
            file.write(clusters[index])
    path = write_delta(directory / "disk.hds", size, clusters, cluster_size=65536)
    return ImageCase(name="v2-64k-long-bat", serve=path, raw=raw, layers=[("parallels", path)])


def v1(directory: Path) -> ImageCase:
    """Version 1 through Debian's `ploop convert -v 1`, or by struct where that is missing."""
    size = 64 * MIB
    raw = make_content(directory / "expected.raw", size, seed=3)
    if oracles.have("ploop"):
        path = write_delta(directory / "disk.hds", size, clusters_of(raw, MIB), version=1)
    else:
        path = qemu_image(directory, "disk.hds", raw)
        descriptor = write_descriptor(directory, size, [(TOP_GUID, "Compressed", path.name)])
        oracles.run("ploop", "convert", "-v", "1", str(descriptor))
        descriptor.unlink()
        (directory / "DiskDescriptor.xml.lck").unlink(missing_ok=True)
    assert path.read_bytes()[:16] == MAGIC_V1
    return ImageCase(name="v1", serve=path, raw=raw, layers=[("parallels", path)])


def chain_of_three(directory: Path) -> ImageCase:
    """Base, middle and top with overlapping clusters, and a DiskDescriptor.xml."""
    size = 64 * MIB
    generator = random.Random(4)
    content = bytearray(size)
    names = ["root.hds", "root.hds.middle", "root.hds.top"]
    for name, chosen in zip(names, (range(40), range(20, 50), range(30, 60, 7)), strict=True):
        clusters = {index: generator.randbytes(MIB) for index in chosen}
        write_delta(directory / name, size, clusters)
        for index, data in clusters.items():
            content[index * MIB : (index + 1) * MIB] = data
    raw = directory / "expected.raw"
    raw.write_bytes(content)
    guids = [guid(1), guid(2), TOP_GUID]
    rows = [(g, "Compressed", n) for g, n in zip(guids, names, strict=True)]
    descriptor = write_descriptor(directory, size, rows)
    layers: list[Layer] = [("parallels", directory / name) for name in names]
    return ImageCase(name="chain-of-three", serve=descriptor, raw=raw, layers=layers)


def raw_base(directory: Path) -> ImageCase:
    """A Plain base under one delta; served by naming the directory."""
    size = 32 * MIB
    base = make_content(directory / "base.raw", size, seed=5, density=0.8)
    generator = random.Random(6)
    clusters = {index: generator.randbytes(MIB) for index in (0, 3, 17, 31)}
    write_delta(directory / "top.hds", size, clusters)
    content = bytearray(base.read_bytes())
    for index, data in clusters.items():
        content[index * MIB : (index + 1) * MIB] = data
    raw = directory / "expected.raw"
    raw.write_bytes(content)
    write_descriptor(
        directory, size, [(guid(1), "Plain", "base.raw"), (TOP_GUID, "Compressed", "top.hds")]
    )
    layers: list[Layer] = [("raw", base), ("parallels", directory / "top.hds")]
    return ImageCase(name="raw-base", serve=directory, raw=raw, layers=layers)


KINDS: dict[str, Callable[[Path], ImageCase]] = {
    "v2-1m": v2_1m,
    "v2-64k-long-bat": v2_64k_long_bat,
    "v1": v1,
    "chain-of-three": chain_of_three,
    "raw-base": raw_base,
}
