"""The negotiation table, key by key."""

from __future__ import annotations

import pytest

from ploopd.errors import UsageError
from ploopd.frontends.iscsi.config import Offer
from ploopd.frontends.iscsi.parameters import (
    KEYS,
    Negotiation,
    NegotiationError,
    Parameters,
    redeclare,
)

CASES = [
    # key, the initiator's value, our offer, the answer
    ("HeaderDigest", "CRC32C,None", Offer(), "CRC32C"),
    ("HeaderDigest", "None,CRC32C", Offer(), "None"),
    ("HeaderDigest", "SHA9", Offer(), "Reject"),
    ("DataDigest", "CRC32C", Offer(data_digest=("None",)), "Reject"),
    ("MaxConnections", "8", Offer(), "1"),
    ("MaxConnections", "0", Offer(), "Reject"),
    ("InitialR2T", "No", Offer(), "No"),
    ("InitialR2T", "Yes", Offer(), "Yes"),
    ("InitialR2T", "No", Offer(initial_r2t=True), "Yes"),
    ("InitialR2T", "yes", Offer(), "Reject"),
    ("ImmediateData", "Yes", Offer(), "Yes"),
    ("ImmediateData", "No", Offer(), "No"),
    ("ImmediateData", "Yes", Offer(immediate_data=False), "No"),
    ("MaxBurstLength", "262144", Offer(), "262144"),
    ("MaxBurstLength", "16777215", Offer(max_burst_length=1 << 20), str(1 << 20)),
    ("MaxBurstLength", "511", Offer(), "Reject"),
    ("MaxBurstLength", "16777216", Offer(), "Reject"),
    ("MaxOutstandingR2T", "64", Offer(), "16"),
    ("MaxOutstandingR2T", "1", Offer(), "1"),
    ("DefaultTime2Wait", "0", Offer(), "2"),
    ("DefaultTime2Wait", "9", Offer(), "9"),
    ("DefaultTime2Retain", "20", Offer(), "0"),
    ("DataPDUInOrder", "No", Offer(), "Yes"),
    ("DataSequenceInOrder", "No", Offer(), "Yes"),
    ("ErrorRecoveryLevel", "2", Offer(), "0"),
    ("ErrorRecoveryLevel", "3", Offer(), "Reject"),
    ("TaskReporting", "FastAbort,ResponseFence,RFC3720", Offer(), "RFC3720"),
    ("iSCSIProtocolLevel", "2", Offer(), "1"),
    ("IFMarker", "Yes", Offer(), "No"),
    ("OFMarker", "No", Offer(), "No"),
    ("IFMarkInt", "2048~8192", Offer(), "Reject"),
    ("RDMAExtensions", "Yes", Offer(), "No"),
    ("X-com.example.key", "1", Offer(), "NotUnderstood"),
    ("InitiatorRecvDataSegmentLength", "8192", Offer(), "NotUnderstood"),
]


@pytest.mark.parametrize(("key", "value", "offer", "answer"), CASES)
def test_answers(key: str, value: str, offer: Offer, answer: str) -> None:
    answers = dict(Negotiation(offer).answer([(key, value)]))
    assert answers[key] == answer


def test_every_negotiable_key_has_a_case() -> None:
    declared = {"MaxRecvDataSegmentLength", "FirstBurstLength", "InitiatorAlias"}
    covered = {case[0] for case in CASES} | declared | {"NodeArchitecture", "OFMarkInt"}
    assert set(KEYS) <= covered


def test_defaults_are_the_standards() -> None:
    negotiation = Negotiation(Offer())
    negotiation.answer([])
    assert negotiation.parameters == Parameters(
        max_receive_segment=Offer().max_recv_data_segment_length
    )


def test_our_segment_length_is_declared_once() -> None:
    negotiation = Negotiation(Offer())
    first = dict(negotiation.answer([("MaxRecvDataSegmentLength", "65536")]))
    assert first == {"MaxRecvDataSegmentLength": str(1 << 20)}
    assert negotiation.answer([("InitialR2T", "No")]) == [("InitialR2T", "No")]
    assert negotiation.parameters.max_send_segment == 65536
    assert negotiation.parameters.max_receive_segment == 1 << 20


def test_first_burst_is_at_most_max_burst_whatever_the_order() -> None:
    for order in (1, -1):
        pairs = [("FirstBurstLength", "1048576"), ("MaxBurstLength", "65536")][::order]
        negotiation = Negotiation(Offer())
        assert dict(negotiation.answer(pairs))["FirstBurstLength"] == "65536"
        assert negotiation.parameters.first_burst == 65536


def test_first_burst_is_irrelevant_without_unsolicited_data() -> None:
    pairs = [("FirstBurstLength", "65536"), ("InitialR2T", "Yes"), ("ImmediateData", "No")]
    assert dict(Negotiation(Offer()).answer(pairs))["FirstBurstLength"] == "Irrelevant"


def test_a_key_is_negotiated_once() -> None:
    negotiation = Negotiation(Offer())
    negotiation.answer([("InitialR2T", "No")])
    with pytest.raises(NegotiationError, match="InitialR2T"):
        negotiation.answer([("InitialR2T", "Yes")])


def test_a_declaration_out_of_range_fails() -> None:
    with pytest.raises(NegotiationError, match="MaxRecvDataSegmentLength"):
        Negotiation(Offer()).answer([("MaxRecvDataSegmentLength", "100")])


def test_discovery_sessions_do_not_negotiate_data_transfer() -> None:
    answers = dict(
        Negotiation(Offer(), discovery=True).answer(
            [("InitialR2T", "No"), ("MaxBurstLength", "262144"), ("HeaderDigest", "None")]
        )
    )
    assert answers["InitialR2T"] == answers["MaxBurstLength"] == "Irrelevant"
    assert answers["HeaderDigest"] == "None"


def test_leading_only_keys_do_not_belong_to_another_connection() -> None:
    with pytest.raises(NegotiationError):
        Negotiation(Offer(), leading=False).answer([("InitialR2T", "No")])


def test_full_feature_phase_changes_only_the_segment_length() -> None:
    parameters = Parameters()
    assert redeclare(parameters, [("MaxRecvDataSegmentLength", "4096")]) == []
    assert parameters.max_send_segment == 4096
    assert redeclare(parameters, [("InitialR2T", "No"), ("X-a", "1")]) == [
        ("InitialR2T", "Reject"),
        ("X-a", "NotUnderstood"),
    ]
    with pytest.raises(NegotiationError):
        redeclare(parameters, [("MaxRecvDataSegmentLength", "1")])


@pytest.mark.parametrize(
    "offer",
    [
        Offer(max_recv_data_segment_length=100),
        Offer(max_recv_data_segment_length=1 << 23),
        Offer(max_outstanding_r2t=0),
        Offer(first_burst_length=1 << 20, max_burst_length=65536),
    ],
)
def test_impossible_offers_are_refused(offer: Offer) -> None:
    with pytest.raises(UsageError):
        offer.check()
