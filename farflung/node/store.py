"""The disk: everything a member keeps, and the only module that knows where.

    HOME/identity.key  tls.crt  tls.key
    HOME/runs/RUN_ID/
        lock  genesis  invite  peers.json  status.json  rounds.jsonl
        certificates.log  journal  blobs/  snapshots/  local/

All functions are synchronous and wait for the disk: the node calls them from an executor. Whatever returned is still
there after kill -9 or a power cut, and a full disk is a ConfigError that loses nothing.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farflung.node.blobfiles import BlobFiles, FileSource, PartialFile
from farflung.node.durable import create_secret, make_directory, replace_file, room, sweep
from farflung.node.journal import CertificateLog, Journal, RoundLog
from farflung.node.local_state import LocalState, LocalStates
from farflung.node.snapshots import Snapshot, Snapshots, SnapshotSource
from farflung.protocol.blob import BlobRef
from farflung.protocol.errors import ConfigError, LocalError
from farflung.protocol.identity import Identity

if TYPE_CHECKING:
    from torch import Tensor

_SEED_BYTES = 32
_PRIVATE = 0o600
_HELD: set[Path] = set()
"""Runs this very process has open: fcntl locks do not stop a process from opening a file twice."""


def open_home(root: Path) -> Home:
    """The directory where a member keeps everything, created if need be. Raises ConfigError if it cannot be used."""
    root = Path(root).expanduser().absolute()
    try:
        make_directory(root)
    except OSError as error:
        raise ConfigError(f"cannot use {root}: {error.strerror}; choose another directory") from error
    return Home(root)


class Home:
    """A member's home directory: its identity, its TLS certificate and its runs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.identity = _identity(root / "identity.key")

    def tls(self, make: Callable[[], tuple[bytes, bytes]]) -> tuple[bytes, bytes]:
        """Certificate and private key (PEM), the same ones at every start; `make` is called once, for the first."""
        certificate, key = self.root / "tls.crt", self.root / "tls.key"
        if certificate.exists() and key.exists():
            _check_private(key)
            return certificate.read_bytes(), key.read_bytes()
        certificate_pem, key_pem = make()
        certificate.unlink(missing_ok=True)  # a certificate is only there when its own key is
        replace_file(key, key_pem, mode=_PRIVATE)
        replace_file(certificate, certificate_pem)
        return certificate_pem, key_pem

    def run(self, run_id: bytes) -> RunStore:
        """Open a run's directory. Raises ConfigError while another process has it open."""
        return RunStore(make_directory(self.root / "runs" / run_id.hex()))

    def runs(self) -> list[bytes]:
        """The runs there are directories for."""
        return sorted(bytes.fromhex(path.name) for path in (self.root / "runs").glob("*") if path.is_dir())


def _identity(path: Path) -> Identity:
    if not path.exists():
        create_secret(path, os.urandom(_SEED_BYTES))
    _check_private(path)
    seed = path.read_bytes()
    if len(seed) != _SEED_BYTES:
        raise ConfigError(
            f"{path} is not an identity: {len(seed)} bytes; restore it, or remove it to become a new peer"
        )
    return Identity(seed)


def _check_private(path: Path) -> None:
    if path.stat().st_mode & 0o077:
        raise ConfigError(f"others can read {path}; run: chmod 600 {path}")


