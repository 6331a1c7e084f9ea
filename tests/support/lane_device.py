"""A block device in memory that has a lane: what is in it waits until the test completes it."""

from __future__ import annotations

from ploopd.storage.device import Done
from ploopd.storage.lane import LaneRequest
from tests.support.memory_device import Completion, MemoryDevice, Operation


class MemoryLane:
    """`requests`: those in the lane, in order of arrival; `room`: how many it takes.

    An adopted request is one of the device's `outstanding`, and cannot be cancelled.
    """

    usable = True
    first = True

    def __init__(self, device: MemoryDevice) -> None:
        self.device = device
        self.requests: list[LaneRequest] = []
        self.room = 64
        self.adopted = 0

    def begin(self, request: LaneRequest) -> bool:
        assert request.offset + request.length <= self.device.size
        if len(self.requests) >= self.room:
            return False
        self.requests.append(request)
        return True

    def ended(self, request: LaneRequest) -> None:
        self.requests.remove(request)

    def adopt(self, request: LaneRequest, buffer: memoryview, done: Done) -> Operation:
        self.requests.remove(request)
        self.adopted += 1
        request.buffer.release()  # only the kernel would still use it
        op, offset, length = _kind(request), request.offset, request.length
        operation = Operation(self.device, op, offset, length, buffer, done, False, False)
        operation.state = "executing"
        self.device.outstanding.append(operation)
        return operation

    def empty(self) -> None:
        for request in list(self.requests):
            request.promote()

    def __len__(self) -> int:
        return len(self.requests)

    def complete(self, count: int | None = None) -> None:
        """Execute `count` (all when None) requests; one that fails leaves the lane first."""
        device = self.device
        for request in self.requests[:count]:
            op, offset, length = _kind(request), request.offset, request.length
            if any(fault.matches(op, offset, length, False) for fault in device.faults):
                request.promote()
                device.complete(1, index=len(device.outstanding) - 1)
            else:
                device._run(op, offset, length, request.buffer.view)
                request.completed()


class LaneMemoryDevice(MemoryDevice):
    """A `MemoryDevice` with a `lane`, and nothing inline."""

    lane: MemoryLane

    def __init__(self, size: int, data: bytearray) -> None:
        super().__init__(size, completion=Completion.MANUAL, inline=False, data=data)
        self.lane = MemoryLane(self)


def _kind(request: LaneRequest) -> str:
    return "write" if request.writing else "read"
