"""Kernel names and configuration strings."""

from __future__ import annotations

import os
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ploopd.errors import UsageError
from ploopd.frontends.tcmu.names import (
    Reference,
    format_config,
    parse_config,
    parse_kernel_name,
)


def test_the_parts_of_a_kernel_name() -> None:
    name = parse_kernel_name("tcm-user/3/web/ploop//vz/a b/disk.hds")
    assert name is not None
    assert (name.subtype, name.config, name.configfs) == ("ploop", "/vz/a b/disk.hds", "user_3/web")


@pytest.mark.parametrize("name", ["", "uio_pci", "tcm-user/0/x", "tcm-users/0/x/ploop/y"])
def test_other_names_are_not_ours(name: str) -> None:
    assert parse_kernel_name(name) is None


def test_a_longer_subtype_is_another_one() -> None:
    name = parse_kernel_name("tcm-user/0/x/ploopy/disk")
    assert name is not None
    assert name.subtype == "ploopy"


def test_a_device_or_an_image() -> None:
    assert parse_config("web-1") == Reference(device="web-1")
    assert parse_config("/vz/100/root.hdd") == Reference(image="/vz/100/root.hdd")
    assert parse_config("/vz/my%20disk%2C1.hds") == Reference(image="/vz/my disk,1.hds")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("", "names nothing"),
        ("/vz/a b", "character ' '"),
        ("/vz/a,b", "character ','"),
        ("/vz/a:b", "character ':'"),
        ("/vz/a\nb", r"character '\\n'"),
        ("/vz/" + "x" * 300, "longer than 255"),
        ("/vz/../etc/passwd", r"`\.\.`"),
        ("/vz/%2e%2e/etc/passwd", r"`\.\.`"),
        ("/vz/%2", "two hexadecimal digits"),
        ("/vz/%00", "null byte"),
        ("vz/disk", "neither a device's name nor an absolute path"),
        ("-disk", "neither"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(config: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        parse_config(config)
    assert caught.value.hint


@given(path=st.binary(min_size=1, max_size=120))
def test_every_path_has_a_configuration_string(path: bytes) -> None:
    image = os.path.normpath("/" + os.fsdecode(path.replace(b"\0", b"")))
    if image.startswith("//"):
        image = image[1:]
    if len(quote(os.fsencode(image), safe="/._-+@~")) > 249:
        with pytest.raises(UsageError, match="longer"):
            format_config(Reference(image=image))
        return
    config = format_config(Reference(image=image))
    assert parse_config(config) == Reference(image=image)
    assert not set(config) & set(" ,:\n\t")
