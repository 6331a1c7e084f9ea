"""How much may be parked, and for how long."""

from __future__ import annotations

from dataclasses import dataclass

from ploopd.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class ParkLimits:
    """Bounds of one device's parked requests.

    `max_requests`: number.  `max_bytes`: bytes of the data buffers they hold.  `park_max`: seconds
    from a request's arrival until it is answered BUSY; None parks for ever.  Its default is below
    the 30 s after which a SCSI initiator aborts a command.
    """

    max_requests: int = 10_000
    max_bytes: int = 64 << 20
    park_max: float | None = 20.0

    def __post_init__(self) -> None:
        for field in ("max_requests", "max_bytes"):
            value = getattr(self, field)
            if value < 1:
                raise UsageError("a park limit must be at least 1", field=field, value=value)
        if self.park_max is not None and self.park_max <= 0:
            raise UsageError("must be more than 0 seconds", field="park_max", value=self.park_max)

    def allows(self, requests: int, size: int) -> bool:
        """Whether `requests` parked requests holding `size` bytes in all are within the bounds.

        A single request is always allowed, however large: it could never be executed otherwise.
        """
        return requests <= self.max_requests and (size <= self.max_bytes or requests == 1)
