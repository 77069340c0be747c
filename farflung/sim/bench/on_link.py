"""What a round costs on the user's line: bytes up and down for each way of exchanging, and the codec's own time."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

from farflung.protocol.errors import ConfigError
from farflung.sim.bench.codec_rows import CodecRow

UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


@dataclass(frozen=True)
class Line:
    """A member's line, the swarm around it, and the model."""

    up_bps: float
    down_bps: float
    members: int
    params: float
    local_s: float
    """Seconds of a local phase: what an exchange is compared with."""
    threads: int = 1
    """Cores that code and decode."""

    def __post_init__(self) -> None:
        if self.members < 2:
            raise ConfigError(f"a swarm has at least two members, got {self.members}")
        for name in ("up_bps", "down_bps", "params", "local_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")


class Exchange(NamedTuple):
    """One round of one member: bits each way, and seconds."""

    up_bits: float
    down_bits: float
    codec_s: float
    """Encode the own update, decode what came."""
    total_s: float
    """Codec, then the slower direction; latency and waiting are the simulator's business."""


def parse_rate(text: str) -> float:
    """Bits per second of "20mbit", "1.5gbit" or "800kbit". Raises ConfigError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*(kbit|mbit|gbit)(?:/s|ps)?", text.strip().lower())
    if match is None or not float(match[1]):
        raise ConfigError(f"a rate is a number with kbit, mbit or gbit, like 20mbit, got {text!r}")
    return float(match[1]) * UNITS[match[2]]


def parse_link(text: str) -> tuple[float, float]:
    """ "20mbit", or "20mbit/100mbit" for up and down, as bits per second. Raises ConfigError."""
    up, _, down = text.partition("/")
    return parse_rate(up), parse_rate(down or up)


def gather(row: CodecRow, line: Line) -> Exchange:
    """Everybody gets everybody's payload: (members - 1) times the upload comes down."""
    return _exchange(row, line, up=1.0, down=line.members - 1.0, decodes=line.members)


def all_reduce(row: CodecRow, line: Line) -> Exchange:
    """Reduce-scatter and all-gather of a dense format: 2 (n - 1) / n of the payload each way. What is added has to be
    coded again for the second half, which costs its quantisation error once more; only formats that send every
    coordinate fit.
    """
    share = 2 * (line.members - 1) / line.members
    return _exchange(row, line, up=share, down=share, decodes=2)


def push_sum(row: CodecRow, line: Line) -> Exchange:
    """One period of a graph of degree one: ceil(log2 n) payloads each way, each decoded and coded again."""
    ticks = math.ceil(math.log2(line.members))
    return _exchange(row, line, up=ticks, down=ticks, decodes=ticks, encodes=ticks)


EXCHANGES = {"gather": gather, "all-reduce": all_reduce, "push-sum": push_sum}


def fits(row: CodecRow, exchange: str) -> bool:
    """Whether a way of exchanging makes sense for a codec: only dense formats are added on the way."""
    return exchange == "gather" or "top" not in row.canonical


def _exchange(row: CodecRow, line: Line, *, up: float, down: float, decodes: float, encodes: float = 1.0) -> Exchange:
    payload_bits, gigabytes = row.bits_per_parameter * line.params, 4 * line.params / 1e9
    codec_s = gigabytes * (encodes / row.encode_gb_s + decodes / row.decode_gb_s) / line.threads
    wire_s = max(up * payload_bits / line.up_bps, down * payload_bits / line.down_bps)
    return Exchange(up * payload_bits, down * payload_bits, codec_s, codec_s + wire_s)
