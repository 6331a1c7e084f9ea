"""From the configuration of devices to their names, their LUNs and what each part needs of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ploopd.config import DeviceConfig
from ploopd.control.automation import RecoveryPolicy
from ploopd.device_table import device_name, unique_name
from ploopd.devices import DeviceOptions
from ploopd.fileio.policy import CacheMode
from ploopd.gate.limits import ParkLimits
from ploopd.storage.journaling import JournalMode
from ploopd.storage.opener import OpenOptions


def device_options(config: DeviceConfig) -> DeviceOptions:
    """What a device needs of its configuration."""
    return DeviceOptions(
        open=OpenOptions(
            read_only=config.read_only,
            cache=CacheMode(config.cache),
            io=config.io,
            image_root=config.image_root,
        ),
        write_cache=config.write_cache,
        physical_block_size=config.physical_block_size,
        standby=config.standby,
        limits=ParkLimits(park_max=config.park_max),
        extra_standby_errnos=config.extra_standby_errnos,
        journal=JournalMode(config.journal),
        journal_size=config.journal_size,
    )


def recovery_policy(config: DeviceConfig) -> RecoveryPolicy:
    """How a device comes back from standby."""
    return RecoveryPolicy(
        mode=config.recovery,
        candidates=config.candidates,
        command=config.recovery_command or (),
        delay=config.recovery_delay,
        delay_max=config.recovery_delay_max,
        timeout=config.recovery_timeout,
    )


def device_names(configs: Sequence[DeviceConfig], taken: Collection[str] = ()) -> list[str]:
    """The configured name of each device, or one made from the file that no other device has."""
    used = {*taken, *(config.name for config in configs if config.name is not None)}
    names = []
    for config in configs:
        name = config.name or unique_name(device_name(config.image), used)
        used.add(name)
        names.append(name)
    return names


def device_luns(configs: Sequence[DeviceConfig], taken: Collection[int] = ()) -> list[int]:
    """The configured LUN of each device, or the lowest number that no other device has."""
    used = {*taken, *(config.lun for config in configs if config.lun is not None)}
    luns = []
    for config in configs:
        lun = config.lun
        if lun is None:
            lun = next(number for number in range(len(used) + 1) if number not in used)
        used.add(lun)
        luns.append(lun)
    return luns
