"""INQUIRY: standard data and every VPD page, with libiscsi's rules and Linux' expectations."""

from __future__ import annotations

import struct
import uuid

import pytest

from ploopd.scsi.inquiry import Identity, relative_port
from tests.unit.scsi.harness import IDENTITY, INITIATOR, TARGET, cdb, make_bench


def page(code: int, **bench: object) -> bytes:
    host = make_bench(**bench).login()  # type: ignore[arg-type]
    data = host.good(cdb(f"12 01 {code:02x} 02 00"))
    assert data[0] == 0
    assert data[1] == code
    assert struct.unpack_from(">H", data, 2)[0] == len(data) - 4
    return data


def test_standard_data() -> None:
    host = make_bench().login()
    data = host.good(cdb("12 00 00 02 00"))
    assert len(data) == 96
    assert data[:8].hex(" ") == "00 00 06 02 5b 00 00 02"
    assert data[8:36] == b"PLOOPD  PLOOP DISK      0001"
    assert struct.unpack_from(">4H", data, 58) == (0x00A0, 0x0960, 0x0460, 0x04C0)
    assert not any(data[66:])


@pytest.mark.parametrize("length", [0, 1, 5, 36, 96, 255, 512])
def test_allocation_length_truncates(length: int) -> None:
    host = make_bench().login()
    whole = host.good(cdb("12 00 00 02 00"))
    assert host.good(bytes([0x12, 0, 0]) + length.to_bytes(2, "big") + bytes(11)) == whole[:length]


def test_page_code_without_evpd() -> None:
    answer = make_bench().login().send(cdb("12 00 83 00 ff"))
    assert answer.sense == (5, 0x2400)
    assert answer.pointer == (2, None)


def test_unknown_page() -> None:
    answer = make_bench().login().send(cdb("12 01 b3 00 ff"))
    assert answer.sense == (5, 0x2400)
    assert answer.pointer == (2, None)


def test_supported_pages_are_sorted_and_readable() -> None:
    host = make_bench().login()
    codes = list(host.good(cdb("12 01 00 00 ff"))[4:])
    assert codes == sorted(set(codes)) == [0x00, 0x80, 0x83, 0x86, 0xB0, 0xB1, 0xB2]
    for code in codes:
        assert host.good(cdb(f"12 01 {code:02x} 00 ff"))[1] == code
    for code in set(range(256)) - set(codes):
        assert host.send(cdb(f"12 01 {code:02x} 00 ff")).status == 2


def test_serial_number_is_the_uuid() -> None:
    assert page(0x80)[4:] == IDENTITY.hex.encode()


def designators(data: bytes) -> list[tuple[int, int, int, int, bytes]]:
    """(protocol or None as 0, code set, association, type, value) of page 83h."""
    found, at = [], 4
    while at < len(data):
        code, flags, _, length = data[at : at + 4]
        found.append(
            (code >> 4, code & 15, flags >> 4 & 3, flags & 15, data[at + 4 : at + 4 + length])
        )
        assert bool(flags & 0x80) == (found[-1][2] != 0), "PIV with target designators only"
        at += 4 + length
    assert at == len(data)
    return found


def test_device_identification() -> None:
    naa, t10, port, name, device = designators(page(0x83))
    assert naa[:4] == (0, 1, 0, 3)
    assert len(naa[4]) == 8
    assert naa[4][0] >> 4 == 3
    assert t10[:4] == (0, 2, 0, 1)
    assert t10[4] == b"PLOOPD  PLOOP DISK      " + IDENTITY.hex.encode()
    assert port == (5, 1, 1, 4, b"\0\0\0\x01")
    assert name[:4] == (5, 3, 1, 8)
    assert name[4].rstrip(b"\0").decode() == f"{TARGET},t,0x0001"
    assert device[:4] == (5, 3, 2, 8)
    assert device[4].rstrip(b"\0").decode() == TARGET
    for text in (name[4], device[4]):
        assert len(text) % 4 == 0
        assert text.endswith(b"\0")


def test_paths_agree_on_the_unit_and_differ_in_the_port() -> None:
    bench = make_bench()
    one = bench.login()
    other = bench.login(INITIATOR, f"{TARGET},t,0x0007")
    first = designators(one.good(cdb("12 01 83 02 00")))
    second = designators(other.good(cdb("12 01 83 02 00")))
    assert first[:2] == second[:2]
    assert first[2][4] == b"\0\0\0\x01"
    assert second[2][4] == b"\0\0\0\x07"


def test_naa_depends_on_the_whole_uuid() -> None:
    def naa(identity: uuid.UUID) -> bytes:
        return Identity(identity=identity, serial="s", vendor="v", product="p", revision="r").naa

    values = {naa(uuid.UUID(int=IDENTITY.int ^ 1 << bit)) for bit in range(128)}
    assert len(values) == 128
    assert naa(IDENTITY) == naa(uuid.UUID(IDENTITY.hex))


def test_relative_port() -> None:
    assert relative_port("iqn.2026-11.x:y,t,0x00ff") == 255
    assert relative_port("iqn.2026-11.x:y,t,0x0000") == 1
    assert relative_port("naa.5000") == 1


@pytest.mark.parametrize("field", ["vendor", "product", "revision", "serial"])
@pytest.mark.parametrize("text", ["x" * 201, "ä", "a\n"])
def test_identity_texts_are_checked(field: str, text: str) -> None:
    values = {"vendor": "v", "product": "p", "revision": "r", "serial": "s", field: text}
    with pytest.raises(ValueError, match=field):
        Identity(identity=IDENTITY, **values)


def test_extended_inquiry() -> None:
    data = page(0x86)
    assert len(data) == 64
    assert data[5] == 0x07
    assert data[6] & 1


def test_block_limits() -> None:
    data = page(0xB0, cluster_size=1 << 20)
    assert len(data) == 64
    fields = struct.unpack_from(">BBHIIIIIIIQ", data, 4)
    assert fields == (1, 128, 8, 16384, 2048, 0, 1 << 20, 256, 2048, 1 << 31, 1 << 15)
    assert not any(data[44:])


def test_unmap_limits_follow_libiscsi() -> None:
    data = page(0xB0)
    count, descriptors = struct.unpack_from(">II", data, 20)
    assert 8 <= count <= 1 << 20
    assert 256 <= descriptors <= 1 << 20


def test_block_characteristics() -> None:
    data = page(0xB1)
    assert len(data) == 64
    assert struct.unpack_from(">H", data, 4) == (1,)
    assert data[8] == 0x02


def test_provisioning() -> None:
    assert page(0xB2)[4:] == bytes([0, 0xE4, 2, 0])


def test_fully_provisioned_unit() -> None:
    assert page(0xB2, thin=False)[4:] == bytes(4)
    data = page(0xB0, thin=False)
    assert struct.unpack_from(">IIII", data, 20) == (0, 0, 0, 0)
