"""The disk: what returned is there after any crash, what is damaged is noticed, and a full disk is a sentence."""

import errno
import os
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from farflung.node import durable
from farflung.node.journal import CertificateLog, FrameLog, Journal, RoundLog
from farflung.node.snapshots import Snapshots
from farflung.node.store import Home, RunStore, open_home, read_status
from farflung.protocol import limits
from farflung.protocol.blob import describe
from farflung.protocol.errors import ConfigError, LocalError, PeerError

RUN = bytes(range(32))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return open_home(tmp_path / "home")


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, after_bytes: int = 0, code: int = errno.ENOSPC) -> None:
    """Every write beyond `after_bytes` in total fails; the last one before it is cut short, as on a real disk."""
    left = [after_bytes]

    def limited(real):
        def write(handle, data, *rest):
            if left[0] <= 0:
                raise OSError(code, os.strerror(code))
            count = real(handle, memoryview(data)[: left[0]], *rest)
            left[0] -= count
            return count

        return write

    monkeypatch.setattr(os, "write", limited(os.write))
    monkeypatch.setattr(os, "pwrite", limited(os.pwrite))


# -- home ------------------------------------------------------------------------------------------------------------


def test_an_identity_is_kept_and_is_private(home):
    again = open_home(home.root)
    assert again.identity.peer_id == home.identity.peer_id
    path = home.root / "identity.key"
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        open_home(home.root)


def test_a_cut_identity_is_refused_and_not_replaced(home):
    path = home.root / "identity.key"
    path.write_bytes(b"short")
    with pytest.raises(ConfigError, match="5 bytes"):
        open_home(home.root)
    assert path.read_bytes() == b"short"


def test_the_tls_pair_is_made_once_and_again_only_as_a_pair(home):
    assert home.tls(lambda: (b"cert", b"key")) == (b"cert", b"key")
    assert home.tls(lambda: (b"other", b"other")) == (b"cert", b"key")
    assert (home.root / "tls.key").stat().st_mode & 0o777 == 0o600
    (home.root / "tls.crt").unlink()
    assert home.tls(lambda: (b"new", b"newkey")) == (b"new", b"newkey")


def test_a_run_is_open_once(home):
    with home.run(RUN):
        with pytest.raises(ConfigError, match=str(os.getpid())):
            home.run(RUN)
        code = f"from farflung.node.store import open_home; open_home({str(home.root)!r}).run({RUN!r})"
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert f"in use by process {os.getpid()}" in child.stderr
    home.run(RUN).close()
    assert home.runs() == [RUN]


def test_genesis_is_written_once(home):
    with home.run(RUN) as store:
        assert store.genesis is None
        store.write_genesis(b"one")
        store.write_genesis(b"one")
        with pytest.raises(LocalError):
            store.write_genesis(b"two")
    with home.run(RUN) as store:
        assert store.genesis == b"one"


def test_peers_invite_and_status_come_back(home):
    with home.run(RUN) as store:
        assert (store.load_peers(), store.invite) == ([], None)
        store.save_peers([b'{"a":1}', b'{"b":2}'])
        store.write_invite("farflung:x")
        store.write_status({"round": 3, "waiting": 1.5})
        assert store.load_peers() == [b'{"a":1}', b'{"b":2}']
        assert store.invite == "farflung:x"
        assert read_status(store.directory) == {"round": 3, "waiting": 1.5}
        (store.directory / "peers.json").write_bytes(b'["{')
        assert store.load_peers() == []


# -- logs ------------------------------------------------------------------------------------------------------------

ENTRIES = [b"", b"a", b"second" * 7, bytes(40), b"last"]


def test_a_log_cut_anywhere_keeps_every_whole_entry(tmp_path):
    log = FrameLog(tmp_path / "whole")
    ends = [0]
    for entry in ENTRIES:
        log.append(entry)
        ends.append((tmp_path / "whole").stat().st_size)
    log.close()
    data = (tmp_path / "whole").read_bytes()
    for size in range(len(data) + 1):
        (tmp_path / "cut").write_bytes(data[:size])
        log = FrameLog(tmp_path / "cut")
        kept = sum(end <= size for end in ends) - 1
        assert [log[index] for index in range(len(log))] == ENTRIES[:kept]
        assert log.cut_bytes == size - ends[kept]
        log.append(b"after")
        assert log[kept] == b"after"
        log.close()
    assert not (tmp_path / "cut.damaged").exists()


