"""ploopd: serves ploop disk images as SCSI disks, and holds I/O while their storage is away."""

__version__ = "0.1.0"
