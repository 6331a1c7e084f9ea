"""The login phase of one connection, from the first request to full feature phase.

Source: RFC 7143 chapters 6.3 and 11.12-11.13.  The engine gets decoded requests and says what to
answer; it does no I/O and ends in exactly one of: complete, or failed (answer, then close).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum, auto

from ploopd.frontends.iscsi.chap import ChallengeBook, ChapAuthenticator, ChapError
from ploopd.frontends.iscsi.config import ChapConfig, IscsiConfig
from ploopd.frontends.iscsi.names import normalize_name
from ploopd.frontends.iscsi.parameters import KEYS, Negotiation, NegotiationError, Parameters
from ploopd.frontends.iscsi.pdu import LoginRequest, LoginStatus
from ploopd.frontends.iscsi.text import NOT_UNDERSTOOD, TextError, encode_text, parse_text

SECURITY_STAGE = 0
OPERATIONAL_STAGE = 1
FULL_FEATURE = 3
MAX_LOGIN_SEGMENT = 8192

_DECLARATIONS = ("InitiatorName", "TargetName", "SessionType", "InitiatorAlias")
_SECURITY_KEYS = frozenset({"AuthMethod", "CHAP_A", "CHAP_I", "CHAP_C", "CHAP_N", "CHAP_R"})
_TARGET_ONLY = frozenset({"TargetAddress", "TargetAlias", "TargetPortalGroupTag", "SendTargets"})


class LoginFailure(Exception):  # noqa: N818 - the outcome's name in the standard
    """The login ends with `status`; the message is for the log."""

    def __init__(self, status: LoginStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class LoginIdentity:
    """Who has logged in, to what.  `target` is None in a discovery session."""

    initiator: str
    isid: bytes
    tsih: int
    cid: int
    target: str | None
    user: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoginReply:
    """What to answer.  `next_stage` is None when the stage does not change."""

    status: LoginStatus
    current_stage: int
    next_stage: int | None
    isid: bytes
    tsih: int
    tag: int
    text: bytes


class LoginState(Enum):
    """Where the login is."""

    RUNNING = auto()
    COMPLETE = auto()
    FAILED = auto()


Admit = Callable[[LoginIdentity], int]
"""Takes the authenticated initiator in and returns the session's TSIH; raises `LoginFailure`."""


