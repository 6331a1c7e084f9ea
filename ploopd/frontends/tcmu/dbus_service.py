"""The handler on the system bus, for targetcli's `/backstores/user:ploop`.

Alone it owns tcmu-runner's bus name and lists itself; beside a running tcmu-runner it registers
with that.  When the one that has the name goes away, it takes the name.  Without a bus, or without
the right to own a name on it, nothing is missing but the node in targetcli.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Coroutine
from typing import Protocol

import trio
from jeepney import (
    DBusAddress,
    HeaderFields,
    MatchRule,
    Message,
    MessageFlag,
    MessageType,
    new_error,
    new_method_call,
    new_method_return,
)
from jeepney.bus_messages import DBusNameFlags, message_bus
from jeepney.io.trio import DBusConnection, open_dbus_connection

from ploopd.errors import PloopError, UsageError
from ploopd.frontends.tcmu.dbus_objects import (
    BUS_NAME,
    CONFIG_DESCRIPTION,
    MANAGER_INTERFACE,
    MANAGER_PATH,
    REGISTERED_NAME,
    Failure,
    standard_answer,
)
from ploopd.frontends.tcmu.names import SUBTYPE, Reference, parse_config

RETRY_SECONDS = 30.0
"""Between attempts to reach a bus that is not there or has gone."""

CALL_SECONDS = 20.0
"""For a question to be answered; targetcli waits 25 s."""

_OWNER = 1
_ALREADY_OWNER = 4

log = logging.getLogger(__name__)


class Backstores(Protocol):
    """Who answers targetcli's questions (the daemon)."""

    def another_handler(self, there: bool) -> None:
        """Another program, tcmu-runner, is the handler on the bus, or is not (any more)."""
        ...

    async def check(self, reference: Reference) -> None:
        """Raises PloopError, whose text is shown, if `reference` cannot be served."""
        ...

    async def change_medium(self, backstore: str, reference: Reference, size: int) -> None:
        """Serve another image under the backstore called so.  Raises PloopError."""
        ...


