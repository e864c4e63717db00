"""The catalogue's tables and their versions, and how a drive of an older version is brought up to date."""

import os
import stat
import time

from kvfs.catalogue_connection import CatalogueConnection
from kvfs.files.file_catalogue import FILE_SCHEMA, INSERT_INODE
from kvfs.objects.object_catalogue import OBJECT_SCHEMA
from kvfs.prefix.prefix_catalogue import PREFIX_SCHEMA
from kvfs.sealing.derived_catalogue import DERIVED_SCHEMA
from kvfs.sequence_attributes import IMPORTING, OWNER
from kvfs.tree import ROOT_INODE

SCHEMA_VERSION = 6
OLDEST_VERSION = 1  # that is brought up to date when it is opened
SET_VERSION = 7  # version 6 of a drive that is one of a set, and of no use alone
OLD_SET_VERSIONS = (3, 5)  # versions 2 and 4 of one
PREFIX_VERSION = 4  # the first with prefix entries and objects
SET_SCHEMA = """
CREATE TABLE set_membership (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    record BLOB NOT NULL           -- drive_set/membership.py
) STRICT;
"""
SCHEMA = """
CREATE TABLE model (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    num_layers INTEGER NOT NULL,
    num_query_heads INTEGER NOT NULL,
    num_kv_heads INTEGER NOT NULL,
    head_dim INTEGER NOT NULL,
    dtype TEXT NOT NULL,
    group_tokens INTEGER NOT NULL
) STRICT;
CREATE TABLE sequence (
    id INTEGER PRIMARY KEY,
    model_id INTEGER NOT NULL REFERENCES model(id),
    name TEXT NOT NULL UNIQUE,
    created_ns INTEGER NOT NULL,
    changed_ns INTEGER NOT NULL,
    num_tokens INTEGER NOT NULL,   -- complete in every layer
    num_spilled INTEGER NOT NULL,  -- of these, in whole pages of the groups; the rest is in the tail record
    tail_lba INTEGER NOT NULL,
    tail_lbas INTEGER NOT NULL     -- 0: no tail record
) STRICT;
CREATE TABLE kv_group (
    id INTEGER PRIMARY KEY,
    base_lba INTEGER NOT NULL UNIQUE,
    num_lbas INTEGER NOT NULL,
    reference_count INTEGER NOT NULL
) STRICT;
CREATE TABLE sequence_group (
    sequence_id INTEGER NOT NULL REFERENCES sequence(id),
    position INTEGER NOT NULL,     -- token group of the sequence
    group_id INTEGER NOT NULL REFERENCES kv_group(id),
    PRIMARY KEY (sequence_id, position)
) STRICT, WITHOUT ROWID;
CREATE TABLE token_chunk (
    sequence_id INTEGER NOT NULL REFERENCES sequence(id),
    position INTEGER NOT NULL,     -- first token of the chunk
    token_ids BLOB NOT NULL,       -- <u4, up to TOKEN_CHUNK of them
    PRIMARY KEY (sequence_id, position)
) STRICT, WITHOUT ROWID;
"""
ADDED_IN_VERSION_2 = (
    """
CREATE TABLE sequence_attribute (
    sequence_id INTEGER NOT NULL REFERENCES sequence(id),
    name TEXT NOT NULL,            -- sequence_attributes.py
    value BLOB NOT NULL,
    PRIMARY KEY (sequence_id, name)
) STRICT, WITHOUT ROWID;
"""
    + FILE_SCHEMA
)

# of drives made with it: opening one looks for these among very many
GOING_INDEX = f"""
CREATE INDEX sequence_attribute_going ON sequence_attribute (name)
    WHERE name = '{IMPORTING}' OR name = '{OWNER}'
"""


def upgrade(db: CatalogueConnection, version: int) -> None:
    """Bring tables of an older version up to date, in a transaction of the caller's."""
    if version < 2:
        _add_attributes_and_files(db)
    if version < PREFIX_VERSION:
        db.execute(PREFIX_SCHEMA)
        db.execute(OBJECT_SCHEMA)
    db.execute(DERIVED_SCHEMA)
    version = SET_VERSION if version in OLD_SET_VERSIONS else SCHEMA_VERSION
    db.execute(f"PRAGMA user_version = {version}")


def _add_attributes_and_files(db: CatalogueConnection) -> None:
    db.execute(ADDED_IN_VERSION_2)
    now = time.time_ns()
    mode = stat.S_IFDIR | 0o755
    root = (ROOT_INODE, ROOT_INODE, mode, 2, os.getuid(), os.getgid(), 0, 0, 0, now, now, now, None)
    db.execute(INSERT_INODE, root)
