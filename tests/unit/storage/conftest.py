"""Fixtures of this directory."""

from tests.support.volumes import shm

__all__ = ["shm"]
