"""Every sample has one owner in a round, churn moves little, and the order can be replayed."""

import numpy as np
import pytest

from farflung.node import data
from farflung.protocol.errors import ConfigError, LocalError
from farflung.protocol.identity import PeerId

RUN = b"a run"


def peers(count: int) -> tuple[PeerId, ...]:
    return tuple(PeerId.of(bytes([index])) for index in range(count))


class Rounds:
    """A view that a test can move."""

    def __init__(self, me: PeerId, members: tuple[PeerId, ...]) -> None:
        self.now = data.RoundView(RUN, 0, b"c0", me, members)

    def __call__(self) -> data.RoundView:
        return self.now

    def move(self, certificate: bytes, members: tuple[PeerId, ...]) -> None:
        self.now = data.RoundView(RUN, self.now.round_index + 1, certificate, self.now.me, members)


@pytest.mark.parametrize("count", [1, 2, 5, 64])
def test_buckets_are_disjoint_cover_everything_and_are_nearly_equal(count):
    members = peers(count)
    shares = [data.buckets_of(member, members, RUN) for member in members]
    assert sorted(bucket for share in shares for bucket in share) == list(range(data.BUCKETS))
    assert all(share == sorted(share) for share in shares)
    fair = data.BUCKETS / count
    assert all(abs(len(share) - fair) <= 5 * fair**0.5 for share in shares)


def test_buckets_do_not_depend_on_the_order_of_members_but_on_the_run():
    members = peers(5)
    assert data.buckets_of(members[2], members, RUN) == data.buckets_of(members[2], members[::-1], RUN)
    assert data.buckets_of(members[2], members, RUN) != data.buckets_of(members[2], members, b"another")


def test_churn_moves_only_the_buckets_of_who_came_or_left():
    members = peers(9)
    before, after = (np.asarray(sorted(group)) for group in (members[:8], members))
    owner_before = before[data.owner_of_buckets(members[:8], RUN)]
    owner_after = after[data.owner_of_buckets(members, RUN)]
    moved = owner_before != owner_after
    assert (owner_after[moved] == members[8]).all()
    assert abs(moved.mean() - 1 / 9) < 0.03


def test_buckets_of_a_stranger_or_of_doubled_members_are_our_own_bug():
    members = peers(3)
    with pytest.raises(LocalError, match="not a member"):
        data.buckets_of(members[2], members[:2], RUN)
    with pytest.raises(LocalError, match="distinct"):
        data.owner_of_buckets((*members, members[0]), RUN)


def test_the_owner_of_a_bucket_never_changes_between_versions():
    assert data.owner_of_buckets(peers(4), RUN)[:12].tolist() == [2, 1, 1, 2, 2, 1, 2, 2, 1, 0, 3, 2]


@pytest.mark.parametrize("samples", [5_000, 30_011])
def test_an_epoch_reads_every_sample_once_over_all_members(samples):
    members, read = peers(3), []
    for me in members:
        shard = data.shard(range(samples), Rounds(me, members))
        while True:
            sample = next(shard)
            if shard.epoch:
                break
            read.append(sample)
    assert sorted(read) == list(range(samples))


def test_the_order_follows_run_epoch_certificate_and_member_and_nothing_else():
    members = peers(2)

    def order(certificate: bytes, me: int = 0) -> list[int]:
        rounds = Rounds(members[me], members)
        rounds.move(certificate, members)
        shard = data.shard(range(20_000), rounds)
        return [next(shard) for _ in range(300)]

    assert order(b"c1") == order(b"c1")
    assert order(b"c1") != order(b"c2")
    assert not set(order(b"c1")) & set(order(b"c1", me=1))


def test_without_churn_rounds_neither_skip_nor_repeat():
    members = peers(2)
    rounds = Rounds(members[0], members)
    shard, read = data.shard(range(9_000), rounds), []
    for number in range(20):
        rounds.move(b"c%d" % number, members)
        read += [next(shard) for _ in range(150)]
    assert len(set(read)) == len(read) == shard.samples_read
    assert shard.samples_skipped == shard.samples_repeated == 0


def test_churn_counts_what_the_old_owner_read_and_did_not_read():
    members = peers(3)
    rounds = Rounds(members[0], members[:2])
    shard = data.shard(range(data.BUCKETS * 2), rounds)
    read = [next(shard) for _ in range(1000)]
    rounds.move(b"c1", members)
    next(shard)
    moved = set(data.buckets_of(members[2], members, RUN)) & set(data.buckets_of(members[0], members[:2], RUN))
    assert shard.samples_repeated == sum(sample % data.BUCKETS in moved for sample in read) > 0
    assert shard.samples_repeated + shard.samples_skipped == 2 * len(moved)
    mine = set(data.buckets_of(members[0], members, RUN))
    assert all(next(shard) % data.BUCKETS in mine for _ in range(2000))


def test_before_admission_a_member_trains_on_the_share_it_would_have():
    members = peers(3)
    shard = data.shard(range(9_000), Rounds(members[2], members[:2]))
    mine = set(data.buckets_of(members[2], members, RUN))
    assert all(next(shard) % data.BUCKETS in mine for _ in range(500))


def test_a_shard_resumes_where_it_was_saved():
    first, second = (data.shard(range(6_000), Rounds(peers(2)[0], peers(2))) for _ in range(2))
    read = [next(first) for _ in range(700)]
    second.restore(first.state())
    rest = [next(second) for _ in range(2_000)]
    assert not set(read) & set(rest)
    with pytest.raises(LocalError, match="6001"):
        data.shard(range(6_001), Rounds(peers(2)[0], peers(2))).restore(first.state())


def test_batches_are_collated_and_fetched_whole_where_the_dataset_can():
    class Squares:
        def __len__(self) -> int:
            return 10_000

        def __getitem__(self, index: int) -> int:
            raise AssertionError("one by one")

        def __getitems__(self, indices: list[int]) -> list[int]:
            return [index**2 for index in indices]

    batch = next(data.shard(Squares(), data.solo_view(), batch=8, collate=tuple))
    assert len(batch) == 8
    batch = next(data.shard([float(index) for index in range(100)], data.solo_view(), batch=8))
    assert batch.shape == (8,)


def test_the_end_of_the_run_ends_the_shard():
    views = [data.solo_view()(), data.solo_view()(), None]
    assert len(list(data.shard(range(10), lambda: views.pop(0)))) == 2
    views = [data.solo_view()(), None]
    assert len(list(data.shard(range(10), lambda: views.pop(0)).indices())) == 1


def test_too_little_data_is_refused():
    with pytest.raises(ConfigError, match="empty"):
        data.shard([], data.solo_view())
    owner = data.owner_of_buckets(peers(8), RUN)[0]
    idle = sorted(peers(8))[(int(owner) + 1) % 8]
    with pytest.raises(ConfigError, match="too few"):
        next(data.shard([1], Rounds(idle, peers(8))))


def test_named_streams_are_separate_and_the_same_on_every_machine():
    assert data.seed_of("a", "bc") != data.seed_of("ab", "c")
    assert data.seed_of(1) != data.seed_of("1")
    assert data.uniform_of(3, "x", 7).tolist() == data.uniform_of(3, "x", 7).tolist()
    noise = data.uniform_of(100_000, "x", 7)
    assert -0.5 <= noise.min() < -0.499
    assert 0.499 < noise.max() < 0.5
    assert abs(noise.mean()) < 0.005
