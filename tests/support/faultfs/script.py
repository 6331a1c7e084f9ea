"""The language of the fault file system: one rule or command per line.

Pure: text in, frozen values out.  The package's docstring describes the language.
"""

from __future__ import annotations

import errno
import fnmatch
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass

DATA = ("read", "write")
OPERATIONS = frozenset(
    (
        *DATA,
        *("open", "create", "flush", "release", "fsync", "truncate"),
        *("lookup", "getattr", "setattr", "statfs", "readdir", "fsyncdir"),
        *("rename", "unlink", "link", "symlink", "readlink", "mknod", "mkdir", "rmdir"),
    )
)
STICKY = frozenset({"write", "fsync", "flush", "truncate"})
"""What answers the error of an inode that errors stick to; MooseFS' reads go on."""

REGIONS = ("header", "bat", "data")
VERBS = ("fail", "delay", "hang", "short", "cache")
COMMANDS = ("clear", "release", "lose", "sync", "dead", "alive", "unstick", "reset")


class ScriptError(ValueError):
    """A line that is neither a rule nor a command; the text says what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Bytes [start, stop) of a file, or a region of a ploop image, found when it is needed.

    `region` is "header", "bat", "data" or "cluster"; `cluster` numbers a cluster of the disk.
    """

    start: int = 0
    stop: int | None = None
    region: str | None = None
    cluster: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What happens to operations on matching paths.

    After `skip` matching operations it is done to every `every`-th one, `count` times (None: until
    cleared): wait `seconds`, hang, then fail with `errno`, or shorten to `short` bytes.  `stick`
    keeps the error on the inode; `lose` drops what is not synced, `late` seconds before the error
    is answered; `cache` keeps writes in memory until an fsync ("honest") or for ever ("lie").
    """

    text: str
    path: str
    operations: frozenset[str]
    errno: int = 0
    seconds: float = 0.0
    late: float = 0.0
    hang: bool = False
    short: int | None = None
    cache: str | None = None
    stick: bool = False
    lose: bool = False
    skip: int = 0
    every: int = 1
    count: int | None = None
    range: Range | None = None

    def concerns(self, paths: Iterator[str] | tuple[str, ...], operation: str) -> bool:
        return operation in self.operations and any(
            fnmatch.fnmatchcase(path, self.path) for path in paths
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """Something to do now: `argument` is a path glob, a rule's number or an errno's name.

    `dead` waits until so many bytes are `unsynced`.
    """

    name: str
    argument: str | None = None
    keep: float = 0.0
    seed: int = 0
    unsynced: int = 0


def parse(text: str) -> list[Rule | Command]:
    """The rules and commands in `text`; empty lines and `# …` are nothing.

    Raises ScriptError naming the line.
    """
    lines = (line.strip() for line in text.splitlines())
    return [parse_line(line) for line in lines if line and not line.startswith("#")]


def parse_line(line: str) -> Rule | Command:
    try:
        words = shlex.split(line, comments=True)
        if words[0] in VERBS:
            return _rule(line, words)
        if words[0] in COMMANDS:
            return _command(words)
        known = ", ".join((*VERBS, *COMMANDS))
        raise ScriptError(f"{words[0]!r} is none of {known}")
    except ValueError as error:
        raise ScriptError(f"{line!r}: {error}") from error


def _rule(line: str, words: list[str]) -> Rule:
    verb, path, *rest = words if len(words) > 1 else (*words, "*")
    if verb == "cache":
        operations = "write,fsync"
    elif rest and "=" not in rest[0]:
        operations, *rest = rest
    else:
        raise ScriptError(f"{verb} PATH OPERATION[,OPERATION…] [NAME=VALUE…]")
    options = dict(_option(verb, word) for word in rest)
    _require_complete(verb, options)
    if verb == "hang":
        options["hang"] = True
    if verb == "cache":
        options.setdefault("cache", "honest")
    rule = Rule(text=line, path=path, operations=_operations(operations), **options)  # type: ignore[arg-type]
    if rule.range is not None and not rule.operations <= set(DATA):
        raise ScriptError("a range is for read and write only")
    if rule.short is not None and not rule.operations <= set(DATA):
        raise ScriptError("only read and write can be short")
    return rule


def _require_complete(verb: str, options: dict[str, object]) -> None:
    needed = {"fail": "errno", "delay": "seconds", "short": "short"}.get(verb)
    if needed is not None and needed not in options:
        shown = {"short": "bytes"}.get(needed, needed)
        raise ScriptError(f"{verb} needs {shown}=…")


def _operations(text: str) -> frozenset[str]:
    if text == "*":
        return OPERATIONS
    wanted = frozenset(text.split(","))
    if unknown := sorted(wanted - OPERATIONS):
        known = ", ".join(sorted(OPERATIONS))
        raise ScriptError(f"{unknown[0]!r} is no operation; they are {known}, or * for all")
    return wanted


def _option(verb: str, word: str) -> tuple[str, object]:
    name, given, value = word.partition("=")
    if not given:
        if verb in ("fail", "hang") and name in ("stick", "lose"):
            return name, True
        raise ScriptError(f"{word!r} is no option of {verb}")
    if verb == "cache":
        if name == "fsync" and value in ("honest", "lie"):
            return "cache", value
        raise ScriptError(f"{word!r}: cache takes fsync=honest or fsync=lie")
    readers: dict[str, tuple[str, Callable[[str], object]]] = {
        "errno": ("errno", errno_of),
        "seconds": ("seconds", _seconds),
        "late": ("late", _seconds),
        "bytes": ("short", size_of),
        "skip": ("skip", _at_least(0)),
        "every": ("every", _at_least(1)),
        "count": ("count", _at_least(1)),
        "range": ("range", range_of),
    }
    verbs = {"bytes": ("short",), "late": ("fail", "hang")}
    if name not in readers or verb not in verbs.get(name, VERBS):
        raise ScriptError(f"{word!r} is no option of {verb}")
    field, read = readers[name]
    return field, read(value)


def _command(words: list[str]) -> Command:
    name, *rest = words
    options = dict(word.split("=", 1) for word in rest if "=" in word)
    plain = [word for word in rest if "=" not in word]
    allowed = {"lose": {"keep", "seed"}, "dead": {"unsynced"}}.get(name, set())
    if set(options) - allowed or len(plain) > 1:
        raise ScriptError(f"{name} takes at most one argument")
    if name in ("alive", "reset") and plain:
        raise ScriptError(f"{name} takes no argument")
    if name == "dead" and plain:
        errno_of(plain[0])
    return Command(
        name=name,
        argument=plain[0] if plain else None,
        keep=float(options.get("keep", 0)),
        seed=int(options.get("seed", 0)),
        unsynced=size_of(options.get("unsynced", "0")),
    )


def errno_of(text: str) -> int:
    """An errno by its name."""
    number = getattr(errno, text, None)
    if not isinstance(number, int):
        raise ScriptError(f"{text!r} is no errno; name one as in EIO")
    return number


def size_of(text: str) -> int:
    """Bytes: a number, with k, m or g for powers of 1024."""
    factor = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}.get(text[-1:].lower(), 1)
    digits = text if factor == 1 else text[:-1]
    if not digits.isdecimal():
        raise ScriptError(f"{text!r} is no number of bytes")
    return int(digits) * factor


def range_of(text: str) -> Range:
    """`START-END` (END not included), `START-`, `START+LENGTH`, a region, or `cluster:N`."""
    if text in REGIONS:
        return Range(region=text)
    kind, colon, number = text.partition(":")
    if kind == "cluster" and colon:
        return Range(region="cluster", cluster=_at_least(0)(number))
    if "+" in text:
        start, length = (size_of(part) for part in text.split("+", 1))
        return Range(start=start, stop=start + length)
    first, dash, last = text.partition("-")
    if not dash:
        raise ScriptError(f"{text!r} is no range: START-END, START+LENGTH, {', '.join(REGIONS)}")
    return Range(start=size_of(first), stop=size_of(last) if last else None)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1e6:
        raise ScriptError(f"{text!r} is no number of seconds")
    return value


def _at_least(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise ScriptError(f"{text!r} is no number from {least}")
        return int(text)

    return read
