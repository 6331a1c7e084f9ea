"""The D-Bus objects by which targetcli finds the handler: introspection, properties, what to ask.

targetcli's side of the interface `org.kernel.TCMUService1` is that of tcmu-runner: a handler is an
object whose last path element is its subtype; `CheckConfig` is asked before a backstore is made;
`ChangeMedium` is what `changemedium` calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ploopd.frontends.tcmu.names import SUBTYPE

INTERFACE: Final = "org.kernel.TCMUService1"
BUS_NAME: Final = "org.kernel.TCMUService1"
ROOT: Final = "/org/kernel/TCMUService1"
HANDLER: Final = f"{ROOT}/{SUBTYPE}"
MANAGER_INTERFACE: Final = "org.kernel.TCMUService1.HandlerManager1"
MANAGER_PATH: Final = f"{ROOT}/HandlerManager1"
REGISTERED_NAME: Final = f"{MANAGER_INTERFACE}.{SUBTYPE}"
REGISTERED_HANDLER: Final = f"{MANAGER_PATH}/{SUBTYPE}"

OBJECT_MANAGER: Final = "org.freedesktop.DBus.ObjectManager"
PROPERTIES: Final = "org.freedesktop.DBus.Properties"
INTROSPECTABLE: Final = "org.freedesktop.DBus.Introspectable"
PEER: Final = "org.freedesktop.DBus.Peer"

CONFIG_DESCRIPTION: Final = """\
NAME or /PATH: a device of ploopd by its name, or an image (delta, raw file, DiskDescriptor.xml or \
the directory that has one) by its absolute path, odd characters written as %XX. size= is the size \
of the disk; `ploopctl image info` tells it."""

_STANDARD: Final = """\
  <interface name="org.freedesktop.DBus.Introspectable">
    <method name="Introspect"><arg name="xml" type="s" direction="out"/></method>
  </interface>
  <interface name="org.freedesktop.DBus.Peer"><method name="Ping"/></interface>
  <interface name="org.freedesktop.DBus.Properties">
    <method name="Get">
      <arg name="interface" type="s" direction="in"/>
      <arg name="name" type="s" direction="in"/>
      <arg name="value" type="v" direction="out"/>
    </method>
    <method name="GetAll">
      <arg name="interface" type="s" direction="in"/>
      <arg name="properties" type="a{sv}" direction="out"/>
    </method>
  </interface>
"""
_MANAGER: Final = """\
  <interface name="org.freedesktop.DBus.ObjectManager">
    <method name="GetManagedObjects">
      <arg name="objects" type="a{oa{sa{sv}}}" direction="out"/>
    </method>
  </interface>
"""
_HANDLER: Final = """\
  <interface name="org.kernel.TCMUService1">
    <method name="CheckConfig">
      <arg name="cfgstring" type="s" direction="in"/>
      <arg name="ok" type="b" direction="out"/>
      <arg name="reason" type="s" direction="out"/>
    </method>
    <method name="ChangeMedium">
      <arg name="backstore" type="s" direction="in"/>
      <arg name="size" type="t" direction="in"/>
      <arg name="cfgstring" type="s" direction="in"/>
      <arg name="error" type="i" direction="out"/>
      <arg name="reason" type="s" direction="out"/>
    </method>
    <property name="ConfigDesc" type="s" access="read"/>
  </interface>
"""

Variant = tuple[str, object]


@dataclass(frozen=True, slots=True)
class Reply:
    """A method's return: D-Bus signature and values."""

    signature: str = ""
    body: tuple[object, ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """A method's error: `org.freedesktop.DBus.Error.…` and a sentence."""

    name: str
    message: str


def _unknown(what: str) -> Failure:
    return Failure(f"org.freedesktop.DBus.Error.Unknown{what.capitalize()}", f"no such {what}")


def standard_answer(
    path: str, interface: str | None, member: str, body: tuple[object, ...]
) -> Reply | Failure | None:
    """The answer to a call of one of the standard interfaces; None for one of the handler's own
    methods on a handler's path.  An unknown path, interface or method is a Failure."""
    handler = path in (HANDLER, REGISTERED_HANDLER)
    if not handler and not (path == ROOT or ROOT.startswith(path.rstrip("/") + "/")):
        return _unknown("object")
    match interface, member:
        case ((None | "org.freedesktop.DBus.Introspectable"), "Introspect"):
            return Reply("s", (_introspection(path),))
        case ((None | "org.freedesktop.DBus.Peer"), "Ping"):
            return Reply()
        case ((None | "org.freedesktop.DBus.ObjectManager"), "GetManagedObjects") if path == ROOT:
            objects = {HANDLER: {INTERFACE: _properties(INTERFACE)}}
            return Reply("a{oa{sa{sv}}}", (objects,))
        case ((None | "org.freedesktop.DBus.Properties"), "GetAll") if len(body) == 1:
            return Reply("a{sv}", (_properties(str(body[0])) if handler else {},))
        case ((None | "org.freedesktop.DBus.Properties"), "Get") if len(body) == 2:
            value = _properties(str(body[0])).get(str(body[1])) if handler else None
            return _unknown("property") if value is None else Reply("v", (value,))
        case ((None | "org.kernel.TCMUService1"), ("CheckConfig" | "ChangeMedium")) if handler:
            return None
        case _:
            return _unknown("method")


def _properties(interface: str) -> dict[str, Variant]:
    return {"ConfigDesc": ("s", CONFIG_DESCRIPTION)} if interface == INTERFACE else {}


def _introspection(path: str) -> str:
    children = []
    content = _STANDARD
    if path in (HANDLER, REGISTERED_HANDLER):
        content += _HANDLER
    elif path == ROOT:
        content += _MANAGER
        children = [SUBTYPE]
    else:
        children = [ROOT.removeprefix(path.rstrip("/") + "/").split("/", 1)[0]]
    nodes = "".join(f'  <node name="{child}"/>\n' for child in children)
    return (
        '<!DOCTYPE node PUBLIC "-//freedesktop//DTD D-BUS Object Introspection 1.0//EN"\n'
        ' "http://www.freedesktop.org/standards/dbus/1.0/introspect.dtd">\n'
        f"<node>\n{content}{nodes}</node>\n"
    )
