"""The Varlink interface description, generated from the message types.

Source: https://varlink.org/Interface-Definition.  Generated, because a description that is written
by hand beside the types ends by contradicting them.
"""

from __future__ import annotations

import types
import typing

import msgspec

from ploopd.control import messages
from ploopd.control.protocol import Failure, error_name
from ploopd.errors import ExitCode

SERVICE_INTERFACE = "org.varlink.service"

SERVICE_DESCRIPTION = """\
# What every Varlink service can say of itself.
interface org.varlink.service

method GetInfo() -> (
  vendor: string,
  product: string,
  version: string,
  url: string,
  interfaces: []string
)

method GetInterfaceDescription(interface: string) -> (description: string)

error InterfaceNotFound (interface: string)

error MethodNotFound (method: string)

error MethodNotImplemented (method: string)

error InvalidParameter (parameter: string)

error PermissionDenied ()

error ExpectedMore ()
"""

_SCALARS: dict[object, str] = {str: "string", int: "int", float: "float", bool: "bool"}


def control_description() -> str:
    """The description of `org.ploopd.Control`, as text."""
    named: dict[str, type[msgspec.Struct]] = {}
    methods = []
    for method in messages.METHODS:
        arguments = _fields(method.parameters, named)
        results = _fields(method.reply, named)
        methods.append(f"# {method.help}\nmethod {method.name}{arguments} -> {results}")
    definitions = _definitions(named)
    failure = _fields(Failure, named)
    names = dict.fromkeys(error_name(code) for code in ExitCode)
    errors = [f"error {name} {failure}" for name in names]
    head = f"# Control of a running ploopd.\ninterface {messages.INTERFACE}"
    return "\n\n".join([head, *definitions, *methods, *errors]) + "\n"


def _definitions(named: dict[str, type[msgspec.Struct]]) -> list[str]:
    """`type` lines for all structures that occur inside messages, however deep."""
    written: dict[str, str] = {}
    while missing := [name for name in named if name not in written]:
        for name in missing:
            written[name] = f"type {name} {_fields(named[name], named)}"
    return list(written.values())


def _fields(struct: type[msgspec.Struct], named: dict[str, type[msgspec.Struct]]) -> str:
    hints = typing.get_type_hints(struct)
    parts = []
    for field in msgspec.structs.fields(struct):
        kind = _type_name(hints[field.name], named)
        if not field.required and not kind.startswith("?"):
            kind = f"?{kind}"
        parts.append(f"{field.name}: {kind}")
    return f"({', '.join(parts)})"


def _type_name(hint: object, named: dict[str, type[msgspec.Struct]]) -> str:
    if hint is typing.Any:
        return "?object"
    if hint in _SCALARS:
        return _SCALARS[hint]
    origin = typing.get_origin(hint)
    arguments = typing.get_args(hint)
    if origin is list:
        return f"[]{_type_name(arguments[0], named)}"
    if origin is dict and arguments[0] is str:
        return f"[string]{_type_name(arguments[1], named)}"
    if origin is types.UnionType and set(arguments) <= _SCALARS.keys():
        return "object"  # one of several scalars: Varlink has no unions
    if origin is types.UnionType and len(arguments) == 2 and arguments[1] is types.NoneType:
        return f"?{_type_name(arguments[0], named)}"
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        named[hint.__name__] = hint
        return hint.__name__
    raise TypeError(f"no Varlink type for {hint!r}")
