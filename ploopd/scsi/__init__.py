"""SCSI: logical units, nexuses and commands.  No I/O."""
