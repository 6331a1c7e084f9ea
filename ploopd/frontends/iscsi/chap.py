"""CHAP (RFC 1994) as iSCSI uses it (RFC 7143 12.1): the target's side, one-way and mutual."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass

from ploopd.frontends.iscsi.config import ChapAccount, ChapConfig
from ploopd.frontends.iscsi.text import TextError, encode_binary, parse_binary, parse_number

MAX_CHALLENGE = 1024
CHALLENGE_LENGTH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """A row of IANA's "PPP Authentication Algorithms" as far as iSCSI initiators use it."""

    code: int
    hash_name: str
    length: int


ALGORITHMS = {
    row.code: row
    for row in (
        Algorithm(code=5, hash_name="md5", length=16),
        Algorithm(code=6, hash_name="sha1", length=20),
        Algorithm(code=7, hash_name="sha256", length=32),
        Algorithm(code=8, hash_name="sha3_256", length=32),
    )
}


def chap_response(code: int, identifier: int, secret: bytes, challenge: bytes) -> bytes:
    """H(identifier ‖ secret ‖ challenge) with the algorithm of `code`."""
    name = ALGORITHMS[code].hash_name
    return hashlib.new(
        name, bytes([identifier]) + secret + challenge, usedforsecurity=False
    ).digest()


class ChallengeBook:
    """The challenges that are open on any connection now.

    An initiator that sends one of them back wants us to compute the answer it needs (reflection),
    be it on the same connection or on a parallel one.
    """

    def __init__(self) -> None:
        self._open: set[bytes] = set()

    def issue(self, random: Callable[[int], bytes]) -> bytes:
        """A new challenge from the random source; it stays in the book until `close`."""
        challenge = random(CHALLENGE_LENGTH)
        while challenge in self._open:
            challenge = random(CHALLENGE_LENGTH)
        self._open.add(challenge)
        return challenge

    def close(self, challenge: bytes) -> None:
        self._open.discard(challenge)

    def __contains__(self, challenge: bytes) -> bool:
        return challenge in self._open


class ChapError(Exception):
    """Authentication failed; the message is for our log, never for the peer."""


class ChapAuthenticator:
    """One authentication: offer the algorithm and a challenge, judge the response once."""

    def __init__(
        self, config: ChapConfig, book: ChallengeBook, random: Callable[[int], bytes]
    ) -> None:
        self._config = config
        self._book = book
        self._random = random
        self._code = 0
        self._identifier = 0
        self._challenge = b""
        self._judged = False
        self.user: str | None = None

    def close(self) -> None:
        """Forget the challenge; call it when the login has ended, whatever way."""
        self._book.close(self._challenge)

    @property
    def started(self) -> bool:
        return bool(self._challenge)

    def start(self, offered: str) -> list[tuple[str, str]]:
        """The answer to CHAP_A: the first of the initiator's algorithms that is allowed here."""
        if self._challenge:
            raise ChapError("CHAP_A a second time")
        for item in offered.split(","):
            code = parse_number(item)
            if code in self._config.algorithms and code in ALGORITHMS:
                self._code = code
                break
        else:
            raise ChapError(f"none of the CHAP algorithms {offered!r} is allowed")
        self._identifier = self._random(1)[0]
        self._challenge = self._book.issue(self._random)
        return [
            ("CHAP_A", str(self._code)),
            ("CHAP_I", str(self._identifier)),
            ("CHAP_C", encode_binary(self._challenge)),
        ]

    def finish(self, keys: dict[str, str], initiator: str) -> list[tuple[str, str]]:
        """Judge CHAP_N and CHAP_R; the answer holds our own CHAP_N and CHAP_R if asked for them.

        Raises `ChapError`.  There is one attempt.
        """
        if not self._challenge or self._judged:
            raise ChapError("CHAP_R without a challenge")
        self._judged = True
        name, response = keys.get("CHAP_N"), keys.get("CHAP_R")
        if name is None or response is None:
            raise ChapError("CHAP_N and CHAP_R belong together")
        try:
            given = parse_binary(response, ALGORITHMS[self._code].length)
        except TextError as error:
            raise ChapError(f"CHAP_R: {error}") from error
        account = self._account(name, initiator)
        # With an unknown user the same work is done on a secret nobody has, for the same timing.
        secret = account.secret if account is not None else self._random(16)
        wanted = chap_response(self._code, self._identifier, secret, self._challenge)
        if not hmac.compare_digest(given, wanted) or account is None:
            raise ChapError(f"wrong user or secret for CHAP user {name!r}")
        answer = self._answer_initiator(keys)
        self.user = name
        return answer

    def _account(self, name: str, initiator: str) -> ChapAccount | None:
        for account in self._config.accounts:
            if hmac.compare_digest(account.user.encode(), name.encode()) and (
                account.initiator is None or account.initiator.lower() == initiator
            ):
                return account
        return None

    def _answer_initiator(self, keys: dict[str, str]) -> list[tuple[str, str]]:
        identifier, challenge = keys.get("CHAP_I"), keys.get("CHAP_C")
        if identifier is None and challenge is None:
            return []
        if identifier is None or challenge is None:
            raise ChapError("CHAP_I and CHAP_C belong together")
        mutual = self._config.mutual
        if mutual is None:
            raise ChapError("the initiator wants the target to authenticate, which has no secret")
        number = parse_number(identifier)
        if number is None or number > 255:
            raise ChapError(f"CHAP_I is {identifier!r}")
        try:
            raw = parse_binary(challenge, MAX_CHALLENGE)
        except TextError as error:
            raise ChapError(f"CHAP_C: {error}") from error
        if raw in self._book:
            raise ChapError("the initiator sent one of our own challenges back (reflection)")
        response = chap_response(self._code, number, mutual.secret, raw)
        return [("CHAP_N", mutual.user), ("CHAP_R", encode_binary(response))]