def test_a_tail_of_zeros_or_noise_is_cut(tmp_path):
    for tail in (bytes(1), bytes(5000), b"\0\0\0\4????noise"[:12]):
        log = FrameLog(tmp_path / "log")
        log.append(b"entry")
        count = len(log)
        log.close()
        with (tmp_path / "log").open("ab") as file:
            file.write(tail)
        log = FrameLog(tmp_path / "log")
        assert (len(log), log.cut_bytes) == (count, len(tail))
        log.close()


def test_damage_before_the_tail_is_kept_beside_the_log(tmp_path):
    log = FrameLog(tmp_path / "log")
    for entry in (b"first", b"second", b"third"):
        log.append(entry)
    log.close()
    data = bytearray((tmp_path / "log").read_bytes())
    data[8 + 5 + 8] ^= 1
    (tmp_path / "log").write_bytes(data)
    log = FrameLog(tmp_path / "log")
    assert [log[index] for index in range(len(log))] == [b"first"]
    assert b"third" in (tmp_path / "log.damaged").read_bytes()
    log.close()


def test_certificates_are_consecutive(tmp_path):
    log = CertificateLog(tmp_path / "certificates.log")
    log.append(0, b"zero")
    for wrong in (0, 2):
        with pytest.raises(LocalError):
            log.append(wrong, b"x")
    log.append(1, b"one")
    log.close()
    log = CertificateLog(tmp_path / "certificates.log")
    assert [log.certificate(index) for index in (-1, 0, 1, 2)] == [None, b"zero", b"one", None]
    log.close()


def test_a_journal_keeps_its_round_and_forgets_it_only_after_the_certificate(home):
    with home.run(RUN) as store:
        with pytest.raises(LocalError):
            store.journal.record("vote", b"too early")
        store.begin_round(0)
        store.journal.record("promise", b"p")
        store.journal.record("vote", b"")
        with pytest.raises(LocalError):
            store.begin_round(1)
    with home.run(RUN) as store:
        assert (store.journal.round_index, store.journal.read()) == (0, [("promise", b"p"), ("vote", b"")])
        store.append_certificate(0, b"c")
        store.begin_round(1)
        assert (store.journal.round_index, store.journal.read()) == (1, [])


def test_a_journal_cut_anywhere_opens(tmp_path):
    journal = Journal(tmp_path / "journal")
    journal.reset(7)
    start = (tmp_path / "journal").stat().st_size
    journal.record("vote", b"x" * 30)
    journal.close()
    data = (tmp_path / "journal").read_bytes()
    for size in range(start, len(data) + 1):
        (tmp_path / "journal").write_bytes(data[:size])
        journal = Journal(tmp_path / "journal")
        assert journal.round_index == 7
        assert journal.read() == ([("vote", b"x" * 30)] if size == len(data) else [])
        journal.close()


def test_a_journal_forgets_at_most_that_a_round_began(tmp_path):
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.reset(7)
    journal.record("own", b"x")
    before = path.stat().st_size
    journal.reset(8, 7)
    after = path.stat().st_size
    journal.record("vote", b"y")
    journal.close()
    data = path.read_bytes()
    for size in range(before, len(data) + 1):
        path.write_bytes(data[:size])
        journal = Journal(path)
        found = (journal.round_index, journal.announced, journal.read())
        journal.close()
        if size < after:
            assert found == (7, 0, [("own", b"x")])
        else:
            assert found == (8, 7, [("vote", b"y")] if size == len(data) else [])


def test_a_journal_does_not_grow_for_ever(tmp_path):
    journal = Journal(tmp_path / "journal")
    sizes = []
    for index in range(1, 60):
        journal.reset(index, index - 1)
        journal.record("proposal", bytes(1 << 15))
        sizes.append((tmp_path / "journal").stat().st_size)
        assert (journal.round_index, journal.announced) == (index, index - 1)
        assert journal.read() == [("proposal", bytes(1 << 15))]
    journal.close()
    assert max(sizes) < 2 << 20
    assert sorted(sizes) != sizes


