"""Events for subscribers: history, followers, and what a slow one loses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest
import trio

from ploopd.control import event_log, messages
from ploopd.control.client import ControlClient
from ploopd.control.context import ControlContext
from ploopd.control.event_log import EventLog
from ploopd.control.handlers import events
from ploopd.control.listener import claim_control_socket
from ploopd.control.protocol import Call, FrameReader, decode_reply, encode, encode_parameters
from ploopd.control.server import ControlServer
from ploopd.errors import BusyError, NotFoundError
from ploopd.gate.events import Event, EventBus, EventKind

INFO = messages.ServiceInfo(vendor="", product="", version="", url="", interfaces=[])


def publish(bus: EventBus, count: int, device: str = "a", **details: str | int | float) -> None:
    for number in range(count):
        bus.publish(
            Event(
                kind=EventKind.PARKED,
                device=device,
                time=0.0,
                details={"number": number, **details},
            )
        )


def numbers(found: list[messages.DeviceEvent]) -> list[object]:
    return [event.details["number"] for event in found]


def test_the_history_keeps_the_newest_and_can_be_of_one_device() -> None:
    bus = EventBus()
    log = EventLog(bus, wall_clock=lambda: 1000.5, capacity=10)
    publish(bus, 8)
    publish(bus, 4, device="b")
    assert numbers(log.history()) == [2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert numbers(log.history("b")) == [0, 1, 2, 3]
    last = log.history()[-1]
    assert (last.sequence, last.time, last.event, last.device) == (12, 1000.5, "parked", "b")


@pytest.mark.trio
async def test_a_follower_gets_its_events_and_is_told_what_it_lost() -> None:
    bus = EventBus()
    log = EventLog(bus)
    with log.follow("a") as follower:
        publish(bus, 3)
        publish(bus, 1, device="b")
        assert (numbers((taken := await follower.take())[0]), taken[1]) == ([0, 1, 2], 0)
        publish(bus, event_log.QUEUE + 5)
        found, lost = await follower.take()
        assert (len(found), lost, numbers(found)[0]) == (event_log.QUEUE, 5, 5)
        publish(bus, 1)
        found, lost = await follower.take()
        assert (numbers(found), lost) == ([0], 0)
        with trio.move_on_after(0) as scope:
            await follower.take()
        assert scope.cancelled_caught
    assert not log._followers


def test_the_number_of_followers_is_limited() -> None:
    log = EventLog(EventBus())
    with pytest.raises(BusyError, match="too many"):
        _nest(log, 0)
    assert not log._followers


def _nest(log: EventLog, depth: int) -> None:
    assert depth <= event_log.MAX_FOLLOWERS
    with log.follow():
        _nest(log, depth + 1)


class Service:
    """The Events operation on a server of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bus = EventBus()
        self.log = EventLog(self.bus)

    def find(self, name: str) -> SimpleNamespace:
        if name not in ("a", "b"):
            raise NotFoundError("no such device", field="device", value=name)
        return SimpleNamespace(name=name)

    async def serve(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        context = cast(ControlContext, SimpleNamespace(event_log=self.log, find=self.find))
        claimed = claim_control_socket(self.path)
        try:
            server = ControlServer(events.operations(context), INFO)
            await server.serve(claimed.socket, task_status=task_status)
        finally:
            claimed.close()


@pytest.mark.trio
async def test_without_more_there_is_one_reply_that_is_never_too_long(tmp_path: Path) -> None:
    service = Service(tmp_path / "c.sock")
    publish(service.bus, 256, path="/" + "x" * 4095)
    replies: list[messages.EventsReply] = []

    def client() -> None:
        with ControlClient(service.path, timeout=5) as control:
            for device in (None, "b"):
                parameters = messages.EventsParameters(device=device)
                replies.append(
                    control.call(messages.EVENTS, messages.EventsReply, parameters, waiting="them")
                )
            with pytest.raises(NotFoundError.__base__, match="no such device"):
                control.call(
                    messages.EVENTS,
                    messages.EventsReply,
                    messages.EventsParameters(device="c"),
                    waiting="them",
                )

    async with trio.open_nursery() as nursery:
        await nursery.start(service.serve)
        await trio.to_thread.run_sync(client)
        nursery.cancel_scope.cancel()
    everything, nothing = replies
    assert 0 < everything.lost < 256
    assert len(everything.events) + everything.lost == 256
    assert everything.events[-1].details["number"] == 255
    assert nothing.events == []


@pytest.mark.trio
async def test_the_events_of_a_device_that_has_gone_can_still_be_seen(tmp_path: Path) -> None:
    service = Service(tmp_path / "c.sock")
    service.bus.publish(Event(kind=EventKind.DEVICE_REMOVED, device="gone", time=1.0))
    found: list[str] = []

    def client() -> None:
        parameters = messages.EventsParameters(device="gone")
        with ControlClient(service.path, timeout=5) as control:
            reply = control.call(messages.EVENTS, messages.EventsReply, parameters, waiting="them")
            found.extend(event.event for event in reply.events)

    async with trio.open_nursery() as nursery:
        await nursery.start(service.serve)
        await trio.to_thread.run_sync(client)
        nursery.cancel_scope.cancel()
    assert found == ["device-removed"]


@pytest.mark.trio
async def test_a_follower_gets_the_history_and_then_every_event_once(tmp_path: Path) -> None:
    service = Service(tmp_path / "c.sock")
    publish(service.bus, 200, path="/" + "x" * 1000)
    found: list[messages.DeviceEvent] = []
    done = trio.Event()
    token = trio.lowlevel.current_trio_token()

    def client() -> None:
        with ControlClient(service.path, timeout=5) as control:
            for reply in control.stream(
                messages.EVENTS,
                messages.EventsReply,
                messages.EventsParameters(),
                waiting="an event",
                patient=True,
            ):
                assert reply.lost == 0
                found.extend(reply.events)
                if len(found) == 200:
                    trio.from_thread.run_sync(
                        lambda: publish(service.bus, 50, device="b"), trio_token=token
                    )
                if len(found) == 250:
                    return

    async with trio.open_nursery() as nursery:
        await nursery.start(service.serve)
        await trio.to_thread.run_sync(client)
        done.set()
        with trio.fail_after(5):
            while service.log._followers:  # noqa: ASYNC110 - the server notices the hang-up
                await trio.sleep(0.01)
        nursery.cancel_scope.cancel()
    assert [event.sequence for event in found] == list(range(1, 251))


@pytest.mark.trio
async def test_a_follower_that_does_not_read_loses_events_and_holds_up_nobody(
    tmp_path: Path,
) -> None:
    """Neither the publisher nor another follower waits; the lost ones are counted exactly."""
    service = Service(tmp_path / "c.sock")
    async with trio.open_nursery() as nursery:
        await nursery.start(service.serve)
        stream = await trio.open_unix_socket(service.path)
        parameters = encode_parameters(messages.EventsParameters())
        call = Call(method=messages.EVENTS.qualified_name, parameters=parameters, more=True)
        await stream.send_all(encode(call))
        with trio.fail_after(5):
            while not service.log._followers:  # noqa: ASYNC110
                await trio.sleep(0.01)
        for _ in range(40):
            publish(service.bus, 100, path="/" + "x" * 2000)
            await trio.sleep(0.001)
        frames = FrameReader()
        seen = lost = last = 0
        with trio.fail_after(10):
            while seen + lost < 4000:
                for frame in frames.feed(bytes(await stream.receive_some(1 << 16))):
                    reply = msgspec.json.decode(
                        decode_reply(frame).parameters, type=messages.EventsReply
                    )
                    lost += reply.lost
                    for event in reply.events:
                        seen += 1
                        assert event.sequence == seen + lost > last
                        last = event.sequence
        assert lost > 0
        assert last == 4000
        await stream.aclose()
        nursery.cancel_scope.cancel()
