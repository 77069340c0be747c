"""Nanoseconds of every part of a round, measured: the only place where they stand.

On one core of an Intel Xeon (Sapphire Rapids class, 2 virtual cores), vectors of 4 million, November 2026: the least
CPU time of several runs, on a machine with other work, as `benchmarks/service_costs.py` takes it. Codecs were timed as
wholes and the parts fitted to them, none below 0: a part may be 0 where its neighbours carry it, and a sum is better
known than its parts. Presets, none of which was fitted, took 0.82 to 1.17 times the sum of their parts to encode and
to decode; to check, 0.66 to 1.1 times, and where only factors travel, at 0.02 ns and less, up to twice.
"""

from __future__ import annotations


def _part(name: str, **ns_of_step: float) -> dict[str, float]:
    return {f"{name}.{step}": ns for step, ns in ns_of_step.items()}


NANOSECONDS: dict[str, float] = {
    **_part("adapt", encode=5.08),
    **_part("ans", encode=0.283, decode=0.293, check=0.135),
    **_part("ans/code", encode=4.17, decode=3.89, check=3.91),
    **_part("ans/index", encode=5.37, decode=6.61, check=7.01),
    **_part("ans/raw", encode=4.25, decode=3.98, check=4.14),
    **_part("ans/sign", encode=1.14, decode=1.22, check=1.25),
    **_part("bf16", encode=1, decode=0.301, check=0.186),
    **_part("bf16/call", encode=3.21e03, decode=1.12e03, check=0),
    **_part("cyclic", encode=0.617),
    **_part("cyclic/kept", encode=0, decode=1.36),
    **_part("dct", encode=0, decode=0.917),
    **_part("dct/edge", encode=91.1, decode=102),
    **_part("dct/side", encode=0.0877, decode=0.102),
    **_part("deadzone", encode=0.479),
    **_part("dgc", encode=3.96),
    **_part("dgc/clip", encode=1.43),
    **_part("dgc/kept", encode=16.7),
    **_part("e3m0", encode=1.16, decode=0.842, check=0.381),
    **_part("e3m0/block", encode=43.1, decode=63.9, check=35.8),
    **_part("e3m0/call", encode=5.75e03, decode=3.81e03, check=6.28e-12),
    **_part("ef", encode=0.963),
    **_part("ef/bound", encode=3.79),
    **_part("ef/dense", encode=0),
    **_part("ef/whole", encode=0.933),
    **_part("ef21", encode=4.08, decode=0.768, advance=0.988),
    **_part("elias-fano", encode=0.254, decode=0.266, check=0.107),
    **_part("elias-fano/index", encode=5.08, decode=6.55, check=5.79),
    **_part("fp16", encode=1.13, decode=2.18, check=0.349),
    **_part("fp16/call", encode=7.35e03, decode=296, check=0),
    **_part("fp32", encode=1.24, decode=0.39, check=0.304),
    **_part("fp32/call", encode=2e03, decode=1.18e03, check=64.8),
    **_part("global-topk", encode=4.28),
    **_part("global-topk/kept", encode=14.6, decode=15.1, check=14.2),
    **_part("global-topk/unit", encode=5.51e03, decode=1.46e04, check=8.26e03),
    **_part("int2", encode=0.515, decode=0.384, check=0.364),
    **_part("int2/block", encode=31.9, decode=7.13, check=6.98),
    **_part("int2/call", encode=1.17e04, decode=403, check=0),
    **_part("int4", encode=0.674, decode=0.404, check=0.34),
    **_part("int4/block", encode=28.6, decode=4.33, check=6.76),
    **_part("int4/call", encode=3.73e03, decode=256, check=1.21e-05),
    **_part("int8", encode=0.803, decode=0.153, check=0.147),
    **_part("int8/block", encode=9.54, decode=8.24, check=5.07),
    **_part("int8/call", encode=5.59e03, decode=1.11e03, check=0),
    **_part("lookahead", encode=0.896),
    **_part("lowrank", encode=2.38, decode=0.145),
    **_part("lowrank-shared", encode=2.22, decode=0.0605, advance=2.23),
    **_part("lowrank-shared/rank", encode=0.0907, decode=0.162, advance=0.1),
    **_part("lowrank-shared/square", advance=0),
    **_part("lowrank/rank", encode=0.201, decode=0.125),
    **_part("lowrank/square", encode=0),
    **_part("mix", encode=2.58, decode=0.752),
    **_part("mix/kept", decode=24.7),
    **_part("mix/sparse", decode=0.583),
    **_part("natural", encode=1.13, decode=1.86, check=1.07),
    **_part("natural/call", encode=7.07e04, decode=1.99e04, check=0),
    **_part("nf4", encode=1.38, decode=0.882, check=0.402),
    **_part("nf4/block", encode=38.4, decode=54.9, check=27.2),
    **_part("nf4/call", encode=4.14e03, decode=3.83e03, check=0.0176),
    **_part("q2", encode=1.34, decode=0.464, check=0.456),
    **_part("q2/block", encode=54.5, decode=27.6, check=24.8),
    **_part("q2/call", encode=2.75e03, decode=1.22e03, check=402),
    **_part("qsgd2", encode=1.6, decode=0.845, check=1.01),
    **_part("qsgd2/block", encode=84.5, decode=106, check=51),
    **_part("qsgd2/call", encode=1.47e05, decode=4.41e04, check=0),
    **_part("qsgd4", encode=1.45, decode=0.824, check=0.982),
    **_part("qsgd4/block", encode=61.5, decode=82.6, check=43.9),
    **_part("qsgd4/call", encode=1.57e05, decode=4.06e04, check=0),
    **_part("qsgd8", encode=2.22, decode=1.11, check=1.12),
    **_part("qsgd8/block", encode=84.8, decode=80.6, check=50.2),
    **_part("qsgd8/call", encode=1.04e05, decode=3.59e04, check=0),
    **_part("randk", encode=0.533, decode=0.169, check=0),
    **_part("randk/call", encode=5.1e-10, decode=2.26e-11, check=0),
    **_part("randk/chunk", encode=65.9, decode=64.4, check=0),
    **_part("randk/kept", encode=10, decode=5.81, check=0),
    **_part("rice", encode=0.272, decode=0.227, check=0.0714),
    **_part("rice/index", encode=4.58, decode=5.62, check=4.93),
    **_part("rotate", encode=3.03, decode=3.42),
    **_part("rules", encode=1.82, decode=0.223),
    **_part("rules/kept", decode=0.801),
    **_part("rules/sparse", decode=0.0518),
    **_part("sign", encode=1.25, decode=0.437, check=0.109),
    **_part("sign/block", encode=74, decode=55.7, check=1.86),
    **_part("sign/call", encode=9.82e03, decode=3.45e03, check=1.36e-12),
    **_part("sketch", encode=2.46, decode=0.402),
    **_part("sketch/keep", decode=3.43),
    **_part("sketch/row", encode=1.26, decode=1.52),
    **_part("stat2", encode=3.28, decode=0.639, check=0.609),
    **_part("stat2/block", encode=96, decode=49.8, check=49.8),
    **_part("stat2/call", encode=5.55e03, decode=896, check=8.65e-12),
    **_part("stat4", encode=3.25, decode=0.611, check=0.569),
    **_part("stat4/block", encode=199, decode=80.1, check=84.2),
    **_part("stat4/call", encode=4.94e03, decode=595, check=0),
    **_part("stat8", encode=3.47, decode=0.758, check=0.659),
    **_part("stat8/block", encode=2.15e03, decode=0, check=502),
    **_part("stat8/call", encode=2.71e03, decode=1.16e03, check=0),
    **_part("ternary", encode=0.166, decode=0.756, check=0.793),
    **_part("ternary/block", encode=39.2, decode=85.4, check=58.2),
    **_part("ternary/call", encode=1.49e05, decode=3.11e04, check=0),
    **_part("tiles", encode=1.46, decode=1.13),
    **_part("tiles/kept", decode=24.4),
    **_part("tiles/sparse", decode=0.252),
    **_part("topk", encode=0.297, decode=0.147, check=0),
    **_part("topk/call", encode=2.83e04, decode=0, check=0),
    **_part("topk/chunk", encode=275, decode=121, check=80.3),
    **_part("topk/kept", encode=9.6, decode=3.36, check=3.29),
    **_part("topk/lost", encode=10.4),
    "mean.row": 0.519,
    "mean.kept": 8.88,
    "mean.divide": 1.1,
    "median.row": 1.2,
    "median.compare": 0.245,
    "sgd": 1.24,
    "nesterov": 2.07,
    "norm": 0.573,
    "gain": 0.916,
    "hash": 0.177,
}
"""Nanoseconds of a row: "part.step", or "part/unit.step" for what does not go by coordinates.

Per coordinate, or per value for a format behind a sparsifier. Units: `block` of a format, `call` of a format's kernels
(one for every 65536 coordinates), `chunk`, `kept` value of a sparse row, `lost` value that a sparsifier moves, `unit`
of a global top-k, `index`, `code` of 2 to 8 bits, `sign` and `raw` byte of an entropy coder, `row` of a sketch, `rank`
of low rank per coordinate of its matrices and `square` of it per row, `side` and `edge` (1 / side) of `dct`.
ef: `dense` where rows are, `whole` where it cannot work run after run, `bound`. `sparse`: per coordinate of a
sparse row. mean.row and median.row are per row and coordinate, mean.kept per kept value, median.compare per comparator
of the sorting network and coordinate, hash per byte. Much of an encoder's time is the kernel handing out memory.
"""
