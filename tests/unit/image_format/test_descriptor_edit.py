"""One file name of a DiskDescriptor.xml is exchanged, and nothing else."""

from __future__ import annotations

import pytest

from image_format import DescriptorFormatError, parse_descriptor, with_file

GUID = "{11111111-2222-4333-8444-555555555555}"
OTHER = "{99999999-2222-4333-8444-555555555555}"
DOCUMENT = f"""<?xml version="1.0" encoding="UTF-8"?>
<!-- made by hand -->
<Virtuozzo_disk_image Version="1.0" Note="a > b">
  <Disk_Parameters><Disk_size>2048</Disk_size><Miscellaneous><X y='1'/></Miscellaneous>
  </Disk_Parameters>
  <StorageData><Storage><Start>0</Start><End>2048</End><Blocksize>128</Blocksize>
    <Image><GUID>{GUID.upper()}</GUID><Type>Compressed</Type>
      <File> root.hds<!-- the base --> </File><Checksum>root.hds</Checksum></Image>
    <Image><File>t&amp;p.hds</File><GUID>{OTHER}</GUID><Type>Compressed</Type></Image>
  </Storage></StorageData>
  <Snapshots><TopGUID>{OTHER}</TopGUID>
    <Shot><GUID>{GUID}</GUID><ParentGUID>{{00000000-0000-0000-0000-000000000000}}</ParentGUID></Shot>
    <Shot><GUID>{OTHER}</GUID><ParentGUID>{GUID}</ParentGUID><Name>now</Name></Shot>
  </Snapshots>
</Virtuozzo_disk_image>
""".encode()


def test_only_the_name_changes() -> None:
    edited = with_file(DOCUMENT, OTHER, "new & <better>.hds")
    assert edited == DOCUMENT.replace(b"t&amp;p.hds", b"new &amp; &lt;better&gt;.hds")
    names = [image.file for image in parse_descriptor(edited).storages[0].images]
    assert names == ["root.hds", "new & <better>.hds"]


def test_a_name_with_a_comment_inside_is_exchanged_whole() -> None:
    edited = with_file(DOCUMENT, GUID, "root.new")
    assert edited == DOCUMENT.replace(b" root.hds<!-- the base --> ", b"root.new")


def test_the_same_name_changes_nothing() -> None:
    assert with_file(DOCUMENT, OTHER, "t&p.hds") == DOCUMENT


def test_another_encoding_is_written_anew_with_everything_it_says() -> None:
    text = DOCUMENT.decode().replace("UTF-8", "ISO-8859-1").replace("now", "né")
    edited = with_file(text.encode("latin-1"), OTHER, "neu.hds")
    found = parse_descriptor(edited)
    assert [image.file for image in found.storages[0].images] == ["root.hds", "neu.hds"]
    assert found.shots[1].extra[0].text == "né"
    assert found.parameters_extra[0].children[0].attributes == (("y", "1"),)


def test_a_file_name_in_an_unknown_place_is_not_it() -> None:
    decoy = b"<Decoy><Image><GUID>" + OTHER.encode() + b"</GUID><File>no</File></Image></Decoy>"
    document = DOCUMENT.replace(b"<Snapshots>", decoy + b"<Snapshots>")
    edited = with_file(document, OTHER, "new.hds")
    assert decoy in edited
    assert edited == document.replace(b"t&amp;p.hds", b"new.hds")


def test_an_unknown_guid_and_a_broken_document_are_refused() -> None:
    with pytest.raises(DescriptorFormatError, match="no image has this GUID"):
        with_file(DOCUMENT, "{00000000-2222-4333-8444-555555555555}", "new.hds")
    with pytest.raises(DescriptorFormatError):
        with_file(DOCUMENT[:-20], OTHER, "new.hds")
