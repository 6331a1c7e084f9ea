"""The standby gate: a pure state machine and the block device in front of every volume."""
