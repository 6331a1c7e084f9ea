"""What is said of a file that cannot be opened."""

from __future__ import annotations

import errno

import pytest

from ploopd.errors import DeniedError, NotFoundError, ReadOnlyError, StorageError, open_error


@pytest.mark.parametrize(
    ("path", "setting"),
    [
        ("/root/a.hds", "ProtectHome=no"),
        ("/home/x/a.hds", "ProtectHome=no"),
        ("/tmp/a.hds", "PrivateTmp=no"),
        ("/var/tmp/x/a.hds", "PrivateTmp=no"),
        ("/srv/a.hds", None),
        ("/homes/a.hds", None),
    ],
)
def test_a_file_that_a_unit_may_hide(
    path: str, setting: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = FileNotFoundError(errno.ENOENT, "x")
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert open_error(error, path).hint is None
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    hint = open_error(error, path).hint
    assert hint is None if setting is None else hint is not None and hint.endswith(setting)


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOENT, NotFoundError),
        (errno.EACCES, DeniedError),
        (errno.EPERM, DeniedError),
        (errno.EROFS, ReadOnlyError),
        (errno.EIO, StorageError),
    ],
)
def test_the_class_says_what_to_do(number: int, kind: type[Exception]) -> None:
    assert type(open_error(OSError(number, "x"), "/srv/a")) is kind
