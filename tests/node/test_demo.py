"""The demo, small: real processes, the hivemind DHT, gRPC."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import pytest

from farflung import cli
from farflung.node.baseline import train_alone
from farflung.node.demo_report import compare_logs, ring_bytes
from farflung.node.tasks.stdlib_gpt import StdlibGpt


def test_two_processes_find_each_other_train_and_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    result = tmp_path / "result.json"
    size = ["--members", "2", "--rounds", "4", "--inner-steps", "5", "--layers", "1", "--width", "32", "--batch", "4"]
    code = cli.main(["demo", *size, "--plain", "--out", str(tmp_path / "out"), "--json", str(result)])
    assert code == 0, capsys.readouterr().out
    value = json.loads(result.read_text())
    assert value["digests_equal"]
    assert (value["members"], value["rounds"], value["mode"]) == (2, 4, "gather")
    assert {"validation_loss", "bytes_ratio_vs_ddp_fp32", "wall_s"} <= value.keys()
    assert value["sample"].startswith("def ")
    for member in value["per_member"]:
        assert {"bytes_up", "bytes_down", "tokens", "wait_s"} <= member.keys()
        assert 0 < member["tokens"] <= 4 * 5 * 4 * 64  # fewer if a loaded machine made somebody late
    assert (tmp_path / "out" / "loss.png").exists()
    assert not [child for child in psutil.Process().children(recursive=True) if "farflung" in child.name()]
    assert cli.main(["demo", "--plain", "--out", str(tmp_path / "out")]) == 2


def test_a_member_that_dies_ends_the_demo_with_its_last_words(tmp_path, monkeypatch, capsys):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho out of cheese\nexit 5\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    assert cli.main(["demo", "--members", "2", "--plain", "--layers", "1", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert "node-0 ended with status 5" in said
    assert "out of cheese" in said


def test_states_that_differ_in_any_round_are_a_failure():
    def entry(index: int, state: str) -> dict:
        return {
            "round": index,
            "trained": index,
            "state": state,
            "payloads": {"a": {"tokens": 10, "bytes": 1, "steps": 5}},
        }

    good = [entry(1, "x"), entry(2, "y")]
    assert compare_logs([good, good], 2).equal
    assert compare_logs([good, good], 2).tokens == {1: 10, 2: 20}
    assert compare_logs([good, good], 2).steps == 10
    assert compare_logs([good, good[1:]], 2).equal  # restarted
    assert not compare_logs([good, [entry(1, "z"), entry(2, "y")]], 2).equal
    assert not compare_logs([good, good[:1]], 2).equal
    assert not compare_logs([good, []], 2).equal


def test_a_ring_all_reduce_sends_nearly_two_gradients_per_step():
    assert ring_bytes(4, 1000, 10) == 60_000


def test_the_baseline_trains_on_the_members_batches_together():
    task = StdlibGpt(layers=1, width=32, context=16, batch=2, decay_steps=9, validation_windows=4)
    alone = train_alone(task, members=3, steps=40)
    assert alone.tokens == 3 * 2 * 16 * 40
    assert alone.training[-1][0] == alone.tokens
    assert alone.training[-1][1] < alone.training[0][1]
