"""Pictures and the page of a report: nothing to load, nothing that escapes, nothing silent, whatever is missing."""

from __future__ import annotations

import io
import math
import re
import time
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from make_results import SCENARIO, make_odd, make_run, make_sweep, unfinished
from rich.console import Console

from farflung.sim.report import headline, print_table, summarise, write_csv, write_html, write_plots
from farflung.sim.report.figures import GRID_POINTS, loss_band, thin
from farflung.sim.report.variants import variants
from farflung.sim.results import RunResult

VOID = {"meta", "br", "img", "link", "input", "hr"}


@pytest.fixture(scope="module")
def sweep() -> list[RunResult]:
    return make_sweep(3, members=6, rounds=20)


@pytest.fixture(scope="module")
def page(sweep, tmp_path_factory) -> str:
    return write_html(sweep, SCENARIO, tmp_path_factory.mktemp("page")).read_text()


def printed(results, scenario=None) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_table(results, console, scenario)
    return console.file.getvalue()


def test_loss_bands_are_quantiles_of_the_seeds_at_the_same_time(sweep):
    variant = variants(sweep)[0]
    times, quantiles = loss_band(variant, "loss_estimate")
    assert times.shape == (GRID_POINTS,)
    curves = [
        np.interp(times, [r.end_s for r in run.rounds], [r.loss_estimate for r in run.rounds]) for run in variant.runs
    ]
    assert np.allclose(quantiles, np.quantile(curves, [0.1, 0.5, 0.9], axis=0))
    assert times[0] == max(run.rounds[0].end_s for run in variant.runs)
    assert times[-1] == pytest.approx(np.median([run.rounds[-1].end_s for run in variant.runs]))
    odd = replace(variant.runs[0], rounds=(replace(variant.runs[0].rounds[0], loss_estimate=math.nan),))
    _, quantiles = loss_band(replace(variant, runs=(odd, *variant.runs[1:])), "loss_estimate")
    assert np.isfinite(quantiles[1]).all()
    assert (quantiles[2] == math.inf).all()


def test_thinning_keeps_both_ends_and_the_order():
    assert thin(range(5), 9) == [0, 1, 2, 3, 4]
    shown = thin(range(1000), 60)
    assert (len(shown), shown[0], shown[-1]) == (60, 0, 999)
    assert shown == sorted(set(shown))


def test_pictures_are_written_and_matplotlib_is_left_alone(tmp_path):
    import matplotlib

    matplotlib.rcParams["font.size"] = 23
    before = dict(matplotlib.rcParams)
    runs = [make_run(seed, members=5, rounds=4) for seed in range(2)]
    paths = write_plots(runs, tmp_path, SCENARIO)
    assert dict(matplotlib.rcParams) == before
    assert [path.name for path in paths] == [
        "loss.png",
        "critical_path.png",
        "utilisation.png",
        "bytes.png",
        "gantt-1.png",
    ]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000 for path in paths)
    matplotlib.rcParams["font.size"] = 10
    again = {path.name: path.read_bytes() for path in write_plots(runs[::-1], tmp_path / "again", SCENARIO)}
    assert again == {path.name: path.read_bytes() for path in paths}
    bare = [replace(run, segments=(), rounds=tuple(replace(r, loss_estimate=None) for r in run.rounds)) for run in runs]
    assert len(write_plots(bare, tmp_path / "bare")) == 3


