"""The control server against the real client and against hostile ones."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import trio

from ploopd.control import messages, server
from ploopd.control.client import ControlClient
from ploopd.control.listener import claim_control_socket
from ploopd.control.protocol import FrameReader, Reply, decode_reply
from ploopd.control.server import ControlServer, Operation, Send
from ploopd.errors import ExitCode, NotFoundError, PloopError

INFO = messages.ServiceInfo(
    vendor="ploopd", product="ploopd", version="1", url="", interfaces=["org.varlink.service"]
)


class Service:
    """Handlers that show what the server makes of them."""

    def __init__(self) -> None:
        self.replaced = trio.Event()
        self.go_on = trio.Event()
        self.wait_cancelled = trio.Event()

    async def show(self, parameters: messages.DeviceName, _send: Send) -> messages.Message:
        if parameters.name == "bug":
            raise KeyError(parameters.name)
        raise NotFoundError("no such device", field="device", value=parameters.name, hint="look")

    async def listing(self, _parameters: messages.Empty, _send: Send) -> messages.Message:
        return messages.DeviceList(devices=[])

    async def replace(self, parameters: messages.ReplaceParameters, send: Send) -> messages.Message:
        await send(messages.ReplaceStep(step="drain", elapsed=0.5))
        await self.go_on.wait()
        self.replaced.set()
        return messages.ReplaceStep(step="release", elapsed=1.0, image=parameters.image)

    async def wait(
        self, _parameters: messages.StandbyWaitParameters, _send: Send
    ) -> messages.Message:
        try:
            await trio.sleep_forever()
        finally:
            self.wait_cancelled.set()
        raise AssertionError

    def operations(self) -> list[Operation]:
        return [
            Operation(method=messages.SHOW_DEVICE, handler=self.show),
            Operation(method=messages.LIST_DEVICES, handler=self.listing),
            Operation(method=messages.REPLACE_DEVICE, handler=self.replace, outlives_client=True),
            Operation(method=messages.STANDBY_WAIT, handler=self.wait),
        ]


@contextlib.asynccontextmanager
async def running(service: Service, path: Path) -> AsyncIterator[trio.Nursery]:
    claimed = claim_control_socket(path)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(ControlServer(service.operations(), INFO).serve, claimed.socket)
            yield nursery
            nursery.cancel_scope.cancel()
    finally:
        claimed.close()


async def raw_call(path: Path, data: bytes) -> Reply | None:
    """Send `data`, return the first reply, or None when the server hung up."""
    stream = await trio.open_unix_socket(path)
    async with stream:
        await stream.send_all(data)
        frames = FrameReader()
        async for chunk in stream:
            found = frames.feed(bytes(chunk))
            if found:
                return decode_reply(found[0])
    return None


@pytest.mark.trio
async def test_calls_streams_and_errors_reach_the_client(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    service = Service()
    service.go_on.set()

    def client() -> None:
        with ControlClient(path, timeout=5) as control:
            listing = control.call(messages.LIST_DEVICES, messages.DeviceList, waiting="it")
            assert listing.devices == []
            with pytest.raises(PloopError) as caught:
                control.call(
                    messages.SHOW_DEVICE,
                    messages.ShowReply,
                    messages.DeviceName(name="x"),
                    waiting="it",
                )
            assert str(caught.value) == "no such device (device = 'x'); look"
            assert caught.value.exit_code == ExitCode.NOT_FOUND
            steps = list(
                control.stream(
                    messages.REPLACE_DEVICE,
                    messages.ReplaceStep,
                    messages.ReplaceParameters(name="x", image="/new"),
                    waiting="it",
                )
            )
            assert [step.step for step in steps] == ["drain", "release"]
            assert steps[-1].image == "/new"

    async with running(service, path):
        await trio.to_thread.run_sync(client)


@pytest.mark.trio
async def test_a_defect_in_a_handler_ends_the_call_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "c.sock"

    def client() -> None:
        with ControlClient(path, timeout=5) as control:
            with pytest.raises(PloopError, match="internal error: KeyError"):
                control.call(
                    messages.SHOW_DEVICE,
                    messages.ShowReply,
                    messages.DeviceName(name="bug"),
                    waiting="it",
                )
            control.call(messages.LIST_DEVICES, messages.DeviceList, waiting="it")

    async with running(Service(), path):
        await trio.to_thread.run_sync(client)
    assert "event=control-defect method=ShowDevice" in caplog.text


@pytest.mark.trio
async def test_the_client_says_what_it_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"

    def client() -> None:
        with (
            ControlClient(path, timeout=0.2) as control,
            pytest.raises(PloopError, match=r"waited 0\.2 s for the moon") as caught,
        ):
            control.call(
                messages.STANDBY_WAIT,
                messages.StandbyState,
                messages.StandbyWaitParameters(name="x", standby="on"),
                waiting="the moon",
            )
        assert caught.value.exit_code == ExitCode.TIMEOUT

    service = Service()
    async with running(service, path):
        await trio.to_thread.run_sync(client)
        with trio.fail_after(5):
            await service.wait_cancelled.wait()


def test_no_daemon_is_exit_code_3_and_names_the_path(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    with pytest.raises(PloopError, match="no daemon listens here") as caught:
        ControlClient(path)
    assert caught.value.exit_code == ExitCode.NOT_RUNNING
    assert caught.value.path == str(path)


@pytest.mark.trio
async def test_a_replacement_outlives_its_client(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    service = Service()
    async with running(service, path):
        call = b'{"method":"org.ploopd.Control.ReplaceDevice","more":true,"parameters":'
        call += b'{"name":"x","image":"/new"}}\0'
        reply = await raw_call(path, call)
        assert reply is not None
        assert reply.continues
        service.go_on.set()
        with trio.fail_after(5):
            await service.replaced.wait()


@pytest.mark.trio
@pytest.mark.parametrize(
    ("method", "parameters", "error"),
    [
        ("org.ploopd.Control.Nope", "{}", "org.varlink.service.MethodNotFound"),
        ("org.example.Foo", "{}", "org.varlink.service.InterfaceNotFound"),
        ("Foo", "{}", "org.varlink.service.InterfaceNotFound"),
        ("org.ploopd.Control.ShowDevice", "{}", "org.varlink.service.InvalidParameter"),
        ("org.ploopd.Control.ShowDevice", '{"name":7}', "org.varlink.service.InvalidParameter"),
        (
            "org.ploopd.Control.ShowDevice",
            '{"name":"x","force":true}',
            "org.varlink.service.InvalidParameter",
        ),
        (
            "org.varlink.service.GetInterfaceDescription",
            '{"interface":"org.example"}',
            "org.varlink.service.InterfaceNotFound",
        ),
    ],
)
async def test_wrong_calls_get_the_standard_errors(
    tmp_path: Path, method: str, parameters: str, error: str
) -> None:
    path = tmp_path / "c.sock"
    async with running(Service(), path):
        data = f'{{"method":"{method}","parameters":{parameters}}}\0'
        reply = await raw_call(path, data.encode())
    assert reply is not None
    assert reply.error == error


@pytest.mark.trio
async def test_introspection(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    async with running(Service(), path):
        info = await raw_call(path, b'{"method":"org.varlink.service.GetInfo"}\0')
        described = await raw_call(
            path,
            b'{"method":"org.varlink.service.GetInterfaceDescription",'
            b'"parameters":{"interface":"org.ploopd.Control"}}\0',
        )
    assert info is not None
    assert msgspec.json.decode(info.parameters, type=messages.ServiceInfo) == INFO
    assert described is not None
    assert b"method ListDevices()" in bytes(described.parameters)


@pytest.mark.trio
@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n\r\n\0",
        b"\0",
        b"x" * (1 << 20),
        b'{"method":"\xff"}\0',
        b'{"method":"a.b","parameters":' + b"[" * 200_000 + b"\0",
        b'{"method":"a.b","parameters":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001 + b"\0",
    ],
    ids=["http", "empty", "endless", "not UTF-8", "brackets", "braces"],
)
async def test_garbage_ends_its_own_connection_only(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "c.sock"
    async with running(Service(), path):
        with contextlib.suppress(trio.BrokenResourceError):
            assert await raw_call(path, data) is None
        assert await raw_call(path, b'{"method":"org.ploopd.Control.ListDevices"}\0') is not None


@pytest.mark.trio
@pytest.mark.parametrize(
    "method", ["org.ploopd.Control.ShowDevice", "org.varlink.service.GetInterfaceDescription"]
)
async def test_parameters_that_are_not_utf_8(tmp_path: Path, method: str) -> None:
    path = tmp_path / "c.sock"
    call = b'{"method":"%s","parameters":{"name":"\xff","interface":"\xff"}}\0' % method.encode()
    async with running(Service(), path):
        reply = await raw_call(path, call)
        assert reply is not None
        assert reply.error == "org.varlink.service.InvalidParameter"
        assert await raw_call(path, b'{"method":"org.ploopd.Control.ListDevices"}\0') is not None


@pytest.mark.trio
async def test_file_names_that_are_not_utf_8_are_shown_and_not_sent(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    name = os.fsdecode(b"/vz/\xff.hds")
    summary = messages.DeviceSummary(name="x", image=name, size=512, standby="off", urls=[])

    async def listing(_parameters: messages.Empty, _send: Send) -> messages.DeviceList:
        return messages.DeviceList(devices=[summary])

    async def show(_parameters: messages.DeviceName, _send: Send) -> messages.ShowReply:
        raise NotFoundError("is gone", path=name)

    def client() -> None:
        with ControlClient(path, timeout=5) as control:
            listed = control.call(messages.LIST_DEVICES, messages.DeviceList, waiting="it")
            assert listed.devices[0].image == r"/vz/\udcff.hds"
            for wanted, told in (("x", r"/vz/\\udcff.hds: is gone"), (name, "only names in UTF-8")):
                with pytest.raises(PloopError, match=told):
                    control.call(
                        messages.SHOW_DEVICE,
                        messages.ShowReply,
                        messages.DeviceName(name=wanted),
                        waiting="it",
                    )

    service = Service()
    service.listing, service.show = listing, show  # type: ignore[method-assign,assignment]
    async with running(service, path):
        await trio.to_thread.run_sync(client)


@pytest.mark.trio
async def test_idle_connections_make_room(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    async with running(Service(), path):
        idle = [await trio.open_unix_socket(path) for _ in range(server.MAX_CONNECTIONS + 5)]
        with trio.fail_after(5):
            reply = await raw_call(path, b'{"method":"org.ploopd.Control.ListDevices"}\0')
        assert reply is not None
        assert reply.error is None
        assert await idle[0].receive_some(1) == b""
        for stream in idle:
            await stream.aclose()


@pytest.mark.trio
async def test_a_message_that_never_ends_is_dropped(autojump_clock: trio.abc.Clock) -> None:
    ours, theirs = trio.socket.socketpair()
    client = trio.SocketStream(ours)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ControlServer([], INFO).serve_stream, trio.SocketStream(theirs))
        started = trio.current_time()
        await client.send_all(b'{"method":')
        assert await client.receive_some(1) == b""
        assert trio.current_time() - started == pytest.approx(server.MESSAGE_SECONDS, abs=1)
    await client.aclose()


@pytest.mark.trio
async def test_a_message_must_be_whole_in_time_however_often_a_piece_comes(
    autojump_clock: trio.abc.Clock,
) -> None:
    ours, theirs = trio.socket.socketpair()
    client = trio.SocketStream(ours)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ControlServer([], INFO).serve_stream, trio.SocketStream(theirs))
        started = trio.current_time()
        with contextlib.suppress(trio.BrokenResourceError):
            while trio.current_time() < started + 10 * server.MESSAGE_SECONDS:
                await client.send_all(b" ")
                await trio.sleep(5)
        assert trio.current_time() - started == pytest.approx(server.MESSAGE_SECONDS, abs=6)
    await client.aclose()


@pytest.mark.trio
async def test_a_client_that_never_reads_is_dropped(autojump_clock: trio.abc.Clock) -> None:
    ours, theirs = trio.socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client = trio.SocketStream(ours)
    call = b'{"method":"org.varlink.service.GetInterfaceDescription",'
    call += b'"parameters":{"interface":"org.ploopd.Control"}}\0'
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ControlServer([], INFO).serve_stream, trio.SocketStream(theirs))
            await client.send_all(call * 8)
    await client.aclose()


@pytest.mark.trio
async def test_only_root_and_our_own_user_may_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.sock"
    async with running(Service(), path):
        monkeypatch.setattr(server, "_CREDENTIALS", _Foreigner())
        reply = await raw_call(path, b'{"method":"org.ploopd.Control.ListDevices"}\0')
    assert reply is not None
    assert reply.error == "org.varlink.service.PermissionDenied"


class _Foreigner:
    """The credentials of a process of another user."""

    size = 12

    def unpack(self, data: bytes) -> tuple[int, int, int]:
        assert len(data) == self.size
        return os.getpid(), os.geteuid() + 1, 0
