"""Reports say what the runs say: numbers as numpy has them, blame that adds up, a page that stands alone."""

from __future__ import annotations

import csv
import importlib.util
import io
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from make_results import SCENARIO, make_run, make_sweep, unfinished
from rich.console import Console

from farflung.protocol.errors import ConfigError
from farflung.sim.draw import Draw
from farflung.sim.report import (
    critical_path,
    doubts,
    headline,
    print_table,
    summarise,
    write_csv,
    write_html,
    write_plots,
)
from farflung.sim.report.attribution import UNATTRIBUTED, advice_text, advise, most_lost
from farflung.sim.report.bands import band_of, duration_band_text, duration_text, figures
from farflung.sim.report.variants import variants
from farflung.sim.results import CAUSES, Blame, RunResult
from farflung.sim.scenario import Members


@pytest.fixture(scope="module")
def sweep() -> list[RunResult]:
    return make_sweep(5, members=6, rounds=30)


def printed(results, scenario=None, width=200) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_table(results, console, scenario)
    return console.file.getvalue()


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("seed", range(30))
def test_a_band_is_numpys_and_contains_the_median(seed):
    rng = np.random.default_rng(seed)
    values = rng.lognormal(0, 2, int(rng.integers(1, 30)))
    band = band_of(values.tolist())
    assert np.allclose([band.low, band.median, band.high], np.quantile(values, [0.1, 0.5, 0.9]), rtol=1e-12)
    assert values.min() <= band.low <= band.median <= band.high <= values.max()
    assert (band.count, band.never) == (len(values), 0)


def test_seeds_that_never_get_there_move_the_median_and_are_not_left_out():
    assert band_of([1, 2, math.inf]).median == 2
    assert band_of([1, math.inf, math.inf]).median == math.inf
    assert band_of([math.inf, math.inf]).low == math.inf
    assert band_of([1, 2, math.nan]).count == 2
    assert band_of([]) is None
    assert band_of([math.nan]) is None
    assert duration_band_text(band_of([60.0, 60.0, math.inf])) == "60 s (60 s to never)"


def test_numbers_in_words_keep_three_figures_and_their_unit():
    words = [duration_text(seconds) for seconds in (0.4237, 59, 750, 37.23 * 3600, 12.34 * 86400)]
    assert words == ["0.424 s", "59 s", "12.5 min", "37.2 h", "12.3 d"]
    assert [figures(value) for value in (0.01234, 1234.5, 100.0, math.nan)] == ["0.0123", "1234", "100", "not a number"]
    assert duration_band_text(band_of([3600.0 * hours for hours in range(20, 31)])) == "25 h (21–29)"


def test_a_summary_is_what_numpy_says_of_the_runs(sweep):
    for summary in summarise(sweep, SCENARIO):
        runs = [run for run in sweep if tuple(sorted(run.changes.items())) == summary.changes]
        assert summary.seeds == tuple(range(5))
        shares = [np.mean([one.train_s / one.online_s for one in run.members]) for run in runs]
        sent = [sum(m.bytes_sent for m in run.members) / sum(r.members for r in run.rounds) for run in runs]
        goals = [math.inf if run.time_to_goal_s is None else run.time_to_goal_s for run in runs]
        for band, values in (
            (summary.utilisation, shares),
            (summary.bytes_per_member_round, sent),
            (summary.duration_s, [run.duration_s for run in runs]),
            (summary.final_loss, [run.rounds[-1].loss_estimate for run in runs]),
        ):
            assert np.allclose([band.low, band.median, band.high], np.quantile(values, [0.1, 0.5, 0.9]), rtol=1e-12)
        assert summary.goal_s.median == sorted(goals)[2]
        assert summary.reached == sum(1 for goal in goals if goal < math.inf)