def test_the_round_log_has_whole_lines_after_any_cut(tmp_path):
    path = tmp_path / "rounds.jsonl"
    log = RoundLog(path)
    log.append({"round": 1, "loss": 2.5})
    log.append({"round": 2})
    log.close()
    data = path.read_bytes()
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        RoundLog(path).close()
        kept = path.read_bytes()
        assert data.startswith(kept)
        assert kept.count(b"\n") == data[:size].count(b"\n")
        assert not kept or kept.endswith(b"\n")


# -- blobs -----------------------------------------------------------------------------------------------------------


def test_a_partial_blob_resumes_with_the_chunks_it_has(home):
    data = random.Random(1).randbytes(5 * limits.BULK_CHUNK_BYTES_MIN + 77)
    ref, digests = describe(data, limits.BULK_CHUNK_BYTES_MIN)
    chunks = [data[slice(*ref.span(index))] for index in range(ref.chunks)]
    with home.run(RUN) as store:
        partial = store.partial(ref, digests)
        for index in (4, 1):
            partial.write_chunk(index, chunks[index])
        with pytest.raises(PeerError):
            partial.write_chunk(0, chunks[2])
        with pytest.raises(LocalError):
            partial.finish()
        with partial._path.open("r+b") as file:  # the disk forgot a chunk
            file.seek(ref.span(1)[0])
            file.write(b"????")
        partial.close()
    with home.run(RUN) as store:
        assert (store.blob(ref.digest), store.blobs.partials()) == (None, [ref.digest])
        partial = store.partial(ref, digests)
        assert partial.have() == {4}
        assert partial.read_chunk(4) == chunks[4]
        for index in range(ref.chunks):
            partial.write_chunk(index, chunks[index])
        source = partial.finish()
        assert (store.blobs.blobs(), store.blobs.partials()) == ([ref.digest], [])
        assert [source.read_chunk(index) for index in range(ref.chunks)] == chunks
        assert source.verify()


def test_a_put_blob_is_mapped_served_and_dropped(home):
    data = os.urandom(100_000)
    ref, digests = describe(data)
    with home.run(RUN) as store:
        store.put(memoryview(data), ref, digests)
    with home.run(RUN) as store:
        source = store.blob(ref.digest)
        view = source.map()
        assert (source.ref, source.digests, bytes(view)) == (ref, digests, data)
        store.drop(ref.digest)
        assert store.blob(ref.digest) is None
        assert view[-1] == data[-1]  # who still decodes it is not disturbed


def test_a_cut_blob_is_not_there(home):
    data = os.urandom(40_000)
    ref, digests = describe(data)
    with home.run(RUN) as store:
        path = store.put(data, ref, digests).path
        whole = path.read_bytes()
        for size in (0, 10, 39_999, 40_000, len(whole) - 1):
            path.write_bytes(whole[:size])
            assert store.blob(ref.digest) is None


# -- snapshots and checkpoints ---------------------------------------------------------------------------------------

THETA = np.arange(30_011, dtype=np.float32)
MOMENTUM = torch.linspace(-1, 1, 30_011)


def test_a_snapshot_is_a_safetensors_file_and_its_blob_is_the_state_stream(home):
    stream = THETA.tobytes() + MOMENTUM.numpy().tobytes()
    with home.run(RUN) as store:
        written = store.write_snapshot(12, THETA, {"momentum": MOMENTUM}, {"tip": "abc"})
        assert (written.ref, written.digests) == describe(stream)
        with safe_open(written.path / "state.safetensors", "np") as file:
            assert (file.get_tensor("theta") == THETA).all()
            assert (file.get_tensor("momentum") == MOMENTUM.numpy()).all()
    with home.run(RUN) as store:
        found = store.latest_snapshot()
        assert found == written
        theta, buffers = found.load()
        assert (theta == THETA).all()
        assert (buffers["momentum"] == MOMENTUM.numpy()).all()
        source = store.snapshot_source(12)
        assert b"".join(map(source.read_chunk, range(source.ref.chunks))) == stream
        source.close()
        assert store.snapshot_source(11) is None


def test_two_snapshots_are_kept_and_a_source_outlives_its_snapshot(tmp_path):
    snapshots = Snapshots(tmp_path / "s")
    first = snapshots.write(0, THETA, {})
    source = snapshots.source(0)
    for round_index in range(1, 5):
        snapshots.write(round_index, THETA + round_index, {})
        assert snapshots.rounds() == [max(0, round_index - 1), round_index]
    assert not first.path.exists()
    assert source.read_chunk(0) == THETA.tobytes()[: source.ref.chunk_bytes]
    source.close()
    again = snapshots.write(4, THETA, {})
    assert (again.ref, snapshots.rounds()) == (first.ref, [3, 4])


