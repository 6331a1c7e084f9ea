"""What the embedded target can be told: portals, access rules, limits and what it offers."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field

from ploopd.errors import ExitCode, PloopError, UsageError
from ploopd.frontends.iscsi.names import normalize_name

DEFAULT_PORT = 3260
CHAP_SECRET_MINIMUM = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Portal:
    """An address to listen on; port 0 takes a free one."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT

    @property
    def is_loopback(self) -> bool:
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def format_address(host: str, port: int) -> str:
    """`host:port`, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChapAccount:
    """One user that initiators log in as.

    `initiator` restricts it to one initiator name.  `secret` never appears in a repr.
    """

    user: str
    secret: bytes = field(repr=False)
    initiator: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChapConfig:
    """CHAP credentials (RFC 7143 12.1).

    `mutual` is what the target answers when an initiator asks it to prove itself.  `algorithms` are
    CHAP_A codes: 8 SHA3-256, 7 SHA-256, 6 SHA-1, 5 MD5; MD5 only when somebody lists it.
    """

    accounts: tuple[ChapAccount, ...]
    mutual: ChapAccount | None = None
    algorithms: tuple[int, ...] = (8, 7, 6)

    def check(self) -> None:
        """Raises `UsageError` for credentials that would not protect anything."""
        if not self.accounts:
            raise UsageError("CHAP is configured without any user")
        if not self.algorithms or not set(self.algorithms) <= {5, 6, 7, 8}:
            raise UsageError(
                "CHAP algorithms are 8, 7, 6 and 5", field="algorithms", value=self.algorithms
            )
        everybody = (*self.accounts, *([self.mutual] if self.mutual else []))
        for account in everybody:
            if len(account.secret) < CHAP_SECRET_MINIMUM:
                raise UsageError(
                    f"a CHAP secret has fewer than {CHAP_SECRET_MINIMUM} characters",
                    field="user",
                    value=account.user,
                )
        if self.mutual and any(a.secret == self.mutual.secret for a in self.accounts):
            raise UsageError(
                "the CHAP secrets of the two directions are equal, which makes reflection possible",
                field="user",
                value=self.mutual.user,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds on what peers can make the target hold.  Seconds and bytes.

    `login_timeout` is for the whole login.  `receive_buffer`, `output_arena` and `inflight_bytes`
    are per connection in full feature phase; before that a connection has 28 KiB.  The arena holds
    one READ of 1 MiB: with a larger one more is read before the first byte is sent, which costs a
    quarter of the throughput of 128 KiB reads.
    """

    login_timeout: float = 15.0
    login_pdus: int = 20
    login_text: int = 16 * 1024
    discovery_idle: float = 60.0
    nop_interval: float = 15.0
    nop_timeout: float = 15.0
    data_out_timeout: float = 45.0
    send_timeout: float = 30.0
    close_timeout: float = 3.0
    connections: int = 1024
    connections_per_portal: int = 1024
    connections_per_source: int = 512
    unauthenticated: int = 256
    unauthenticated_per_source: int = 128
    window: int = 128
    immediate_commands: int = 16
    receive_buffer: int = 2 << 20
    output_arena: int = (1 << 20) + (64 << 10)
    inflight_bytes: int = 32 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """The target's side of the operational negotiation (RFC 7143 chapter 13)."""

    header_digest: tuple[str, ...] = ("None", "CRC32C")
    data_digest: tuple[str, ...] = ("None", "CRC32C")
    initial_r2t: bool = False
    immediate_data: bool = True
    max_recv_data_segment_length: int = 1 << 20
    first_burst_length: int = 1 << 20
    max_burst_length: int = 16776192
    max_outstanding_r2t: int = 16
    default_time2wait: int = 2
    default_time2retain: int = 0

    def check(self) -> None:
        """Raises `UsageError` for values outside of the standard's ranges."""
        for name, low, high in (
            ("max_recv_data_segment_length", 512, 1 << 20),
            ("first_burst_length", 512, 0xFFFFFF),
            ("max_burst_length", 512, 0xFFFFFF),
            ("max_outstanding_r2t", 1, 65535),
            ("default_time2wait", 0, 3600),
            ("default_time2retain", 0, 3600),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise UsageError(f"is not between {low} and {high}", field=name, value=value)
        if self.first_burst_length > self.max_burst_length:
            raise UsageError(
                "is larger than max_burst_length",
                field="first_burst_length",
                value=self.first_burst_length,
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class IscsiConfig:
    """Everything the embedded iSCSI target needs to know.

    `acl` lists the initiator names that may log in; None is everybody.  `chap` is for normal
    sessions, `discovery_chap` for discovery sessions.
    """

    portals: Sequence[Portal] = (Portal(),)
    iqn: str = "iqn.2026-11.org.ploopd:target"
    tpgt: int = 1
    alias: str | None = None
    chap: ChapConfig | None = None
    discovery_chap: ChapConfig | None = None
    acl: Sequence[str] | None = None
    limits: Limits = field(default_factory=Limits)
    parameters: Offer = field(default_factory=Offer)
    insecure: bool = False

    def check(self) -> None:
        """Raises `UsageError` or `PloopError` (exit code CONFIG) for what cannot or must not be."""
        if normalize_name(self.iqn) != self.iqn:
            raise UsageError(
                "is not an iSCSI name",
                field="iqn",
                value=self.iqn,
                hint="for example iqn.2026-11.org.example:disk (lower case)",
            )
        if not 0 <= self.tpgt <= 65535:
            raise UsageError("is not a portal group tag", field="tpgt", value=self.tpgt)
        for name in self.acl or ():
            if normalize_name(name) is None:
                raise UsageError("is not an iSCSI name", field="acl", value=name)
        for chap in (self.chap, self.discovery_chap):
            if chap is not None:
                chap.check()
        self.parameters.check()
        self._check_exposure()

    def _check_exposure(self) -> None:
        if self.insecure or self.chap is not None or self.acl is not None:
            return
        for portal in self.portals:
            if not portal.is_loopback:
                raise PloopError(
                    "the portal is reachable from other hosts, and anybody could write to the disk",
                    field="portal",
                    value=format_address(portal.host, portal.port),
                    hint="set an ACL or CHAP credentials, or say --insecure",
                    exit_code=ExitCode.CONFIG,
                )
