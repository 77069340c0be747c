"""Runs under a Python that has SimGrid, not under ours: the same transfers through SimGrid's max-min solver.

Reads a JSON object from standard input: `links` (bytes/s), `routes` (source, target, links), `latency_s`, and `lanes`,
each a source and a list of (target, bytes) sent one after the other. Writes the completion times of every lane.

Settings, each for a reason: all updates are full (the lazy ones of 3.32 disagree with SimGrid's own full ones), factors
are 1, no cross traffic, no RTT weighting (weight-S 0, equal latencies on all routes), no window (TCP-gamma huge).
"""

import json
import sys

import simgrid
from simgrid import Actor, Comm, Engine, LinkInRoute

SETTINGS = (
    *("network/optim:Full", "network/crosstraffic:0", "network/weight-S:0", "network/TCP-gamma:1e30"),
    *("network/latency-factor:1", "network/bandwidth-factor:1", "contexts/factory:thread", "contexts/stack-size:256"),
    *("surf/precision:1e-13", "maxmin/precision:1e-13"),
)


def main() -> None:
    given = json.load(sys.stdin)
    engine = Engine(["oracle", "--log=root.threshold:error", *(f"--cfg={setting}" for setting in SETTINGS)])
    zone = simgrid.NetZone.create_full_zone("zone")
    count = 1 + max(max(source, target) for source, target, _ in given["routes"])
    hosts = [zone.create_host(f"h{n}", 1e9).seal() for n in range(count)]
    share = given["latency_s"] / 2  # carried by the first and the last link of every route
    nodes = 2 * count
    links = []
    for number, capacity in enumerate(given["links"]):
        link = zone.create_link(f"l{number}", capacity)
        links.append(link.set_latency(share if number < nodes else 0.0).seal())
    for source, target, numbers in given["routes"]:
        route = [LinkInRoute(links[number]) for number in numbers]
        zone.add_route(hosts[source].netpoint, hosts[target].netpoint, None, None, route, False)
    zone.seal()
    ends_s = [[] for _ in given["lanes"]]

    def lane(number: int, source: int, transfers: list) -> None:
        for target, size in transfers:
            Comm.sendto(hosts[source], hosts[target], int(size))
            ends_s[number].append(Engine.clock)

    for number, (source, transfers) in enumerate(given["lanes"]):
        Actor.create(f"lane{number}", hosts[source], lane, number, source, transfers)
    engine.run()
    print(json.dumps(ends_s))


if __name__ == "__main__":
    main()
