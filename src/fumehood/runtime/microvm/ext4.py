"""A read-only ext4 image of a directory, the same bytes for the same files, whoever makes it and when.

mke2fs -d sorts names and takes its ids from us. What it copies from the source files and nobody can set there (owner, ctime) is
written over in the inode tables afterwards. Layout: docs.kernel.org/filesystems/ext4, "Super Block", "Inode Table".
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
from pathlib import Path

from fumehood.errors import SetupFailed

EPOCH_S = 1_000_000_000
_BLOCK_BYTES, _INODE_BYTES, _FIRST_FREE_INODE = 4096, 256, 11
_UUID, _HASH_SEED = "66756d65-686f-4f64-8000-000000000001", "66756d65-686f-4f64-8000-000000000002"
# No journal: nobody writes. No checksums of metadata: they would have to be made again for the inodes that are written over,
# and the manifest has the digest of the whole image.
_FEATURES = "^has_journal,^resize_inode,^metadata_csum,^metadata_csum_seed,^64bit,^orphan_file,extent,filetype,sparse_super"
_SUPER_OFFSET, _SUPER_BYTES = 1024, 1024
# Offsets in an inode: low uid; atime, ctime, mtime; low gid; high uid and gid; the extra bits of times, creation time.
_UID, _TIMES, _GID, _HIGH_IDS, _EXTRA_TIMES = 2, 8, 24, 120, 132


def make(root: Path, image: Path) -> None:
    """Raises SetupFailed when e2fsprogs are missing or refuse."""
    blocks, inodes = _needs(root)
    command = [_mke2fs(), "-q", "-F", "-t", "ext4", "-b", str(_BLOCK_BYTES), "-I", str(_INODE_BYTES), "-N", str(inodes)]
    options = f"hash_seed={_HASH_SEED},lazy_itable_init=0,root_owner=0:0,no_copy_xattrs"
    command += ["-m", "0", "-O", _FEATURES, "-U", _UUID, "-E", options, "-d", str(root), str(image), str(blocks)]
    environment = {"LC_ALL": "C", "PATH": "/usr/sbin:/usr/bin", "E2FSPROGS_FAKE_TIME": str(EPOCH_S)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SetupFailed("mke2fs made no image", cause=done.stderr.strip()[-500:])
    _normalise(image)


def _mke2fs() -> str:
    found = shutil.which("mke2fs", path=f"{os.defpath}:/usr/sbin:/sbin")
    if found is None:
        raise SetupFailed("no mke2fs", cause="it makes the guest's file system", remediation="apt-get install e2fsprogs")
    return found


def _needs(root: Path) -> tuple[int, int]:
    """(blocks, inodes) with a little room: nothing is ever added."""
    files = list(root.rglob("*"))
    inodes = len(files) + _FIRST_FREE_INODE + 16
    data = sum(-(-p.lstat().st_size // _BLOCK_BYTES) for p in files)
    return data + inodes * _INODE_BYTES // _BLOCK_BYTES + data // 50 + 1024, inodes


def _normalise(image: Path) -> None:
    """Every inode in use belongs to root and was last touched at EPOCH_S."""
    with image.open("r+b") as file:
        file.seek(_SUPER_OFFSET)
        block = file.read(_SUPER_BYTES)
        inodes, blocks = struct.unpack_from("<II", block, 0)
        blocks_per_group, inodes_per_group = struct.unpack_from("<I4xI", block, 32)
        for group in range(-(-blocks // blocks_per_group)):
            file.seek(_BLOCK_BYTES + 32 * group + 8)
            (table,) = struct.unpack("<I", file.read(4))
            count = min(inodes_per_group, inodes - group * inodes_per_group)
            file.seek(table * _BLOCK_BYTES)
            inodes_of_group = bytearray(file.read(count * _INODE_BYTES))
            for start in range(0, len(inodes_of_group), _INODE_BYTES):
                _own(inodes_of_group, start)
            file.seek(table * _BLOCK_BYTES)
            file.write(inodes_of_group)


def _own(table: bytearray, start: int) -> None:
    if struct.unpack_from("<H", table, start)[0] == 0:
        return
    struct.pack_into("<H", table, start + _UID, 0)
    struct.pack_into("<3I", table, start + _TIMES, EPOCH_S, EPOCH_S, EPOCH_S)
    struct.pack_into("<H", table, start + _GID, 0)
    struct.pack_into("<2H", table, start + _HIGH_IDS, 0, 0)
    struct.pack_into("<5I", table, start + _EXTRA_TIMES, 0, 0, 0, EPOCH_S, 0)