def test_every_second_of_the_rounds_belongs_to_one_cause(sweep):
    for variant in variants(sweep):
        path = critical_path(sweep)[variant.label]
        blamed = {cause: [] for cause in CAUSES}
        for run in variant.runs:
            for cause in CAUSES:
                blamed[cause].append(math.fsum(b.seconds for r in run.rounds for b in r.blame if b.cause == cause))
        assert {item.cause for item in path} == {cause for cause in CAUSES if sum(blamed[cause])}
        for item in path:
            assert item.seconds == pytest.approx(np.mean(blamed[item.cause]), rel=1e-12)
        total = np.mean([run.rounds[-1].end_s - run.rounds[0].start_s for run in variant.runs])
        assert sum(item.seconds for item in path) == pytest.approx(total, rel=1e-9)
        assert sum(item.share for item in path) == pytest.approx(1)
        assert sum(item.lost_share for item in path) == pytest.approx(1)
        assert most_lost(path).seconds == max(item.seconds for item in path if item.cause != "compute")


def test_blame_that_does_not_add_up_is_shown_and_said():
    run = make_run(0, members=3, rounds=4)
    broken = replace(run, rounds=(replace(run.rounds[0], blame=run.rounds[0].blame[1:]), *run.rounds[1:]))
    missing_s = run.rounds[0].blame[0].seconds
    (path,) = critical_path([broken]).values()
    found = next(item for item in path if item.cause == UNATTRIBUTED)
    assert found.seconds == pytest.approx(missing_s)
    assert sum(item.share for item in path) == pytest.approx(1)
    assert any("does not add up" in doubt for doubt in doubts([broken]))
    assert not doubts([run])
    assert UNATTRIBUTED in printed([broken])
    extra = (*run.rounds[0].blame, Blame("upload", 0, 50.0))
    too_much = replace(run, rounds=(replace(run.rounds[0], blame=extra), *run.rounds[1:]))
    assert next(i for i in critical_path([too_much])[run.scenario] if i.cause == UNATTRIBUTED).seconds < 0


def test_a_member_that_is_always_the_worst_is_named_and_one_that_changes_is_not():
    always = [make_run(seed, members=9, rounds=3, straggler=4) for seed in range(6)]
    part = next(item for item in critical_path(always)["home-40"] if item.cause == "straggler")
    assert (part.culprit.name, part.culprit.worst_in, part.culprit.share) == ("member-04", 6, pytest.approx(1))
    steps = [run.members[4].step_s / np.median([m.step_s for m in run.members]) for run in always]
    assert part.culprit.number == pytest.approx(np.median(steps))
    changing = [make_run(seed, members=40, rounds=3) for seed in range(6)]
    part = next(item for item in critical_path(changing)["home-40"] if item.cause == "upload")
    worst = [min(run.members, key=lambda member: member.up_mbit) for run in changing]
    assert len({member.name for member in worst}) > 3
    assert part.culprit.name == ""
    assert part.culprit.number == pytest.approx(np.median([member.up_mbit for member in worst]))
    assert part.culprit.share == pytest.approx(0.8)


def test_what_to_change_first_is_the_largest_saving_that_the_records_bound():
    runs = [make_run(seed, members=9, rounds=3, uplink=5.0) for seed in range(4)]
    path = critical_path(runs)["home-40"]
    advice = advise(path)
    seconds = {item.cause: item.seconds for item in path}
    assert advice.cause == "upload"
    assert advice.saved_s == pytest.approx(0.8 * seconds["upload"] / 2)
    assert advice.saved_s >= seconds["straggler"]
    assert advice.saved_share == pytest.approx(advice.saved_s / sum(seconds.values()))
    assert advice_text(advice).startswith("make the uplink of ")
    shared = [replace(r, blame=(Blame("upload", -1, r.end_s - r.start_s),)) for r in runs[0].rounds]
    everybody = advise(critical_path([replace(runs[0], rounds=tuple(shared))])["home-40"])
    assert (everybody.culprit, everybody.saved_share) == (None, pytest.approx(0.5))
    assert "everybody" in advice_text(everybody)
    physics = [replace(r, blame=(Blame("latency", 1, r.end_s - r.start_s),)) for r in runs[0].rounds]
    assert advise(critical_path([replace(runs[0], rounds=tuple(physics))])["home-40"]) is None


