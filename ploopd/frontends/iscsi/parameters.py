"""Operational parameters and how each is negotiated: one table (RFC 7143 chapter 13)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from ploopd.frontends.iscsi.config import Offer
from ploopd.frontends.iscsi.text import (
    IRRELEVANT,
    NOT_UNDERSTOOD,
    REJECT,
    parse_number,
)

MINIMUM_SEGMENT = 512
MAXIMUM_SEGMENT = 0xFFFFFF


class Rule(Enum):
    """How the result of a key comes about."""

    LIST = auto()  # the first of the initiator's values that we accept
    OR = auto()  # Yes if one says Yes
    AND = auto()  # Yes if both say Yes
    MINIMUM = auto()
    MAXIMUM = auto()
    DECLARED = auto()  # each side states its own; no answer
    REFUSED = auto()  # obsolete: a fixed answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A row: `ours` gives our side of it, `fixed` a constant answer.

    `leading_only`: only in the login of a session's first connection; `in_discovery`: it has a
    meaning in a discovery session; `in_full_feature`: it may be sent again after login.
    """

    name: str
    rule: Rule
    default: str
    low: int = 0
    high: int = 0
    leading_only: bool = True
    in_discovery: bool = True
    in_full_feature: bool = False
    ours: Callable[[Offer], object] | None = None
    fixed: str | None = None


_TABLE = (
    Key(
        name="HeaderDigest",
        rule=Rule.LIST,
        default="None",
        leading_only=False,
        ours=lambda offer: offer.header_digest,
    ),
    Key(
        name="DataDigest",
        rule=Rule.LIST,
        default="None",
        leading_only=False,
        ours=lambda offer: offer.data_digest,
    ),
    Key(
        name="MaxRecvDataSegmentLength",
        rule=Rule.DECLARED,
        default="8192",
        low=MINIMUM_SEGMENT,
        high=MAXIMUM_SEGMENT,
        leading_only=False,
        in_full_feature=True,
    ),
    Key(
        name="MaxConnections",
        rule=Rule.MINIMUM,
        default="1",
        low=1,
        high=65535,
        in_discovery=False,
        fixed="1",
    ),
    Key(
        name="InitialR2T",
        rule=Rule.OR,
        default="Yes",
        in_discovery=False,
        ours=lambda offer: offer.initial_r2t,
    ),
    Key(
        name="ImmediateData",
        rule=Rule.AND,
        default="Yes",
        in_discovery=False,
        ours=lambda offer: offer.immediate_data,
    ),
    Key(
        name="MaxBurstLength",
        rule=Rule.MINIMUM,
        default="262144",
        low=MINIMUM_SEGMENT,
        high=MAXIMUM_SEGMENT,
        in_discovery=False,
        ours=lambda offer: offer.max_burst_length,
    ),
    Key(
        name="FirstBurstLength",
        rule=Rule.MINIMUM,
        default="65536",
        low=MINIMUM_SEGMENT,
        high=MAXIMUM_SEGMENT,
        in_discovery=False,
        ours=lambda offer: offer.first_burst_length,
    ),
    Key(
        name="MaxOutstandingR2T",
        rule=Rule.MINIMUM,
        default="1",
        low=1,
        high=65535,
        in_discovery=False,
        ours=lambda offer: offer.max_outstanding_r2t,
    ),
    Key(
        name="DefaultTime2Wait",
        rule=Rule.MAXIMUM,
        default="2",
        high=3600,
        ours=lambda offer: offer.default_time2wait,
    ),
    Key(
        name="DefaultTime2Retain",
        rule=Rule.MINIMUM,
        default="20",
        high=3600,
        ours=lambda offer: offer.default_time2retain,
    ),
    Key(name="DataPDUInOrder", rule=Rule.OR, default="Yes", in_discovery=False, fixed="Yes"),
    Key(name="DataSequenceInOrder", rule=Rule.OR, default="Yes", in_discovery=False, fixed="Yes"),
    Key(name="ErrorRecoveryLevel", rule=Rule.MINIMUM, default="0", high=2, fixed="0"),
    Key(
        name="TaskReporting",
        rule=Rule.LIST,
        default="RFC3720",
        ours=lambda offer: ("RFC3720",),
    ),
    Key(name="iSCSIProtocolLevel", rule=Rule.MINIMUM, default="1", high=31, fixed="1"),
    Key(name="InitiatorAlias", rule=Rule.DECLARED, default="", leading_only=False),
    Key(name="NodeArchitecture", rule=Rule.DECLARED, default="", leading_only=False),
    # Obsolete since RFC 7143, still offered by many.
    Key(name="IFMarker", rule=Rule.REFUSED, default="No", leading_only=False, fixed="No"),
    Key(name="OFMarker", rule=Rule.REFUSED, default="No", leading_only=False, fixed="No"),
    Key(name="IFMarkInt", rule=Rule.REFUSED, default="", leading_only=False, fixed=REJECT),
    Key(name="OFMarkInt", rule=Rule.REFUSED, default="", leading_only=False, fixed=REJECT),
    Key(name="RDMAExtensions", rule=Rule.REFUSED, default="No", leading_only=False, fixed="No"),
)

KEYS = {key.name: key for key in _TABLE}


