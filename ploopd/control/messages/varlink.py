"""What every Varlink service answers about itself: `org.varlink.service`.

No `Message`s: a field that is unknown is ignored.
"""

from __future__ import annotations

import msgspec


class ServiceInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The reply of `org.varlink.service.GetInfo`."""

    vendor: str
    product: str
    version: str
    url: str
    interfaces: list[str]


class InterfaceName(msgspec.Struct, frozen=True, kw_only=True):
    interface: str


class InterfaceDescription(msgspec.Struct, frozen=True, kw_only=True):
    description: str
