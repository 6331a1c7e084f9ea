"""The kernel's target (LIO) as a front end: commands come through TCMU's shared ring.

`ring` and `netlink` speak the kernel's formats and do no I/O, `handler` connects a ring with a
logical unit, `server` is the only module that waits for anything.
"""