@pytest.mark.parametrize("victim", ["state.safetensors", "manifest.json"])
@pytest.mark.parametrize("how", ["cut", "flip", "gone"])
def test_a_damaged_snapshot_is_passed_over_and_said_so(tmp_path, victim, how):
    snapshots = Snapshots(tmp_path / "s")
    for round_index in (1, 2):
        path = snapshots.write(round_index, THETA + round_index, {"m": MOMENTUM}).path / victim
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.unlink() if how == "gone" else path.write_bytes(data[:-1] if how == "cut" else data)
    snapshots = Snapshots(tmp_path / "s")
    assert snapshots.latest().round_index == 1
    assert "round-000002" in snapshots.problems[0]
    snapshots.write(3, THETA, {})
    assert snapshots.rounds() == [1, 3]  # the damaged one did not push out the last good one


def test_odd_state_is_refused(tmp_path):
    snapshots = Snapshots(tmp_path / "s")
    for odd in (THETA.astype(np.float64), THETA[::2], THETA.reshape(1, -1), MOMENTUM.half()):
        with pytest.raises(LocalError):
            snapshots.write(0, odd, {})
    assert snapshots.latest() is None


def some_tensors(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {
        "step": torch.tensor(seed),
        "flags": torch.rand(5) > 0.5,
        "half": torch.randn(3, 5).bfloat16(),
        "moment": torch.randn(50, 20).t(),
        "nothing": torch.empty(0, 4),
        "wide": torch.randn(7, dtype=torch.float64),
    }


def test_a_local_checkpoint_comes_back_bit_for_bit(home):
    tensors = some_tensors(3)
    with home.run(RUN) as store:
        assert store.read_local() == (None, "")
        store.write_local(tensors, {"round": 3, "counters": {"steps": 9}})
        (state, problem) = store.read_local()
        assert (problem, state.meta) == ("", {"round": 3, "counters": {"steps": 9}})
        assert all(torch.equal(state.tensors[name], tensor) for name, tensor in tensors.items())
        assert all(state.tensors[name].dtype == tensor.dtype for name, tensor in tensors.items())
        theirs = load_file(next((store.directory / "local").iterdir()))
        assert all(torch.equal(theirs[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("where", [0, 20, 150, -1])
def test_a_torn_checkpoint_is_passed_over_for_the_one_before(home, where):
    with home.run(RUN) as store:
        for round_index in range(4):
            store.write_local(some_tensors(round_index), {"round": round_index})
        paths = sorted((store.directory / "local").iterdir())
        assert len(paths) == 2
        data = bytearray(paths[-1].read_bytes())
        for torn in (data[:where], data[:where] + bytes([data[where] ^ 1]) + (data[where:][1:])):
            paths[-1].write_bytes(torn)
            state, problem = store.read_local()
            assert (state.meta, paths[-1].name in problem) == ({"round": 2}, True)


# -- full disk, crashes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("after_bytes", [0, 5, 3000])
def test_a_full_disk_is_a_sentence_and_loses_nothing(home, monkeypatch, code, after_bytes):
    data = os.urandom(50_000)
    ref, digests = describe(data)
    with home.run(RUN) as store:
        store.begin_round(0)
        store.journal.record("promise", b"p")
        store.append_certificate(0, b"zero")
        store.write_snapshot(0, THETA, {})
        store.write_local(some_tensors(1), {"round": 1})
        store.save_peers([b"{}"])
        store.rounds.append({"round": 0})
        attempts = [
            lambda: store.append_certificate(1, bytes(4000)),
            lambda: store.journal.record("vote", bytes(4000)),
            lambda: store.put(data, ref, digests),
            lambda: store.partial(ref, digests).write_chunk(0, data[: ref.chunk_bytes]),
            lambda: store.write_snapshot(1, THETA, {}),
            lambda: store.write_local({"x": torch.zeros(5000)}, {}),
            lambda: store.save_peers([b'"' + b"x" * 5000 + b'"']),
            lambda: store.rounds.append({"why": "x" * 5000}),
        ]
        for attempt in attempts:
            with monkeypatch.context() as patch:
                fill_the_disk(patch, after_bytes, code)
                with pytest.raises(ConfigError, match=r"disk full: .*free space in /.* and start again"):
                    attempt()
        store.append_certificate(1, b"one")  # the same process goes on when there is room again
    with home.run(RUN) as store:
        assert store.journal.read() == [("promise", b"p")]
        assert [store.certificate(index) for index in range(3)] == [b"zero", b"one", None]
        assert store.latest_snapshot().round_index == 0
        assert store.read_local()[0].meta == {"round": 1}
        assert store.load_peers() == [b"{}"]
        assert store.blob(ref.digest) is None
        assert (store.directory / "rounds.jsonl").read_bytes() == b'{"round": 0}\n'
        assert not list(home.root.rglob("*.tmp"))


def test_a_replacement_is_synced_before_it_is_seen_and_its_name_after(tmp_path, monkeypatch):
    steps = []
    for name in ("write", "fsync", "replace"):
        real = getattr(os, name)

        def traced(*arguments, real=real, name=name):
            steps.append(name)
            return real(*arguments)

        monkeypatch.setattr(durable.os, name, traced)
    durable.replace_file(tmp_path / "file", b"data")
    assert steps == ["write", "fsync", "replace", "fsync"]


WORKER = """
    import os, sys
    import numpy as np
    from farflung.node.store import open_home
    from farflung.protocol.blob import describe

    store = open_home(sys.argv[1]).run(bytes(32))
    def done(*words):
        os.write(1, (" ".join(map(str, words)) + "\\n").encode())  # one write: print tears under kill -9
    first = store.certificates.next_round
    for r in range(first, first + 10_000):
        store.begin_round(r)
        for vote in range(3):
            store.journal.record("vote", b"%d %d" % (r, vote))
            done("vote", r, vote)
        data = b"%d " % r * 20_000
        ref, digests = describe(data)
        partial = store.partial(ref, digests)
        for index in range(ref.chunks):
            partial.write_chunk(index, data[slice(*ref.span(index))])
        partial.finish()
        done("blob", r, ref.digest.hex())
        store.append_certificate(r, b"%d" % r)
        done("certificate", r)
        store.write_snapshot(r, np.full(60_000, r, np.float32), {"m": np.full(60_000, -r, np.float32)})
        done("snapshot", r)
"""


def check_after_a_kill(store: RunStore, said: list[list[str]]) -> None:
    last = {words[0]: words for words in said}
    certificates = store.certificates.next_round
    if "certificate" in last:
        assert certificates > int(last["certificate"][1])
    assert [store.certificate(index) for index in range(certificates)] == [b"%d" % i for i in range(certificates)]
    if "vote" in last and store.journal.round_index == int(last["vote"][1]):
        assert len(store.journal.read()) > int(last["vote"][2])
    elif "vote" in last:  # a new journal was begun, and only after the old round's certificate
        assert store.certificate(int(last["vote"][1])) is not None
    assert all(entry[1].split()[0] == b"%d" % store.journal.round_index for entry in store.journal.read())
    if "blob" in last:
        assert store.blob(bytes.fromhex(last["blob"][2])).verify()
    found = store.latest_snapshot()
    assert store.snapshots.problems == []
    if found is not None:
        assert found.round_index >= int(last.get("snapshot", ["", "0"])[1])
        theta, buffers = found.load()
        assert (theta == found.round_index).all()
        assert (buffers["m"] == -theta).all()


def test_kill_9_at_any_instant_leaves_what_was_said_to_be_done(tmp_path):
    for seed in range(20):
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WORKER), str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        opening = seed % 4 == 0  # strike while it opens what the last one left, or at a random instant of its work
        first = "" if opening else child.stdout.readline()
        time.sleep(random.Random(seed).uniform(0.1, 0.3) if opening else random.Random(seed).uniform(0, 0.12))
        child.kill()
        said = [line.split() for line in [first, *child.communicate()[0].splitlines()] if line]
        assert child.returncode == -9, said
        with open_home(tmp_path).run(bytes(32)) as store:
            check_after_a_kill(store, said)
    assert store.certificates.next_round > 10


def test_nothing_here_imports_torch():
    code = "import sys, farflung.node.store; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
