"""Bytes that a member sends in a round as a swarm grows: counted to 256 members, measured on real nodes to 16.

    python benchmarks/wire_bytes.py                        # counted, as `farflung bench wire` does; 20 s
    python benchmarks/wire_bytes.py --measure 4 8 16       # real nodes in the simulator's world as well; 7 min

Measured are eight rounds of a model of 65 thousand parameters on lines of 10 and 100 Mbit/s, two references included,
once all members are there. Counted for the same model and rounds of the same length, the two are written side by side:
bytes should be equal; counted seconds are a lower bound, as slow start, headers and timers are not in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import arguments, console, goal, noise, publish

from farflung.aggregation.outer import parse_outer
from farflung.sim.bench.wire_bench import Ask, payload_length, plain_row, run_bench
from farflung.sim.bench.wire_count import Ground, Way, count
from farflung.sim.bench.wire_measure import Rehearsal, measure
from farflung.sim.bench.wire_report import crossovers

RESULTS = Path(__file__).parent / "results"

NEAR = 0.05
"""Counted and measured are the same within this."""


def counted(ask: Ask) -> tuple[list[dict[str, Any]], list[str]]:
    result = run_bench(ask)
    kept = ("members", "way", "ticks", "payloads", "bulk", "control", "total", "exchange_s")
    rows = [{name: plain_row(item, ask)[name] for name in kept} for item in result.counts]
    return rows, crossovers(result)


def beside(way: Way, members: int, params: int) -> dict[str, Any]:
    """One way for so many members: what real nodes sent, and what is counted for a round as long as theirs."""
    what = Rehearsal(way, members, params=params)
    found = measure(what)
    state_bytes = 4 * params * (1 + len(parse_outer(what.outer).state_names))
    lengths = {way.codec: payload_length(way.codec, params)}
    item = count(way, members, Ground(lengths, state_bytes, what.reference_rounds, found.round_s))
    row = {
        "members": members,
        "way": way.label,
        "measured_bulk": found.bulk,
        "counted_bulk": item.bulk + item.carried,
        "measured_control": found.control,
        "counted_control": item.said + item.beats,
        "total_ratio": found.total / item.total,
        "bulk_ratio": found.bulk / (item.bulk + item.carried),
        "measured_s": found.round_s - what.local_s,
        "counted_s": item.wire_s(1e6 * what.up_mbit, 1e6 * what.down_mbit, what.latency_s),
    }
    console.print(f"{members} members, {way.label}: {row['total_ratio']:.3f} of what is counted", highlight=False)
    return row


def measured(ask: Ask, members: Sequence[int], params: int) -> list[dict[str, Any]]:
    return [beside(way, n, params) for n in members for way in ask.ways()]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.set_defaults(out=RESULTS)
    parser.add_argument("--measure", type=int, nargs="*", default=[], help="numbers of members to measure")
    parser.add_argument("--params", type=int, default=1 << 20, help="of the counted model")
    parser.add_argument("--measured-params", type=int, default=1 << 16, help="of the measured model")
    args = parser.parse_args()
    ask = Ask(params=args.params)
    rows, words = counted(ask)
    publish(args.out, "wire_bytes", rows, title=f"bytes per member and round, {ask.params:,} parameters", notes=words)
    if args.measure:
        beside_rows = measured(ask, args.measure, args.measured_params)
        worst = max(abs(row["total_ratio"] - 1) for row in beside_rows)
        notes = [goal(f"counted and measured within {NEAR:.0%}, at worst {worst:.1%}", worst <= NEAR), noise()]
        publish(args.out, "wire_bytes_measured", beside_rows, title="measured and counted", notes=notes)


if __name__ == "__main__":
    main()
