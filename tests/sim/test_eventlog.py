"""Two runs are equal if and only if their logs are; and where they part is shown."""

import hashlib

import pytest

from farflung.sim.eventlog import CONTEXT_LINES, EventLog, first_divergence


def write(path, lines):
    log = EventLog(path)
    for line in lines:
        log.add(line)
    log.close()
    return log


def test_the_digest_is_that_of_the_file(tmp_path):
    log = EventLog(tmp_path / "log")
    log.message(5, 0, 1, "Deliver", 60)
    log.member(7, 2, "applies", "3 abc")
    log.member(7, 2, "starts")
    log.add("grün")
    log.close()
    data = (tmp_path / "log").read_bytes()
    assert data == b"5 0>1 Deliver 60\n7 2 applies 3 abc\n7 2 starts \ngr\\xfcn\n"
    assert log.digest == hashlib.blake2b(data, digest_size=16).hexdigest()
    assert log.events == 4


def test_the_digest_needs_no_file_and_depends_on_the_order():
    one, same, other = EventLog(), EventLog(), EventLog()
    for log, lines in ((one, "ab"), (same, "ab"), (other, "ba")):
        for line in lines:
            log.add(line)
    assert one.digest == same.digest != other.digest


@pytest.mark.parametrize("line", [1, 2, 5, 10])
def test_the_first_difference_is_named_with_what_came_before(tmp_path, line):
    left = [f"event {number}" for number in range(10)]
    right = [*left[: line - 1], "other", *left[line:]]
    write(tmp_path / "l", left)
    write(tmp_path / "r", right)
    found = first_divergence(tmp_path / "l", tmp_path / "r")
    assert found is not None
    assert (found.line, found.left, found.right) == (line, left[line - 1], "other")
    assert found.before == tuple(left[max(0, line - 1 - CONTEXT_LINES) : line - 1])
    assert f"line {line}:" in str(found)
    assert f"- {left[line - 1]}\n  + other" in str(found)


def test_equal_logs_do_not_part_and_a_shorter_one_ends(tmp_path):
    write(tmp_path / "l", "abc")
    write(tmp_path / "same", "abc")
    write(tmp_path / "short", "ab")
    assert first_divergence(tmp_path / "l", tmp_path / "same") is None
    found = first_divergence(tmp_path / "l", tmp_path / "short")
    assert found is not None
    assert (found.line, found.left, found.right) == (3, "c", "")
    assert "(the log ends)" in str(found)
    with pytest.raises(OSError):
        first_divergence(tmp_path / "l", tmp_path / "nowhere")