class LoginEngine:
    """See the module's docstring.  `close` must be called when the connection ends in any way."""

    def __init__(
        self,
        config: IscsiConfig,
        targets: Collection[str],
        *,
        book: ChallengeBook,
        random: Callable[[int], bytes],
        admit: Admit,
    ) -> None:
        self._config = config
        self._targets = targets
        self._book = book
        self._random = random
        self._admit = admit
        self._first: LoginRequest | None = None
        self._requests = 0
        self._collected = bytearray()
        self._stage: int | None = None
        self._initiator = ""
        self._target: str | None = None
        self._discovery = False
        self._declared: dict[str, str] = {}
        self._introduced = False
        self._chap_config: ChapConfig | None = None
        self._chap: ChapAuthenticator | None = None
        self._chap_chosen = False
        self._method_negotiated = False
        self._authenticated = False
        self._negotiation: Negotiation | None = None
        self.state = LoginState.RUNNING
        self.identity: LoginIdentity | None = None
        self.failure: LoginFailure | None = None

    @property
    def parameters(self) -> Parameters:
        """What was negotiated; meaningful when the login is complete."""
        return Parameters() if self._negotiation is None else self._negotiation.parameters

    @property
    def first_request(self) -> LoginRequest | None:
        return self._first

    @property
    def initiator(self) -> str:
        """The initiator's name as far as it is known and well formed."""
        return self._initiator

    def close(self) -> None:
        """Give up what belongs to the login alone: its open challenge."""
        if self._chap is not None:
            self._chap.close()

    def request(self, request: LoginRequest) -> LoginReply:
        """The answer to one request; `state` says afterwards how the login stands."""
        try:
            return self._request(request)
        except LoginFailure as failure:
            return self._fail(request, failure)
        except (TextError, NegotiationError) as error:
            return self._fail(request, LoginFailure(LoginStatus.INITIATOR_ERROR, str(error)))

    def _fail(self, request: LoginRequest, failure: LoginFailure) -> LoginReply:
        self.state = LoginState.FAILED
        self.failure = failure
        self.close()
        return LoginReply(
            status=failure.status,
            current_stage=request.current_stage,
            next_stage=request.next_stage if request.transit else None,
            isid=request.isid,
            tsih=request.tsih,
            tag=request.tag,
            text=b"",
        )

    def _request(self, request: LoginRequest) -> LoginReply:
        self._requests += 1
        if self._requests > self._config.limits.login_pdus:
            raise LoginFailure(LoginStatus.INVALID_REQUEST, "too many login requests")
        self._check_header(request)
        self._collected += request.data
        if len(self._collected) > self._config.limits.login_text:
            raise LoginFailure(LoginStatus.INVALID_REQUEST, "too much login text")
        if request.incomplete:
            return self._reply(request, [], None)
        pairs = parse_text(bytes(self._collected))
        self._collected.clear()
        answers: list[tuple[str, str]] = []
        if not self._introduced:
            self._introduce(pairs)
            if self._config.alias is not None:
                answers.append(("TargetAlias", self._config.alias))
            if not self._discovery:
                answers.append(("TargetPortalGroupTag", str(self._config.tpgt)))
        pairs = self._drop_declarations(pairs)
        if request.current_stage == SECURITY_STAGE:
            answers += self._security(pairs)
        else:
            answers += self._operational(pairs)
        return self._reply(request, answers, self._transition(request))

    # -- the header

    def _check_header(self, request: LoginRequest) -> None:
        first = self._first
        if first is None:
            self._first = first = request
            self._stage = request.current_stage
            if request.version_min > 0:
                raise LoginFailure(LoginStatus.UNSUPPORTED_VERSION, "only version 0 is known")
        if (request.isid, request.tsih, request.cid, request.tag, request.version_max) != (
            first.isid,
            first.tsih,
            first.cid,
            first.tag,
            first.version_max,
        ):
            raise LoginFailure(
                LoginStatus.INVALID_REQUEST, "ISID, TSIH, CID, task tag or version changed"
            )
        if request.current_stage > OPERATIONAL_STAGE or request.current_stage != self._stage:
            raise LoginFailure(
                LoginStatus.INVALID_REQUEST,
                f"stage {request.current_stage} where {self._stage} was due",
            )
        if request.transit and (
            request.incomplete
            or request.next_stage <= request.current_stage
            or request.next_stage not in (OPERATIONAL_STAGE, FULL_FEATURE)
        ):
            raise LoginFailure(
                LoginStatus.INVALID_REQUEST,
                f"transition from stage {request.current_stage} to {request.next_stage}",
            )

    # -- who is it

    def _introduce(self, pairs: list[tuple[str, str]]) -> None:
        """The declarations of the first request: initiator, session type, target."""
        self._introduced = True
        keys = dict(pairs)
        name = keys.get("InitiatorName")
        if name is None:
            raise LoginFailure(LoginStatus.MISSING_PARAMETER, "InitiatorName is missing")
        normalized = normalize_name(name)
        if normalized is None:
            raise LoginFailure(
                LoginStatus.INITIATOR_ERROR, f"InitiatorName is not an iSCSI name: {name[:80]!r}"
            )
        self._initiator = normalized
        kind = keys.get("SessionType", "Normal")
        if kind not in ("Normal", "Discovery"):
            raise LoginFailure(
                LoginStatus.SESSION_TYPE_NOT_SUPPORTED, f"SessionType is {kind[:80]!r}"
            )
        self._discovery = kind == "Discovery"
        acl = self._config.acl
        if acl is not None and normalized not in {entry.lower() for entry in acl}:
            raise LoginFailure(LoginStatus.FORBIDDEN, "the initiator is not in the ACL")
        if self._discovery:
            self._chap_config = self._config.discovery_chap
        else:
            self._chap_config = self._config.chap
            self._target = self._find_target(keys.get("TargetName"))
        self._authenticated = self._chap_config is None
        assert self._first is not None
        self._negotiation = Negotiation(self._config.parameters, discovery=self._discovery)

    def _find_target(self, name: str | None) -> str:
        if name is None:
            raise LoginFailure(LoginStatus.MISSING_PARAMETER, "TargetName is missing")
        normalized = normalize_name(name)
        if normalized is None or normalized not in self._targets:
            raise LoginFailure(LoginStatus.TARGET_NOT_FOUND, f"no target named {name[:80]!r}")
        return normalized

    def _drop_declarations(self, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """The pairs that are left after the declarations, which must not change."""
        rest: list[tuple[str, str]] = []
        for key, value in pairs:
            if key not in _DECLARATIONS:
                rest.append((key, value))
            elif self._declared.setdefault(key, value) != value:
                raise LoginFailure(LoginStatus.INITIATOR_ERROR, f"{key} changed during the login")
        return rest

    # -- the two stages

    def _security(self, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
        keys = dict(pairs)
        answers: list[tuple[str, str]] = []
        if "AuthMethod" in keys:
            answers.append(("AuthMethod", self._choose_method(keys["AuthMethod"])))
        chap_keys = {key: value for key, value in pairs if key.startswith("CHAP_")}
        if chap_keys:
            answers += self._chap_step(chap_keys)
        for key in keys:
            if key in _TARGET_ONLY or key in KEYS:
                raise LoginFailure(
                    LoginStatus.INITIATOR_ERROR, f"{key} does not belong into the security stage"
                )
            if key not in _SECURITY_KEYS:
                answers.append((key, NOT_UNDERSTOOD))
        return answers

    def _choose_method(self, offered: str) -> str:
        if self._method_negotiated:
            raise LoginFailure(LoginStatus.INITIATOR_ERROR, "AuthMethod is negotiated twice")
        self._method_negotiated = True
        methods = offered.split(",")
        if self._chap_config is not None:
            if "CHAP" in methods:
                self._chap_chosen = True
                self._chap = ChapAuthenticator(self._chap_config, self._book, self._random)
                return "CHAP"
            raise LoginFailure(
                LoginStatus.AUTHENTICATION_FAILED, f"CHAP is required, {offered[:80]!r} offered"
            )
        if "None" in methods:
            return "None"
        raise LoginFailure(
            LoginStatus.AUTHENTICATION_FAILED, f"no method of {offered[:80]!r} is configured"
        )

    def _chap_step(self, keys: dict[str, str]) -> list[tuple[str, str]]:
        if self._chap is None or self._authenticated:
            raise LoginFailure(LoginStatus.INITIATOR_ERROR, "CHAP keys outside of CHAP")
        try:
            if "CHAP_A" in keys:
                if len(keys) > 1:
                    raise ChapError("CHAP_A together with other CHAP keys")
                return self._chap.start(keys["CHAP_A"])
            answer = self._chap.finish(keys, self._initiator)
        except ChapError as error:
            raise LoginFailure(LoginStatus.AUTHENTICATION_FAILED, str(error)) from error
        self._authenticated = True
        return answer

    def _operational(self, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
        if not self._authenticated:
            raise LoginFailure(
                LoginStatus.AUTHENTICATION_FAILED, "the initiator skipped authentication"
            )
        for key, _ in pairs:
            if key in _SECURITY_KEYS or key in _TARGET_ONLY:
                raise LoginFailure(
                    LoginStatus.INITIATOR_ERROR, f"{key} does not belong into this stage"
                )
        assert self._negotiation is not None
        return self._negotiation.answer(pairs)

    def _transition(self, request: LoginRequest) -> int | None:
        """The stage to go to, or None to stay."""
        if not request.transit:
            return None
        if not self._authenticated:
            if self._chap_chosen and not (self._chap is not None and self._chap.started):
                return None  # AuthMethod was just agreed on; CHAP_A comes next
            if self._chap is not None and self._requests_chap():
                return None
            raise LoginFailure(
                LoginStatus.AUTHENTICATION_FAILED, "the initiator skipped authentication"
            )
        return request.next_stage

    def _requests_chap(self) -> bool:
        return self._chap is not None and self._chap.started and not self._authenticated

    def _reply(
        self, request: LoginRequest, answers: list[tuple[str, str]], next_stage: int | None
    ) -> LoginReply:
        tsih = request.tsih
        if next_stage == FULL_FEATURE:
            self.identity = LoginIdentity(
                initiator=self._initiator,
                isid=request.isid,
                tsih=request.tsih,
                cid=request.cid,
                target=self._target,
                user=self._chap.user if self._chap is not None else None,
            )
            if request.current_stage == SECURITY_STAGE and self._negotiation is not None:
                # Straight to full feature phase: the initiator wants the defaults.
                self._negotiation.answer([])
                self._negotiation.parameters.max_receive_segment = MAX_LOGIN_SEGMENT
            tsih = self._admit(self.identity)
            self.state = LoginState.COMPLETE
            self.close()
        if next_stage is not None:
            self._stage = next_stage
        text = encode_text(answers)
        if len(text) > MAX_LOGIN_SEGMENT:
            raise LoginFailure(LoginStatus.INITIATOR_ERROR, "too many unknown keys")
        return LoginReply(
            status=LoginStatus.SUCCESS,
            current_stage=request.current_stage,
            next_stage=next_stage,
            isid=request.isid,
            tsih=tsih,
            tag=request.tag,
            text=text,
        )
