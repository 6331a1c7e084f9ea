"""What to type to use a disk that is being served."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ploopd.control.paths import default_control_path

if TYPE_CHECKING:
    from ploopd.daemon import Export

_HINTS = """
The disk is ready.  In another terminal, with open-iscsi as root:

  iscsiadm -m discovery -t sendtargets -p {portal}
  iscsiadm -m node -T {iqn} -p {portal} --login
  lsblk -S
  mount /dev/disk/by-path/ip-{portal}-iscsi-{iqn}-lun-{lun} /mnt
  umount /mnt
  iscsiadm -m node -T {iqn} -p {portal} --logout

with QEMU or libiscsi as any user:

  qemu-img info {url}
  qemu-img convert -p -O qcow2 {url} copy.qcow2
  iscsi-ls -s iscsi://{portal}

and to look at the daemon:

  {ploopctl} device list
  {ploopctl} device show {device}

Stop it with Ctrl-C.
"""


def usage_hints(export: Export, control: Path) -> str:
    """The commands for one LUN, as text."""
    portal, iqn, lun = export.url.removeprefix("iscsi://").rsplit("/", 2)
    ploopctl = _ploopctl()
    if control != default_control_path():
        ploopctl += f" --control {shlex.quote(str(control))}"
    return _HINTS.format(
        portal=portal,
        iqn=iqn,
        lun=lun,
        url=export.url,
        device=export.device,
        ploopctl=ploopctl,
    )


def _ploopctl() -> str:
    """What to type for the `ploopctl` that belongs to this program."""
    ours = os.path.join(os.path.dirname(sys.executable), "ploopctl")
    found = shutil.which("ploopctl")
    if found is not None and os.path.realpath(found) == os.path.realpath(ours):
        return "ploopctl"
    return shlex.quote(os.path.relpath(ours))