class BusService:
    """`serve` keeps the handler on the bus for as long as it runs."""

    def __init__(self, backstores: Backstores, *, bus: str = "SYSTEM") -> None:
        self._backstores = backstores
        self._bus = bus
        self._connection: DBusConnection
        self._waiting: dict[int, list[Message]] = {}
        self._arrived: dict[int, trio.Event] = {}
        self._owner = False

    async def serve(self) -> None:
        """Until cancelled; a bus that is not there, or goes away, is looked for again."""
        told = ""
        while True:
            try:
                self._connection = await open_dbus_connection(self._bus)
            except (OSError, KeyError, ValueError, trio.BrokenResourceError) as error:
                if told != str(error):
                    told = str(error)
                    log.info("event=dbus-absent reason=%r", told)
                await trio.sleep(RETRY_SECONDS)
                continue
            try:
                await self._on_the_bus()
            except* (trio.BrokenResourceError, trio.EndOfChannel, trio.ClosedResourceError):
                log.warning("event=dbus-lost")
            finally:
                await self._connection.aclose()
            await trio.sleep(1)

    async def _on_the_bus(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive, nursery)
            await self._call(message_bus.AddMatch(_owner_changed()))
            await self._appear()

    # -- names -----------------------------------------------------------------------------

    async def _appear(self) -> None:
        """Own tcmu-runner's name, or register with whoever owns it."""
        reply = await self._call(message_bus.RequestName(BUS_NAME, DBusNameFlags.do_not_queue))
        if reply is None:
            return
        self._owner = reply.body[0] in (_OWNER, _ALREADY_OWNER)
        self._backstores.another_handler(not self._owner)
        if self._owner:
            log.info("event=dbus-name name=%s", BUS_NAME)
            return
        log.warning(
            "event=dbus-second name=%s note=%r",
            BUS_NAME,
            "tcmu-runner is running: registering with it; use one of the two",
        )
        await self._call(message_bus.RequestName(REGISTERED_NAME, DBusNameFlags.do_not_queue))
        manager = DBusAddress(MANAGER_PATH, bus_name=BUS_NAME, interface=MANAGER_INTERFACE)
        call = new_method_call(manager, "RegisterHandler", "ss", (SUBTYPE, CONFIG_DESCRIPTION))
        reply = await self._call(call)
        if reply is not None:
            log.info("event=dbus-registered ok=%s reason=%r", *reply.body)

    # -- messages --------------------------------------------------------------------------

    async def _call(self, message: Message) -> Message | None:
        """The reply; None, logged, if it is an error or does not come."""
        serial = next(self._connection.outgoing_serial)
        self._arrived[serial] = arrived = trio.Event()
        message.header.flags |= MessageFlag.no_auto_start
        await self._connection.send(message, serial=serial)
        with trio.move_on_after(CALL_SECONDS):
            await arrived.wait()
        del self._arrived[serial]
        replies = self._waiting.pop(serial, [])
        member = message.header.fields.get(HeaderFields.member)
        if not replies:
            log.warning("event=dbus-no-reply call=%s", member)
            return None
        if replies[0].header.message_type is MessageType.error:
            log.warning("event=dbus-error call=%s error=%r", member, replies[0].body)
            return None
        return replies[0]

    async def _receive(self, nursery: trio.Nursery) -> None:
        while True:
            message = await self._connection.receive()
            header = message.header
            match header.message_type:
                case MessageType.method_call:
                    nursery.start_soon(self._answer, message)
                case MessageType.method_return | MessageType.error:
                    serial = header.fields.get(HeaderFields.reply_serial)
                    if serial in self._arrived:
                        self._waiting.setdefault(serial, []).append(message)
                        self._arrived[serial].set()
                case MessageType.signal:
                    if self._name_left(message):
                        nursery.start_soon(self._appear)

    def _name_left(self, message: Message) -> bool:
        """Does the signal say that the bus name has another owner, or none, who is not us?"""
        fields = message.header.fields
        if fields.get(HeaderFields.member) != "NameOwnerChanged" or len(message.body) != 3:
            return False
        name, _, new = message.body
        return bool(name == BUS_NAME and new != self._connection.unique_name)

    async def _answer(self, message: Message) -> None:
        fields = message.header.fields
        path = str(fields.get(HeaderFields.path, "/"))
        member = str(fields.get(HeaderFields.member, ""))
        interface = fields.get(HeaderFields.interface)
        answer = standard_answer(path, interface, member, tuple(message.body))
        if answer is None:
            signature = fields.get(HeaderFields.signature, "")
            reply = await self._ask(message, member, signature)
        elif isinstance(answer, Failure):
            reply = new_error(message, answer.name, "s", (answer.message,))
        else:
            reply = new_method_return(message, answer.signature or None, answer.body)
        if not message.header.flags & MessageFlag.no_reply_expected:
            await self._connection.send(reply)

    async def _ask(self, message: Message, member: str, signature: str) -> Message:
        """The handler's own methods."""
        wanted = {"CheckConfig": "s", "ChangeMedium": "sts"}[member]
        if signature != wanted:
            name = "org.freedesktop.DBus.Error.InvalidArgs"
            return new_error(message, name, "s", (f"{member} takes {wanted}",))
        if member == "CheckConfig":
            reason = await self._reason(self._check(message.body[0]))
            log.info("event=check-config cfgstring=%r reason=%r", message.body[0], reason)
            return new_method_return(message, "bs", (not reason, reason))
        backstore, size, config = message.body
        reason = await self._reason(self._change_medium(backstore, size, config))
        log.info("event=change-medium backstore=%s reason=%r", backstore, reason)
        return new_method_return(message, "is", (errno.EINVAL if reason else 0, reason))

    async def _reason(self, question: Coroutine[object, object, None]) -> str:
        """Why not; empty for yes."""
        try:
            with trio.fail_after(CALL_SECONDS):
                await question
        except PloopError as error:
            return str(error)
        except trio.TooSlowError:
            return f"the storage has not answered within {CALL_SECONDS:g} s"
        return ""

    async def _check(self, config: str) -> None:
        await self._backstores.check(_reference(config))

    async def _change_medium(self, backstore: str, size: int, config: str) -> None:
        await self._backstores.change_medium(backstore, _reference(config), size)


def _reference(config: str) -> Reference:
    subtype, _, rest = config.partition("/")
    if subtype != SUBTYPE:
        raise UsageError(f"does not begin with {SUBTYPE}/", field="cfgstring", value=config)
    return parse_config(rest)


def _owner_changed() -> MatchRule:
    rule = MatchRule(
        type="signal",
        sender="org.freedesktop.DBus",
        interface="org.freedesktop.DBus",
        member="NameOwnerChanged",
    )
    rule.add_arg_condition(0, BUS_NAME)
    return rule
