"""The embedded iSCSI target: sans-IO modules, and `server`, the only one that does I/O."""
