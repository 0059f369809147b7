"""Places and blocks: what holds for any lifetimes and any traffic."""

from itertools import combinations, pairwise

from hypothesis import given
from hypothesis import strategies as st

from fused_resnet.inference.arena import Lifetime, place
from fused_resnet.inference.blocks import Traffic, blocks

LIFETIMES = st.lists(
    st.builds(
        lambda begin, length, size: Lifetime(begin, begin + length, size),
        st.integers(0, 12),
        st.integers(0, 6),
        st.one_of(st.integers(0, 5), st.integers(60, 68), st.integers(0, 5000)),
    ),
    max_size=12,
)
TRAFFIC = st.lists(st.builds(Traffic, st.integers(0, 3000), st.integers(0, 20000)), min_size=1, max_size=12)


def aligned(size: int) -> int:
    return -(-size // 64) * 64


@given(LIFETIMES)
def test_what_lives_at_the_same_time_does_not_overlap(lifetimes: list[Lifetime]) -> None:
    offsets = place(lifetimes)
    assert len(offsets) == len(lifetimes)
    assert all(at >= 0 and at % 64 == 0 for at in offsets)
    for (one, a), (other, b) in combinations(zip(lifetimes, offsets, strict=True), 2):
        together = one.begin <= other.end and other.begin <= one.end
        assert not together or a + one.size <= b or b + other.size <= a


@given(LIFETIMES)
def test_places_take_no_more_than_everything_side_by_side(lifetimes: list[Lifetime]) -> None:
    ends = [at + life.size for at, life in zip(place(lifetimes), lifetimes, strict=True)]
    assert max(ends, default=0) <= sum(aligned(life.size) for life in lifetimes)


def test_a_place_is_taken_again_as_soon_as_its_value_is_dead() -> None:
    chain = [Lifetime(i, i + 1, 100) for i in range(6)]
    assert set(place(chain)) == {0, 128}
    assert place([Lifetime(0, 1, 64), Lifetime(2, 3, 64)]) == [0, 0]
    assert sorted(place([Lifetime(0, 2, 64), Lifetime(2, 3, 64)])) == [0, 64]


@given(TRAFFIC, st.integers(1, 24), st.integers(1, 60000))
def test_blocks_cover_every_step_once_with_a_divisor_of_the_batch(
    traffic: list[Traffic], batch: int, cache: int
) -> None:
    runs = blocks(traffic, batch, cache)
    assert [i for run in runs for i in range(run.begin, run.end)] == list(range(len(traffic)))
    assert all(run.end > run.begin and run.images >= 1 and batch % run.images == 0 for run in runs)
    assert all(after.images >= 2 * before.images for before, after in pairwise(runs))
    for run in runs:
        for step in traffic[run.begin : run.end]:
            fits = run.images == 1 or run.images * step.image <= cache
            most = max(n for n in range(1, batch + 1) if batch % n == 0 and (n == 1 or n * step.image <= cache))
            assert fits or 2 * step.weight > most * step.image


@given(TRAFFIC, st.integers(1, 24))
def test_with_room_for_all_images_there_is_one_block(traffic: list[Traffic], batch: int) -> None:
    (run,) = blocks(traffic, batch, 1 << 30)
    assert (run.begin, run.end, run.images) == (0, len(traffic), batch)


def test_blocks_grow_where_activations_shrink() -> None:
    runs = blocks([Traffic(1000), Traffic(900), Traffic(100), Traffic(10, weight=10**9)], 16, 2000)
    assert [(run.begin, run.end, run.images) for run in runs] == [(0, 2, 2), (2, 4, 16)]
