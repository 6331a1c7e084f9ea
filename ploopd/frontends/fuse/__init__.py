"""The FUSE front end: devices as sysfs shows them, and each disk as one file."""
