"""Goals and figures: the arithmetic behind the tables, without a mount."""

import os

import pytest

from cascadefs.bench import cold, fresh, growth, hashing, io, lines, ops, portable, round_trip
from cascadefs.bench.lines import Goal
from cascadefs.bench.targets import CASCADE, HUGE

UNITS = {"t": io.MICROS, "r": io.RATE_GB}


def test_a_time_is_met_from_below_a_rate_from_above_and_ratios_are_speeds():
    samples = {("t", CASCADE): [9.0, 11.0, 10.0], ("t", HUGE): [2.0], ("r", CASCADE): [3.0], ("r", HUGE): [4.0]}
    time, tight, rate, ratio = lines.judge([Goal("t", 10), Goal("t", 9), Goal("r", 3), Goal("r", 0.8, True)], samples, UNITS)
    assert (time.figure, time.ratio, time.met, time.target) == (10, 0.2, True, "<= 10 us")
    assert tight.met is False and rate.met is True
    assert (ratio.ratio, ratio.met, ratio.target) == (0.75, False, ">= 0.8 x")


def test_a_paired_line_is_the_median_of_the_ratios():
    samples = {("r", CASCADE): [1.0, 3.0, 10.0], ("r", HUGE): [2.0, 3.0, 5.0]}
    samples |= {("t", CASCADE): [1.0, 8.0], ("t", HUGE): [2.0, 2.0]}
    rate, time = lines.judge([Goal("r", 0.95, True, paired=True), Goal("t", 1, True, paired=True)], samples, UNITS)
    assert (rate.ratio, rate.met, rate.figure) == (1.0, True, 3.0)
    assert time.ratio == (2 / 1 + 2 / 8) / 2


def test_what_was_not_measured_is_not_met_and_not_missed():
    (alone, lacking) = lines.judge([Goal("t", 10), Goal("r", 1, True)], {("t", CASCADE): [5.0], ("r", CASCADE): [5.0]}, UNITS)
    assert alone.met is True and alone.ratio is None
    assert lacking.met is None and lacking.ratio is None
    assert lines.judge([Goal("elsewhere", 1)], {}, UNITS) == []
    assert lines.judge([Goal("t", 1)], {}, UNITS)[0].met is None


def test_scaling_is_a_gain_beside_the_gain_of_raw_memory():
    samples = {("1", CASCADE): [4.0], ("2", CASCADE): [6.0], ("1", HUGE): [8.0], ("2", HUGE): [16.0]}
    found = lines.scaling(samples, "1", "2", 0.95)
    assert (found.figure, found.reference_figure, found.ratio, found.met) == (1.5, 2.0, 0.75, False)
    assert lines.scaling({}, "1", "2", 0.95).met is None


def test_every_goal_names_a_measure_that_exists():
    sets = [
        (ops.goals(ops.FULL), io.units([*ops.measures(ops.FULL), *ops.listings(ops.FULL)])),
        (fresh.goals(), io.units(fresh.measures(fresh.FULL))),
        (cold.goals(6), io.units(cold.measures(6, 1))),
        (hashing.goals(io.GIB), io.units(hashing.measures(io.GIB))),
        (portable.goals(io.MIB), io.units(portable.measures(io.MIB))),
    ]
    optional = {ops.listed_name(ops.FULL.listed, True)}  # only root can make the kernel forget
    for goals, units in sets:
        assert goals and {goal.measure for goal in goals} - optional <= units.keys()
        assert {goal.over for goal in goals if goal.over} <= units.keys()
    bulk = lines.bulk({}, io.FULL, io.units(io.measures(io.FULL)))
    assert len(bulk) == 9 and all(line.met is None for line in bulk)


def test_stages_end_where_they_are_told_to():
    assert growth.stages(100_000) == [1_000, 10_000, 100_000]
    assert growth.stages(500) == [500] and growth.stages(5_000) == [1_000, 5_000]


def stage(files, time_us, held, mount_s=None):
    return growth.Stage(files, *[time_us] * 5, held, mount_s)


def test_growth_is_judged_by_its_ends():
    found = growth.judge([stage(1_000, 10, 9), stage(10_000, 99, 9), stage(100_000, 19, 1.4, 6.0)])
    by_line = {line.line: line.met for line in found}
    assert [by_line[f"{name} at 100,000 files"] for name in ("create", "stat", "open", "unlink", "list")] == [True] * 5
    assert by_line["memory of the worker per file, 100,000 files"] is True
    assert by_line["mount of a store with 100,000 files"] is False
    slow = growth.judge([stage(1_000, 10, 9), stage(100_000, 21, 1.6)])
    assert [line.met for line in slow] == [False] * 6 + [None]


def test_a_plot_is_drawn_where_matplotlib_is(tmp_path):
    pytest.importorskip("matplotlib")
    growth.plot([stage(1_000, 10, 9), stage(10_000, 12, 2)], tmp_path / "g.png")
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")


def test_lanes_write_and_read_every_byte(tmp_path):
    size = 5 * cold.REQUEST + 4096  # not a multiple of what the lanes move together
    kit = io.make_kit(cold.DEPTH * cold.REQUEST, io.Ballast(tmp_path, 0))
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    cold.in_flight(fd, kit.source.view, size, True)
    assert os.fstat(fd).st_size == size
    cold.in_flight(fd, kit.sink, size, False)
    lane = 4 * cold.REQUEST % (cold.DEPTH * cold.REQUEST)  # the fifth request was the first lane's last
    assert kit.sink[lane : lane + cold.REQUEST] == kit.source.view[lane : lane + cold.REQUEST]
    with pytest.raises(OSError, match="of"):
        cold.in_flight(fd, kit.sink, size + 1, False)
    os.close(fd)


def test_a_stat_that_asks_and_names_that_are_absent(tmp_path):
    statx = ops.Statx()
    (tmp_path / "f").touch()
    assert statx(os.fsencode(tmp_path / "f")) and not statx(os.fsencode(tmp_path / "g"))
    assert ops.median_us(statx, [os.fsencode(tmp_path / "f")] * 5) > 0
    assert ops.list_all(tmp_path) > 0


def test_a_percentile_is_a_sample():
    assert fresh.percentile_us(range(1000, 201_000, 1000), 0.5) == 101
    assert fresh.percentile_us(range(1000, 201_000, 1000), 0.99) == 199
    assert fresh.percentile_us([7000], 0.99) == 7


def test_somebody_puts_until_it_is_enough(tmp_path):
    with fresh.puts(tmp_path):
        assert (tmp_path / "p000000").stat().st_size == fresh.SIZE
    left = len(list(tmp_path.iterdir()))
    assert 1 <= left <= fresh.PUTS_MOST


def test_processor_time_of_this_process_grows():
    before = hashing.cpu_seconds(os.getpid())
    while hashing.cpu_seconds(os.getpid()) < before + 0.02:
        pass
    assert growth.rss_bytes(os.getpid()) > io.MIB


def test_a_round_trip_is_measured_and_leaves_the_caller_where_it_was():
    cores = os.sched_getaffinity(0)
    found = round_trip.measured()
    assert os.sched_getaffinity(0) == cores
    assert found.one_core_us > 0 and (found.two_cores_us is None) == (len(cores) == 1)
    assert f"{found.one_core_us:.1f} us on one core" in str(found)
    assert str(round_trip.RoundTrip(6.25, None)) == "a byte to another process and back takes 6.2 us on one core"
