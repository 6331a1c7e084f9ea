"""DiskDescriptor.xml: chains, round trips, unknown nodes and everything that must be refused."""

from __future__ import annotations

import resource
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from image_format import (
    MAX_DESCRIPTOR_BYTES,
    TOP_GUID,
    ZERO_GUID,
    Descriptor,
    DescriptorFormatError,
    ImageEntry,
    ImageType,
    Shot,
    ShotFlag,
    chain,
    chain_to,
    new_descriptor,
    parse_descriptor,
)


def guid(number: int) -> str:
    return f"{{{number:08x}-0000-0000-0000-000000000000}}"


def image(number: int, kind: ImageType = ImageType.COMPRESSED) -> ImageEntry:
    return ImageEntry(guid=guid(number), type=kind, file=f"d{number}.hds")


def descriptor(*images: ImageEntry) -> Descriptor:
    return new_descriptor(
        size_sectors=20480, cluster_sectors=2048, geometry=(40, 16, 32), images=images
    )


# In the shape that libploop writes, with nodes added that nobody knows.
FROM_LIBPLOOP = b"""<?xml version="1.0"?>
<Parallels_disk_image Version="1.0" Note="keep">
    <Disk_Parameters>
        <Disk_size>131072</Disk_size>
        <Cylinders>128</Cylinders>
        <Heads>16</Heads>
        <Sectors>64</Sectors>
        <Padding>0</Padding>
        <Name a="1" b="&lt;&quot;&amp;">My &lt;disk&gt;</Name>
        <Encryption><KeyId>key-1</KeyId><Engine>x</Engine></Encryption>
    </Disk_Parameters>
    <StorageData>
        <Storage>
            <Start>0</Start>
            <End>131072</End>
            <Blocksize>2048</Blocksize>
            <Preallocated>0</Preallocated>
            <Image>
                <GUID>{5FBAABE3-6958-40ff-92a7-860e329aab41}</GUID>
                <Type>Compressed</Type>
                <File>root.hdd.{0c1b3e63-d7f1-4cc5-9b4f-0e0f4d3e3a4c}</File>
                <Colour>red</Colour>
            </Image>
            <Image>
                <GUID>{704718e1-2314-44c8-9087-d78ed36b0f4e}</GUID>
                <Type>Plain</Type>
                <File>root.hdd</File>
            </Image>
            <Label>L</Label>
        </Storage>
        <Region><Deep><Deeper/></Deep></Region>
    </StorageData>
    <Snapshots>
        <Shot>
            <GUID>{704718e1-2314-44c8-9087-d78ed36b0f4e}</GUID>
            <ParentGUID>{00000000-0000-0000-0000-000000000000}</ParentGUID>
            <Temporary/>
        </Shot>
        <Shot>
            <GUID>{5fbaabe3-6958-40ff-92a7-860e329aab41}</GUID>
            <ParentGUID>{704718e1-2314-44c8-9087-d78ed36b0f4e}</ParentGUID>
            <Comment>hello</Comment>
        </Shot>
        <Journal/>
    </Snapshots>
    <Miscellaneous><CompatLevel>2</CompatLevel></Miscellaneous>
</Parallels_disk_image>
"""


def test_reads_every_field() -> None:
    found = parse_descriptor(FROM_LIBPLOOP)
    assert (found.disk_size_sectors, found.cylinders, found.heads, found.sectors) == (
        131072,
        128,
        16,
        64,
    )
    assert found.key_id == "key-1"
    assert found.top_guid is None
    assert found.top == TOP_GUID
    [storage] = found.storages
    assert (storage.start_sectors, storage.end_sectors) == (0, 131072)
    assert (storage.block_size_sectors, storage.preallocated) == (2048, False)
    assert found.shots[0].flags == {ShotFlag.TEMPORARY}
    assert [(one.type, one.file) for one in chain(found)] == [
        (ImageType.PLAIN, "root.hdd"),
        (ImageType.COMPRESSED, "root.hdd.{0c1b3e63-d7f1-4cc5-9b4f-0e0f4d3e3a4c}"),
    ]
    base = chain_to(found, found.shots[0].guid)
    assert [one.file for one in base] == ["root.hdd"]


def shape(element: ET.Element) -> object:
    """An element as an unordered value."""
    text = (element.text or "").strip().lower()
    children = sorted((shape(child) for child in element), key=repr)
    return element.tag, sorted(element.attrib.items()), text, children


