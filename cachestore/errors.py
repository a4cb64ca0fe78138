"""What can go wrong at the store's door. Everything else a store meets becomes a miss or a `NotStored`."""

from __future__ import annotations


class StoreError(Exception):
    """The store cannot be opened or used; the message says which file and what to do."""


class StoreLocked(StoreError):
    """Another process writes this data directory."""


class NotOurLog(StoreError):
    """The file is a database of something else."""


class NewerLog(StoreError):
    """The log was written by a newer Hitpath."""


class LogDamaged(Exception):
    """The database file itself is broken; the store moves it aside and begins a new one."""