@dataclass(slots=True, kw_only=True)
class Parameters:
    """The values in force.  Before negotiation they are the standard's defaults.

    `max_send_segment` is the initiator's MaxRecvDataSegmentLength, `max_receive_segment` ours;
    `data_in_limit` is the most that one Data-In PDU which is a sequence of its own may carry.
    """

    header_digest: bool = False
    data_digest: bool = False
    max_send_segment: int = 8192
    data_in_limit: int = 8192
    max_receive_segment: int = 8192
    initial_r2t: bool = True
    immediate_data: bool = True
    max_burst: int = 262144
    first_burst: int = 65536
    max_outstanding_r2t: int = 1
    time2wait: int = 2
    time2retain: int = 20
    initiator_alias: str = ""


class NegotiationError(Exception):
    """The initiator broke a rule of negotiation; the login or the exchange fails."""


class Negotiation:
    """The operational negotiation of one connection; results are in `parameters`."""

    def __init__(self, offer: Offer, *, discovery: bool = False, leading: bool = True) -> None:
        self.offer = offer
        self.discovery = discovery
        self.leading = leading
        self.parameters = Parameters()
        self._values = {key.name: key.default for key in _TABLE}
        self._seen: set[str] = set()
        self._declared = False

    def answer(self, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Our answers to the initiator's pairs.  Raises `NegotiationError`."""
        answers: list[tuple[str, str]] = []
        # FirstBurstLength depends on three others; whatever their order, it goes last.
        for name, value in sorted(pairs, key=lambda pair: pair[0] == "FirstBurstLength"):
            if name in self._seen:
                raise NegotiationError(f"{name} is negotiated a second time")
            self._seen.add(name)
            answer = self._answer_one(name, value)
            if answer is not None:
                answers.append((name, answer))
        if not self._declared:
            self._declared = True
            ours = self.offer.max_recv_data_segment_length
            self.parameters.max_receive_segment = ours
            answers.append(("MaxRecvDataSegmentLength", str(ours)))
        self._apply()
        return answers

    def _answer_one(self, name: str, value: str) -> str | None:
        key = KEYS.get(name)
        if key is None:
            return NOT_UNDERSTOOD
        if key.leading_only and not self.leading:
            raise NegotiationError(f"{name} does not belong into the login of another connection")
        if self.discovery and not key.in_discovery:
            return IRRELEVANT
        if key.rule is Rule.REFUSED:
            return key.fixed
        if name == "FirstBurstLength" and self._no_unsolicited_data():
            return IRRELEVANT
        result = _result(key, value, self.offer)
        if result is None:
            if key.rule is Rule.DECLARED:
                raise NegotiationError(f"{name} is out of its range")
            return REJECT
        if name == "FirstBurstLength":
            result = str(min(int(result), int(self._values["MaxBurstLength"])))
        self._values[name] = result
        return None if key.rule is Rule.DECLARED else result

    def _no_unsolicited_data(self) -> bool:
        return self._values["InitialR2T"] == "Yes" and self._values["ImmediateData"] == "No"

    def _apply(self) -> None:
        values, parameters = self._values, self.parameters
        parameters.header_digest = values["HeaderDigest"] == "CRC32C"
        parameters.data_digest = values["DataDigest"] == "CRC32C"
        parameters.max_send_segment = int(values["MaxRecvDataSegmentLength"])
        parameters.initial_r2t = values["InitialR2T"] == "Yes"
        parameters.immediate_data = values["ImmediateData"] == "Yes"
        parameters.max_burst = int(values["MaxBurstLength"])
        parameters.data_in_limit = min(parameters.max_send_segment, parameters.max_burst)
        parameters.first_burst = min(int(values["FirstBurstLength"]), parameters.max_burst)
        parameters.max_outstanding_r2t = int(values["MaxOutstandingR2T"])
        parameters.time2wait = int(values["DefaultTime2Wait"])
        parameters.time2retain = int(values["DefaultTime2Retain"])
        parameters.initiator_alias = values["InitiatorAlias"]


def _result(key: Key, value: str, offer: Offer) -> str | None:
    """The value that results from the initiator's, None if that one is not admissible."""
    ours = key.fixed if key.ours is None else key.ours(offer)
    match key.rule:
        case Rule.LIST:
            assert isinstance(ours, tuple)
            return next((item for item in value.split(",") if item in ours), None)
        case Rule.OR | Rule.AND:
            if value not in ("Yes", "No"):
                return None
            yes = ours == "Yes" or ours is True
            both = (value == "Yes" or yes) if key.rule is Rule.OR else (value == "Yes" and yes)
            return "Yes" if both else "No"
        case Rule.DECLARED if key.high == 0:
            return value[:255]
        case _:
            number = parse_number(value)
            if number is None or not key.low <= number <= key.high:
                return None
            if key.rule is Rule.DECLARED:
                return str(number)
            mine = int(str(ours))
            return str(min(number, mine) if key.rule is Rule.MINIMUM else max(number, mine))


def redeclare(parameters: Parameters, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Text keys in full feature phase: only MaxRecvDataSegmentLength may change (RFC 7143 13.12).

    The answers to the others say so.  Raises `NegotiationError` for a bad value.
    """
    answers: list[tuple[str, str]] = []
    for name, value in pairs:
        key = KEYS.get(name)
        if key is None:
            answers.append((name, NOT_UNDERSTOOD))
        elif not key.in_full_feature:
            answers.append((name, REJECT))
        else:
            number = parse_number(value)
            if number is None or not key.low <= number <= key.high:
                raise NegotiationError(f"{name} is out of its range")
            parameters.max_send_segment = number
            parameters.data_in_limit = min(number, parameters.max_burst)
    return answers