def test_unknown_nodes_survive() -> None:
    again = parse_descriptor(FROM_LIBPLOOP).to_xml()
    assert parse_descriptor(again) == parse_descriptor(FROM_LIBPLOOP)
    # As an independent parser sees it, the document says the same.
    assert shape(ET.fromstring(again)) == shape(ET.fromstring(FROM_LIBPLOOP))


def test_unknown_nodes_survive_a_change() -> None:
    found = parse_descriptor(FROM_LIBPLOOP)
    [storage] = found.storages
    grown = replace(
        found,
        disk_size_sectors=262144,
        storages=(replace(storage, end_sectors=262144),),
        top_guid=TOP_GUID,
    )
    text = grown.to_xml().decode()
    for kept in ("<Colour>red", "<Label>L", "<Deeper/>", "<Comment>hello", "<CompatLevel>2"):
        assert kept in text
    assert "<Disk_size>262144<" in text
    assert f"<TopGUID>{TOP_GUID}<" in text


@pytest.mark.parametrize("root", ["Parallels_disk_image", "Virtuozzo_disk_image", "x"])
def test_the_roots_name_is_ignored_and_written_as_specified(root: str) -> None:
    data = FROM_LIBPLOOP.replace(b"Parallels_disk_image", root.encode())
    assert parse_descriptor(data).to_xml().count(b"Parallels_disk_image") == 2


names = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ufffe\uffff"), min_size=1
).filter(lambda name: name == name.strip())


@given(
    st.integers(1, 1 << 50),
    st.lists(names, min_size=1, max_size=5),
    st.booleans(),
    st.one_of(st.none(), names),
)
def test_round_trip(size: int, files: list[str], raw_base: bool, key: str | None) -> None:
    images = [
        ImageEntry(
            guid=guid(number),
            type=ImageType.PLAIN if raw_base and number == 0 else ImageType.COMPRESSED,
            file=file,
        )
        for number, file in enumerate(files, 1)
    ]
    made = replace(
        new_descriptor(size_sectors=size, cluster_sectors=2048, geometry=(1, 2, 3), images=images),
        key_id=key,
    )
    assert parse_descriptor(made.to_xml()) == made
    assert chain(made) == images


def test_a_lone_image_needs_no_snapshots() -> None:
    alone = replace(descriptor(image(1)), shots=(), top_guid=None)
    assert chain(parse_descriptor(alone.to_xml())) == [image(1)]


def test_128_images_are_a_chain_and_129_are_not() -> None:
    assert len(chain(descriptor(*map(image, range(1, 129))))) == 128
    with pytest.raises(DescriptorFormatError, match="more than 128"):
        chain(descriptor(*map(image, range(1, 130))))


def test_snapshots_beside_the_chain_do_not_matter() -> None:
    made = descriptor(*map(image, range(1, 4)))
    [storage] = made.storages
    branched = replace(
        made,
        storages=(replace(storage, images=(*storage.images, image(9))),),
        shots=(*made.shots, Shot(guid=guid(9), parent=guid(1))),
    )
    assert [one.guid for one in chain(branched)] == [guid(1), guid(2), guid(3)]
    assert [one.guid for one in chain_to(branched, guid(9))] == [guid(1), guid(9)]


def shots(*pairs: tuple[int, int]) -> tuple[Shot, ...]:
    return tuple(Shot(guid=guid(a), parent=guid(b) if b else ZERO_GUID) for a, b in pairs)


THREE = descriptor(*map(image, range(1, 4)))


@pytest.mark.parametrize(
    ("broken", "field", "value"),
    [
        (replace(THREE, shots=shots((1, 3), (2, 1), (3, 2))), "ParentGUID", guid(3)),
        (replace(THREE, shots=shots((1, 0), (2, 1), (3, 3))), "ParentGUID", guid(3)),
        (replace(THREE, shots=shots((1, 7), (2, 1), (3, 2))), "ParentGUID", guid(7)),
        (replace(THREE, top_guid=guid(7)), "TopGUID", guid(7)),
        (replace(THREE, top_guid=None), "TopGUID", TOP_GUID),
        (replace(THREE, shots=shots((1, 0), (2, 1))), "Image GUID", guid(3)),
        (replace(THREE, shots=()), "Image GUID", guid(1)),
        (replace(THREE, shots=(*THREE.shots, *shots((8, 1)))), "Shot GUID", guid(8)),
        (replace(THREE, storages=THREE.storages * 2), "Storage", 2),
        (descriptor(image(1), image(2, ImageType.PLAIN)), "Type", "Plain"),
    ],
)
def test_contradictory_chains(broken: Descriptor, field: str, value: object) -> None:
    with pytest.raises(DescriptorFormatError) as caught:
        chain(broken, file="vm/DiskDescriptor.xml")
    assert (caught.value.field, caught.value.value) == (field, value)
    assert caught.value.file == "vm/DiskDescriptor.xml"


