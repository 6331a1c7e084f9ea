"""Standby episodes without an event loop: a disk, its storage, its users and its operator as one
random walk on a virtual clock, checked by a model of order, exactly-once and durability."""
