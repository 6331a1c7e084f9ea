"""A pass-through FUSE file system whose operations fail, wait, hang or lie on demand.

    python -m tests.support.faultfs SOURCE MOUNTPOINT --control FILE

shows the files of SOURCE under MOUNTPOINT.  Each line written to the control file is a rule or a
command, in force when the write returns; a wrong one fails with EINVAL.  Reading it shows (as
JSON) rules with their hits, open descriptors, what is not synced and what sticks.

Rules; the first one that is due decides.  PATH is a glob relative to SOURCE:

    fail  PATH OPERATIONS errno=NAME [seconds=S] [stick] [lose] [late=S] [WHEN]
    delay PATH OPERATIONS seconds=S [WHEN]
    hang  PATH OPERATIONS [errno=NAME] [WHEN]      until `release` or `clear`, then done or failed
    short PATH read|write bytes=N [WHEN]           at most N bytes
    cache PATH [fsync=honest|lie]                  writes are acknowledged and kept in memory

OPERATIONS are names with commas between them, or `*`.  WHEN: `skip=N` (not the first N), `every=N`
(only every N-th), `count=N` (N times), `range=START-END`, `range=START+LENGTH`, and for ploop
images `range=header|bat|data|cluster:N` (the N-th cluster of the disk, where it is now).

`stick`: the error sticks to the inode: write, truncate, fsync and close answer it through every
descriptor until the last one that was open then is closed.  `lose`: what is not synced is dropped;
with `stick`, reading fails until then, too.  `late`: the error is answered S seconds after that.

Commands: `clear [RULE|PATH]` drops rules, `release [RULE|PATH]` lets go what hangs, `lose [PATH]
[keep=SHARE] [seed=N]` drops what is not synced, `sync [PATH]` writes it, `dead [ERRNO]
[unsynced=BYTES]` makes everything fail until `alive`, at once or after the write that leaves so
much not synced, `unstick [PATH]` ends what sticks, `reset` sets counters to 0.

What pyfuse3 does not offer is the kernel's: fallocate answers EOPNOTSUPP, as on many network file
systems; locks (POSIX, OFD, flock) are those of the mount, not of SOURCE; SEEK_DATA and SEEK_HOLE
see one piece of data with a hole at its end.  There are no extended attributes.
"""

from tests.support.faultfs.client import FaultFs, FaultFsError
from tests.support.faultfs.script import OPERATIONS

__all__ = ["OPERATIONS", "FaultFs", "FaultFsError"]