def test_linked_clones_are_refused() -> None:
    data = FROM_LIBPLOOP.replace(b"<Region>", b"<Volume/><Region>")
    with pytest.raises(DescriptorFormatError, match="linked clone"):
        chain(parse_descriptor(data))


def change(old: bytes, new: bytes) -> bytes:
    assert old in FROM_LIBPLOOP
    return FROM_LIBPLOOP.replace(old, new, 1)


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (change(b"<Disk_size>131072</Disk_size>", b""), "Disk_size"),
        (change(b"<Disk_size>131072", b"<Disk_size>0"), "Disk_size"),
        (change(b"<Disk_size>131072", b"<Disk_size>-5"), "Disk_size"),
        (change(b"<Disk_size>131072", b"<Disk_size>12 34"), "Disk_size"),
        (change(b"<Disk_size>131072", b"<Disk_size>" + b"9" * 20), "Disk_size"),
        (change(b"<Disk_size>", b"<Disk_size>1</Disk_size><Disk_size>"), "Disk_size"),
        (change(b"<Padding>0", b"<Padding>1"), "Padding"),
        (change(b"<Blocksize>2048", b"<Blocksize>"), "Blocksize"),
        (change(b"<Type>Plain", b"<Type>Qcow"), "Type"),
        (change(b"<File>root.hdd<", b"<File> <"), "File"),
        (change(b"{704718e1", b"{704718e"), "GUID"),
        (change(b"{704718e1-2314-44c8-9087-d78ed36b0f4e}", b"x"), "GUID"),
        (change(b"{704718e1-2314-44c8-9087-d78ed36b0f4e}", TOP_GUID.encode()), "Image GUID"),
        (
            change(b"<StorageData>", b"<Other>").replace(b"</StorageData>", b"</Other>"),
            "StorageData",
        ),
        (change(b"</Storage>", b"</Storage><Storage></Storage>"), "Image"),
        (b"", "line"),
        (b"<a", "line"),
        (b"\xff\xfe\x00", "line"),
        (b"<a>\xff</a>", "line"),
        (b"<a></b>", "line"),
        (b"<a/><b/>", "line"),
        (b"<a>&unknown;</a>", "line"),
        (b'<?xml version="1.0" encoding="nonsense"?><a/>', None),
    ],
)
def test_broken_documents(data: bytes, field: str | None) -> None:
    with pytest.raises(DescriptorFormatError) as caught:
        parse_descriptor(data, file="DiskDescriptor.xml")
    assert "DiskDescriptor.xml" in str(caught.value)
    if field is not None:
        assert caught.value.field == field


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"<!DOCTYPE a><a/>", "DOCTYPE"),
        (b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><a/>', "DOCTYPE"),
        (b'<!DOCTYPE a [<!ENTITY x "xxxx"><!ENTITY y "&x;&x;">]><a>&y;</a>', "DOCTYPE"),
        (b'<?xml-stylesheet href="x"?><a/>', "instruction"),
        (b"<a><?php x ?></a>", "instruction"),
        (b"<a>" * 17 + b"</a>" * 17, "element"),
        (b"<a>" * 100_000, "element"),
    ],
)
def test_dangerous_documents(data: bytes, field: str) -> None:
    with pytest.raises(DescriptorFormatError) as caught:
        parse_descriptor(data)
    assert caught.value.field == field


def test_large_documents_are_refused_by_their_size() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DescriptorFormatError) as caught:
        parse_descriptor(bytes(MAX_DESCRIPTOR_BYTES + 1))
    assert caught.value.field == "length"
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 8 << 10
    assert parse_descriptor(FROM_LIBPLOOP.ljust(MAX_DESCRIPTOR_BYTES)) is not None


@settings(max_examples=200)
@given(st.data())
def test_mutated_documents_give_format_errors_only(data: st.DataObject) -> None:
    text = bytearray(FROM_LIBPLOOP)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text) - 1))
        text[start : start + data.draw(st.integers(0, 30))] = data.draw(st.binary(max_size=8))
    refusal(bytes(text))


def refusal(data: bytes) -> DescriptorFormatError | None:
    try:
        found = parse_descriptor(data)
        chain(found)
    except DescriptorFormatError as error:
        return error
    assert parse_descriptor(found.to_xml()) == found
    return None