def test_the_headline_holds_the_answer():
    runs = [make_run(seed, members=9, rounds=30, uplink=5.0, goal=3.0) for seed in range(4)]
    scenario = replace(SCENARIO, members=(Members(count=9, step_ms=Draw.fixed(1200)),), loss_goal=3.0)
    said = headline(runs, scenario)
    summary = summarise(runs, scenario)[0]
    for words in ("9 members, 1B parameters, ", "at H=100", "4 seeds", "to loss 3", "est.", "bottleneck: upload"):
        assert words in said
    assert duration_text(summary.goal_s.median) in said
    assert f"utilisation {100 * summary.utilisation.median:.0f} %" in said


def test_of_several_variants_the_answer_is_about_the_fastest_to_the_goal(sweep):
    summaries = summarise(sweep, SCENARIO)
    best = min(summaries, key=lambda item: item.goal_s.median)
    assert f"({best.label}: fastest to the goal of 4 variants)" in headline(sweep, SCENARIO)
    without = [replace(run, time_to_goal_s=None) for run in sweep]
    best = max(summaries, key=lambda item: item.utilisation.median)
    assert f"({best.label}: best utilisation of 4 variants)" in headline(without)


def test_unfinished_runs_and_missed_goals_are_said_first(sweep):
    runs = [unfinished(sweep[0]), *sweep[1:]]
    assert headline(runs, SCENARIO).startswith("1 of 20 runs did not finish.")
    first = printed(runs, SCENARIO).splitlines()[0]
    assert "1 of 5 runs did not finish" in first
    assert first.startswith("!")
    summary = next(item for item in summarise(runs, SCENARIO) if item.finished < 5)
    assert (summary.finished, summary.duration_s.never, summary.stopped_s) == (4, 1, runs[0].duration_s)


def test_goals_that_some_seeds_reach_are_counted_and_goals_that_none_reaches_are_said():
    some = [make_run(seed, members=4, rounds=30, goal=2.9) for seed in range(5)]
    some[2] = replace(some[2], time_to_goal_s=None)
    assert "4 of 5 seeds" in printed(some)
    none = [replace(run, time_to_goal_s=None) for run in some]
    assert "not reached" in printed(none, SCENARIO)
    assert "loss 2.9 not reached by any seed" in headline(none, SCENARIO)
    assert "time to goal" not in printed(none)


def test_estimates_are_marked_and_measurements_are_not(sweep):
    trained = make_sweep(2, members=4, rounds=6, fidelity="training")
    assert {item.loss_kind for item in summarise(trained)} == {"validation"}
    assert {item.loss_kind for item in summarise(sweep)} == {"estimate"}
    assert "est." in printed(sweep)
    assert "est." not in printed(trained)
    assert any("kinds" in doubt for doubt in doubts([replace(sweep[0], changes={}), replace(trained[1], changes={})]))


def test_the_order_of_results_does_not_matter(sweep, tmp_path):
    shuffled = [sweep[index] for index in np.random.default_rng(3).permutation(len(sweep))]
    assert headline(shuffled, SCENARIO) == headline(sweep, SCENARIO)
    assert printed(shuffled, SCENARIO) == printed(sweep, SCENARIO)
    csv_files = [write_csv(runs, tmp_path / name, parquet=False) for name, runs in (("a", sweep), ("b", shuffled))]
    assert [path.read_bytes() for path in csv_files[0]] == [path.read_bytes() for path in csv_files[1]]


def test_no_results_are_refused(tmp_path):
    for refuse in (
        lambda: headline([]),
        lambda: summarise([]),
        lambda: critical_path([]),
        lambda: doubts([]),
        lambda: print_table([], Console(file=io.StringIO())),
        lambda: write_csv([], tmp_path),
        lambda: write_plots([], tmp_path),
        lambda: write_html([], SCENARIO, tmp_path),
    ):
        with pytest.raises(ConfigError, match="got 0 results"):
            refuse()
    assert not list(tmp_path.iterdir())