class RunStore:
    """What a member keeps of one run. Close it, or use it in a `with` block; a dead process's lock is no obstacle."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = _lock(directory / "lock")
        try:
            sweep(directory)
            self.certificates = CertificateLog(directory / "certificates.log")
            self.journal = Journal(directory / "journal")
            self.rounds = RoundLog(directory / "rounds.jsonl")
            self.blobs = BlobFiles(directory / "blobs")
            self.snapshots = Snapshots(directory / "snapshots")
            self.local = LocalStates(directory / "local")
        except BaseException:
            self._unlock()
            raise

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of files and lock; closing twice is fine."""
        for part in (self.certificates, self.journal, self.rounds):
            part.close()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
            _HELD.discard(self.directory)

    # -- genesis, invite, peers, status ------------------------------------------------------------------------------

    @property
    def genesis(self) -> bytes | None:
        """The run's genesis bytes, once they are known."""
        return _read(self.directory / "genesis")

    def write_genesis(self, data: bytes) -> None:
        """Keep the genesis. Raises LocalError if there is another one: a run has one genesis for ever."""
        if self.genesis is None:
            replace_file(self.directory / "genesis", data)
        elif self.genesis != data:
            raise LocalError(f"a second genesis for run {self.directory.name[:8]}")

    @property
    def invite(self) -> str | None:
        """The invite this member joined with, or made."""
        data = _read(self.directory / "invite")
        return None if data is None else data.decode()

    def write_invite(self, text: str) -> None:
        """Keep the invite; it may hold the join secret, so only its owner can read it."""
        replace_file(self.directory / "invite", text.encode(), mode=_PRIVATE)

    @property
    def port(self) -> int:
        """The port listened on last time, which records and invites remember; 0: none yet."""
        try:
            return int(_read(self.directory / "port") or b"0")
        except ValueError:
            return 0

    def write_port(self, port: int) -> None:
        """Keep the port."""
        replace_file(self.directory / "port", str(port).encode())

    def save_peers(self, records: Sequence[bytes]) -> None:
        """Keep encoded peer records: after a restart of everybody they are how members find each other."""
        text = json.dumps([record.decode("ascii") for record in records], indent=0)
        replace_file(self.directory / "peers.json", text.encode())

    def load_peers(self) -> list[bytes]:
        """The records saved last, not checked; none if there are none or the file is damaged."""
        try:
            saved = json.loads(_read(self.directory / "peers.json") or b"[]")
            return [str(record).encode("ascii") for record in saved] if isinstance(saved, list) else []
        except ValueError:
            return []

    def write_status(self, status: Mapping[str, Any]) -> None:
        """Replace what `farflung status` shows. Not synced: it is of now."""
        path = self.directory / "status.json"
        temporary = path.with_name("status.json.tmp")
        with room(path):
            temporary.write_text(json.dumps(status, sort_keys=True))
            os.replace(temporary, path)

    # -- the disk's parts under the names the node uses --------------------------------------------------------------

    def append_certificate(self, round_index: int, certificate: bytes) -> None:
        """Keep the next round's certificate; on the disk when this returns."""
        self.certificates.append(round_index, certificate)

    def certificate(self, round_index: int) -> bytes | None:
        """A round's certificate, if it is here."""
        return self.certificates.certificate(round_index)

    def begin_round(self, round_index: int, announced: int = 0) -> None:
        """Start a new journal. Raises LocalError before the certificate of the round before is on the disk.

        `announced`: the latest round in which this member announced a payload; 0: none.
        """
        if round_index > self.certificates.next_round:
            raise LocalError(f"a journal of round {round_index} after certificate {self.certificates.next_round - 1}")
        self.journal.reset(round_index, announced)

    def end_round(self, round_index: int, certificate: bytes, announced: int) -> None:
        """Keep a round's certificate, then begin the next one's journal."""
        self.append_certificate(round_index, certificate)
        self.begin_round(round_index + 1, announced)

    def partial(self, ref: BlobRef, digests: Sequence[bytes]) -> PartialFile:
        """Begin to receive a blob, or resume."""
        return self.blobs.partial(ref, digests)

    def blob(self, digest: bytes) -> FileSource | None:
        """A whole blob, if it is here."""
        return self.blobs.blob(digest)

    def put(self, data: bytes | memoryview, ref: BlobRef, digests: Sequence[bytes]) -> FileSource:
        """Keep a whole blob; on the disk when this returns."""
        return self.blobs.put(data, ref, digests)

    def drop(self, digest: bytes) -> None:
        """Forget a blob."""
        self.blobs.drop(digest)

    def write_snapshot(
        self, round_index: int, theta: Any, buffers: Mapping[str, Any], meta: Mapping[str, Any] | None = None
    ) -> Snapshot:
        """Keep the state after a round; on the disk when this returns."""
        return self.snapshots.write(round_index, theta, buffers, meta)

    def latest_snapshot(self) -> Snapshot | None:
        """The newest sound snapshot."""
        return self.snapshots.latest()

    def snapshot_source(self, round_index: int) -> SnapshotSource | None:
        """A snapshot's state stream, to serve from."""
        return self.snapshots.source(round_index)

    def write_local(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Keep this member's own checkpoint; on the disk when this returns."""
        self.local.write(tensors, meta)

    def read_local(self) -> tuple[LocalState | None, str]:
        """The newest whole checkpoint, and why newer ones were passed over ("" if none were)."""
        return self.local.read()


def read_status(directory: Path) -> dict[str, Any] | None:
    """What a node last wrote for `farflung status`; needs no lock. None if there is nothing to read."""
    try:
        status = json.loads(_read(directory / "status.json") or b"null")
    except ValueError:
        return None
    return status if isinstance(status, dict) else None


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _lock(path: Path) -> int:
    """Lock a run for this process. An fcntl lock dies with the process and is not inherited by what it forks."""
    if path.parent in _HELD:
        raise ConfigError(f"{path.parent} is in use by this process (pid {os.getpid()})")
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "?"
        os.close(handle)
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            raise ConfigError(f"cannot lock {path}: {error.strerror}; is it on a file system without locks?") from error
        raise ConfigError(f"{path.parent} is in use by process {owner}; stop it first") from None
    _HELD.add(path.parent)
    with room(path):
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    return handle
