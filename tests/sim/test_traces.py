"""Trace files: strict, canonical, and the same sessions as a scenario with the same churn draws."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farflung.protocol.errors import ConfigError
from farflung.sim.churn import Session, sessions
from farflung.sim.draw import Draw
from farflung.sim.scenario import Churn
from farflung.sim.traces import Trace, format_trace, generate, parse_trace, read_trace, sessions_of, write_trace

CHURN = Churn(session_s=Draw("weibull", (0.59, 2340.0)), gap_s=Draw("exponential", (1200.0,)), crash=0.5)
TEXT = """# members = 3
member,start_s,end_s,crash
0,0,3600,1
0,4200.5,9000,0
2,60,inf,0
"""


def test_the_documented_example_reads():
    trace = parse_trace(TEXT)
    assert trace.sessions == (
        (Session(0.0, 3600.0, True), Session(4200.5, 9000.0, False)),
        (),
        (Session(60.0, math.inf, False),),
    )
    assert format_trace(trace) == TEXT


def test_members_may_be_mixed_and_comments_left():
    mixed = "\n# from a log\nmember,start_s,end_s,crash\r\n1, 5, 9, 0\n\n0,0,3600,1\n1,10,11.0,1\n"
    assert parse_trace(mixed).sessions == (
        (Session(0.0, 3600.0, True),),
        (Session(5.0, 9.0, False), Session(10.0, 11.0, True)),
    )


@st.composite
def traces(draw):
    def one_member():
        now_s, found = 0.0, []
        for _ in range(draw(st.integers(0, 4))):
            start_s = now_s + draw(st.floats(1.0, 1e6))
            now_s = start_s + draw(st.floats(1.0, 1e6))
            found.append(Session(start_s, now_s, draw(st.booleans())))
        return tuple(found)

    return Trace(tuple(one_member() for _ in range(draw(st.integers(1, 5)))))


@given(traces())
def test_text_and_back_is_the_same_trace(trace):
    text = format_trace(trace)
    assert parse_trace(text) == trace
    assert format_trace(parse_trace(text)) == text


def test_a_file_and_back_is_the_same_trace(tmp_path):
    trace = generate(CHURN, 7, 50 * 3600.0, seed=4)
    write_trace(trace, tmp_path / "trace.csv")
    assert read_trace(tmp_path / "trace.csv") == trace
    assert b"\r" not in (tmp_path / "trace.csv").read_bytes()


def test_what_is_generated_is_what_a_scenario_draws():
    trace = generate(CHURN, 5, 9000.0, seed=3, group=2)
    assert trace.sessions[4] == sessions(CHURN, seed=3, group=2, member=4, horizon_s=9000.0)
    assert trace != generate(CHURN, 5, 9000.0, seed=4, group=2)
    diurnal = generate(Churn(kind="diurnal", low=0.0, high=0.4), 20, 1e6, seed=0)
    assert () in diurnal.sessions  # those who never come survive the round trip, too
    assert parse_trace(format_trace(diurnal)) == diurnal


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("0,0,3600", "four values"),
        ("0,0,3600,1,2", "four values"),
        ("-1,0,3600,1", "'-1'"),
        ("x,0,3600,1", "'x'"),
        ("9999999,0,3600,1", "'9999999'"),
        ("5,0,3600,1", "positions are 0 to 1, got 5"),
        ("0,nan,3600,1", "'nan,3600'"),
        ("0,-5,3600,1", "'-5,3600'"),
        ("0,inf,inf,1", "at 0 or later, got inf"),
        ("0,9,9,1", "9 to 9"),
        ("0,9,8,1", "9 to 8"),
        ("0,9,99,yes", "'yes'"),
        ("1,150,160,0", "after the last, 150, got 150"),
        ("1,20,30,0", "after the last, 150, got 20"),
    ],
)
def test_a_wrong_line_is_refused(line, why):
    text = f"# members = 2\nmember,start_s,end_s,crash\n1,100,150,0\n{line}\n"
    with pytest.raises(ConfigError) as error:
        parse_trace(text, name="hosts.csv")
    assert why in str(error.value)
    assert str(error.value).startswith("hosts.csv" if "positions" in why else "hosts.csv, line 4: ")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is no trace"),
        ("0,0,3600,1\n", "line 1: the first line is member"),
        ("member,start_s,end_s,crash\n", "no sessions"),
        ("# members = 0\nmember,start_s,end_s,crash\n", "line 1: the number of members"),
        ("member,start_s,end_s,crash\n0,0,9,1\n# members = 4\n", "line 3: the number of members"),
    ],
)
def test_a_text_that_is_no_trace_is_refused(text, why):
    with pytest.raises(ConfigError, match=why):
        parse_trace(text)


def test_what_cannot_be_read_or_generated_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.csv"):
        read_trace(tmp_path / "nowhere.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.csv"):
        read_trace(tmp_path / "binary.csv")
    for members, horizon_s in ((0, 10.0), (3, 0.0), (3, math.inf)):
        with pytest.raises(ConfigError, match="got"):
            generate(CHURN, members, horizon_s, seed=0)
    with pytest.raises(ConfigError, match="not drawn"):
        generate(Churn(kind="trace", trace="a.csv"), 3, 10.0, seed=0)
    with pytest.raises(ConfigError, match="member 0, session 1"):
        Trace(((Session(0.0, 5.0, True), Session(5.0, 9.0, True)),))
    with pytest.raises(ConfigError, match=r"has 3 members.*got a group of 4"):
        sessions_of(parse_trace(TEXT), 4, name="hosts.csv")
    assert len(sessions_of(parse_trace(TEXT), 2, name="hosts.csv")) == 2