class Page(HTMLParser):
    """Checks that elements close in order, and keeps what could load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.used: set[str] = set()
        self.tags: Counter[str] = Counter()
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"a handler: {name}"
            assert name not in ("src", "srcset", "data", "action"), f"loads {value}"
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href"):
                assert value.startswith("#"), f"loads {value}"
                self.used.add(value[1:])
            self.used |= set(re.findall(r"url\(#([^)]+)\)", value or ""))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def read_page(text: str) -> Page:
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return page


def test_the_page_stands_alone_and_its_elements_close(page):
    read = read_page(page)
    assert not re.search(r"(?i)https?:|//\w|@import|<script", page)
    assert len(read.ids) == len(set(read.ids))
    assert read.used <= set(read.ids)
    assert read.tags["svg"] == 4 + 4
    assert read.tags["title"] > 100  # one per bar, for the mouse
    assert not read.tags.keys() & {"script", "iframe", "link", "img", "object"}


def test_the_page_says_first_what_does_not_hold_and_marks_estimates(sweep, page, tmp_path):
    runs = [unfinished(sweep[0]), sweep[1]]
    text = write_html(runs, SCENARIO, tmp_path).read_text()
    assert text.index("1 of 2 runs did not finish.") < text.index("<table")
    assert "estimates from published scaling laws" in page
    trained = [make_run(0, members=3, rounds=3, fidelity="training")]
    text = write_html(trained, SCENARIO, tmp_path).read_text()
    assert not re.search(r"\best\.", text)
    assert "validation loss over virtual time" in text.lower()


def test_equal_results_give_equal_pages_in_whatever_order(sweep, page, tmp_path):
    shuffled = [sweep[index] for index in np.random.default_rng(3).permutation(len(sweep))]
    assert write_html(shuffled, SCENARIO, tmp_path).read_text() == page


def test_the_page_has_the_answer_the_tables_the_scenario_and_the_digests(page, sweep):
    text = " ".join(read_page(page).text)
    assert headline(sweep, SCENARIO) in text
    assert "forty <homes> & one model" in text
    assert "tokens_per_step = 4096" in text
    assert all(run.events_digest[:16] in text for run in sweep)
    for summary in summarise(sweep, SCENARIO):
        assert text.count(summary.label) >= 5
    for member in sweep[0].members:
        assert member.name in text


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_missing_or_broken_nothing_is_silent_and_nothing_escapes(seed, tmp_path):
    runs = make_odd(seed)
    shown = printed(runs, SCENARIO)
    text = write_html(runs, SCENARIO, tmp_path).read_text()
    read = read_page(text)
    assert not read.tags.keys() & {"script", "i", "b>", "img"}
    words = shown + " ".join(read.text)
    assert not re.search(r"\b(nan|inf|None)\b", words)
    write_csv(runs, tmp_path)
    assert len((tmp_path / "runs.csv").read_text().splitlines()[1:]) == len(runs)
    for summary in summarise(runs):
        diverged = [run for run in runs if tuple(run.changes.items()) == summary.changes and run.final_loss is not None]
        assert summary.diverged == sum(1 for run in diverged if not math.isfinite(run.final_loss))
        assert summary.diverged == 0 or f"{summary.diverged} of {len(summary.seeds)} runs diverged" in words
        assert sum(item.share for item in summary.path) == pytest.approx(1 if summary.path else 0)


def test_a_thousand_members_and_many_variants_are_drawn_thinned(tmp_path):
    runs = [make_run(0, {"run.codec": "q2"}, members=240, rounds=3)]
    runs += [make_run(0, {"run.codec": f"q{bits}"}, members=3, rounds=3) for bits in range(3, 13)]
    page = write_html(runs, SCENARIO, tmp_path).read_text()
    assert "60 of 240 members are drawn" in page
    assert "8 of 11 variants are drawn" in page
    assert "the 200 least used members" in page
    assert len(page) < 2e6


@pytest.mark.soak
def test_twenty_seeds_of_four_variants_of_forty_members_are_quick_and_small(tmp_path):
    runs = make_sweep(20)
    start = time.process_time()
    printed(runs, SCENARIO)
    write_csv(runs, tmp_path)
    write_plots(runs, tmp_path, SCENARIO)
    path = write_html(runs, SCENARIO, tmp_path)
    assert time.process_time() - start < 15
    assert path.stat().st_size < 3_000_000
