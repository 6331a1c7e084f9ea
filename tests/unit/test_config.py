"""The values that a daemon is configured with: what is refused, and the names devices get."""

from __future__ import annotations

import pytest

from ploopd.config import DeviceConfig, ServeConfig
from ploopd.device_settings import device_luns, device_names
from ploopd.errors import PloopError
from ploopd.frontends.iscsi.config import IscsiConfig


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "a/b"}, "name"),
        ({"name": ""}, "name"),
        ({"journal_size": 4096}, "journal_size"),
        ({"recovery": "command"}, "recovery"),
        ({"recovery_command": ("/bin/true",)}, "recovery"),
        ({"candidates": ("/b",)}, "candidates"),
    ],
)
def test_a_device_that_makes_no_sense_is_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(PloopError, match=text):
        DeviceConfig(image="/a", **options).check()  # type: ignore[arg-type]


def test_devices_must_agree_on_the_engine_and_not_on_names() -> None:
    def check(*devices: DeviceConfig) -> ServeConfig:
        config = ServeConfig(devices=devices, iscsi=IscsiConfig())
        config.check()
        return config

    with pytest.raises(PloopError, match="io_uring and threads"):
        check(DeviceConfig(image="/a", io="threads"), DeviceConfig(image="/b", io="io_uring"))
    with pytest.raises(PloopError, match="two devices"):
        check(DeviceConfig(image="/a", name="d"), DeviceConfig(image="/b", name="d"))
    mixed = check(DeviceConfig(image="/a", io="inline"), DeviceConfig(image="/b", io="threads"))
    assert mixed.engine == "threads"
    assert check(DeviceConfig(image="/a", io="inline")).engine == "auto"


def test_a_configured_name_is_never_taken_by_one_that_is_made() -> None:
    configs = [
        DeviceConfig(image="/x/disk.hds"),
        DeviceConfig(image="/y/disk.hds"),
        DeviceConfig(image="/z/other.hds", name="disk"),
    ]
    assert device_names(configs) == ["disk-2", "disk-3", "disk"]


def test_luns_are_the_configured_ones_and_the_lowest_others() -> None:
    configs = [
        DeviceConfig(image="/a"),
        DeviceConfig(image="/b", lun=0),
        DeviceConfig(image="/c", lun=7),
        DeviceConfig(image="/d"),
    ]
    assert device_luns(configs) == [1, 0, 7, 2]
    assert device_luns(configs[:1] + configs[3:], taken={0, 2}) == [1, 3]
    twice = (DeviceConfig(image="/a", lun=3), DeviceConfig(image="/b", lun=3))
    with pytest.raises(PloopError, match="two devices have that lun"):
        ServeConfig(devices=twice, iscsi=IscsiConfig()).check()