def test_a_seed_that_ran_twice_is_noticed_and_so_are_different_event_logs():
    run = make_run(1, members=3, rounds=2)
    assert any("seed 1 is there 2 times, with equal event logs" in doubt for doubt in doubts([run, run]))
    other = replace(run, events_digest="0" * 64)
    assert any("DIFFERENT event logs" in doubt for doubt in doubts([run, other]))


def test_variants_are_in_numeric_order_with_short_names_that_differ():
    runs = [make_run(0, {"members.up_mbit": value}, members=2, rounds=1) for value in ("100", "20", "5")]
    assert [item.label for item in variants(runs)] == ["up_mbit=5", "up_mbit=20", "up_mbit=100"]
    both = [make_run(0, {"run.x": "1", "model.x": "2"}, members=2, rounds=1), make_run(0, members=2, rounds=1)]
    assert [item.label for item in variants(both)] == ["as given", "model.x=2, run.x=1"]


def test_csv_files_hold_the_results_to_the_last_digit(sweep, tmp_path):
    paths = {path.stem: path for path in write_csv(sweep, tmp_path, parquet=False)}
    assert sorted(paths) == ["blame", "members", "rounds", "runs"]
    tables = {name: read_csv(path) for name, path in paths.items()}
    keys = {(run.seed, run.changes["run.codec"], run.changes["members.up_mbit"]): run for run in sweep}

    def run_of(row):
        return keys[int(row["seed"]), row["change.run.codec"], row["change.members.up_mbit"]]

    assert len(tables["runs"]) == len(sweep)
    for row in tables["runs"]:
        run = run_of(row)
        assert float(row["duration_s"]) == run.duration_s
        assert float(row["utilisation"]) == run.utilisation
        assert row["time_to_goal_s"] == ("" if run.time_to_goal_s is None else repr(run.time_to_goal_s))
        assert int(row["bytes_sent"]) == sum(member.bytes_sent for member in run.members)
        assert row["events_digest"] == run.events_digest
    for row in tables["members"]:
        member = run_of(row).members[int(row["member"])]
        assert (row["name"], float(row["up_mbit"]), int(row["steps"])) == (member.name, member.up_mbit, member.steps)
    lengths, blamed = Counter(), Counter()
    for row in tables["rounds"]:
        lengths[run_of(row).events_digest, row["round_index"]] += float(row["end_s"]) - float(row["start_s"])
    for row in tables["blame"]:
        blamed[run_of(row).events_digest, row["round_index"]] += float(row["seconds"])
    assert lengths.keys() == blamed.keys()
    assert all(blamed[key] == pytest.approx(lengths[key]) for key in lengths)


def test_parquet_without_pyarrow_is_refused_with_what_to_do(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install pyarrow"):
        write_csv(sweep, tmp_path, parquet=True)
    assert not list(tmp_path.iterdir())
    assert {path.suffix for path in write_csv(sweep, tmp_path)} == {".csv"}


def test_parquet_holds_the_same_rows(sweep, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    paths = write_csv(sweep, tmp_path, parquet=True)
    for path in (path for path in paths if path.suffix == ".parquet"):
        rows, texts = parquet.read_table(path).to_pylist(), read_csv(path.with_suffix(".csv"))
        assert len(rows) == len(texts) > 0
        assert list(rows[0]) == list(texts[0])


def test_a_goal_beyond_the_simulated_rounds_is_said():
    run = make_run(0, members=3, rounds=3)
    late = replace(run, time_to_goal_s=2 * run.duration_s)
    assert any("beyond the simulated rounds" in doubt for doubt in doubts([late, make_run(1, members=3, rounds=3)]))
    assert duration_band_text(band_of([3600.0 * 60, 3600.0 * 60, 3600.0 * 100])).startswith("60 h (60–9")
