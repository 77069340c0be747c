"""What a run is: settings nobody can change silently, because the hash of their canonical bytes is the run's id."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field, fields
from functools import cached_property

from farflung.protocol import limits
from farflung.protocol.canonical import decode_canonical, encode_canonical
from farflung.protocol.errors import ConfigError, PeerError
from farflung.protocol.identity import PUBLIC_KEY_BYTES
from farflung.protocol.mixing.settings import Mixing
from farflung.protocol.schema import Schema

PROTOCOL_VERSION = 1
RUN_ID_BYTES = 20
MODES = ("gather", "push-sum", "pairs")
TRUSTS = ("crash",)


@dataclass(frozen=True)
class Timing:
    """How long a round may wait. All in milliseconds; every wait lies between a floor and a ceiling."""

    grace_ms: int = 5_000
    """After a quorum of payloads has arrived the proposer waits this long for the others."""

    deadline_floor_ms: int = 10_000
    """A round's adaptive deadline (median + deadline_mads x MAD of recent rounds) is never shorter."""

    deadline_ceiling_ms: int = 600_000
    """... and never longer; it is also the deadline while there is no history."""

    deadline_mads: int = 6
    """k in median + k x MAD: 6 lets one round in some thousands of a normal spread be cut."""

    view_floor_ms: int = 2_000
    """The first wait for a proposer to get its certificate; it doubles with each view."""

    resend_ms: int = 1_000
    """A member repeats its statements of the round this often, as a heartbeat, to whoever may have missed them."""

    def __post_init__(self) -> None:
        for item in fields(self):
            if not 0 < getattr(self, item.name) <= 86_400_000:
                raise ConfigError(f"{item.name} must be 1 to 86400000, got {getattr(self, item.name)}")
        if self.deadline_floor_ms > self.deadline_ceiling_ms:
            raise ConfigError(f"deadline_floor_ms {self.deadline_floor_ms} is above deadline_ceiling_ms")


@dataclass(frozen=True)
class Genesis:
    """One training effort. Raises ConfigError, with the field's name, if a value cannot work."""

    name: str
    """For people: 1 to 64 printable characters."""

    founder: bytes
    """The founder's Ed25519 public key."""

    state_digest: bytes
    """Digest of the state every member starts from: θ₀ and zero outer buffers (`protocol/blob.py`)."""

    schema: Schema
    """The trainable tensors."""

    task: str = "builtin:stdlib-gpt"
    """What is trained: a built-in task or "module:object"."""

    task_options: str = "{}"
    """The task's options, as JSON text."""

    codec: str = "ef(1)|q2"
    """How pseudo-gradients travel (DESIGN §7). Costs `bits` of the codec per parameter and round."""

    rule: str = "mean"
    """How they are combined."""

    outer: str = "nesterov(lr=0.7,momentum=0.6)"
    """How the anchor moves."""

    inner_steps: int = 30
    """H: local steps per round."""

    rounds: int = 0
    """The run is over after this many rounds with payloads; 0 = it goes on until nobody trains any more."""

    weights: str = "uniform"
    """What a member's claims count for: "uniform", "steps(cap=500)" or "tokens(cap=100000)"; caps bound liars."""

    mode: str = "gather"
    """How updates meet: "gather" (everybody gets every payload), "push-sum" or "pairs" (members mix with a few)."""

    mixing: Mixing = field(default_factory=Mixing)
    """How members mix; with "gather" it is not part of the run and must be left alone."""

    trust: str = "crash"
    """What voters are trusted with: `crash` assumes that they may stop but do not lie to each other."""

    closed: bool = True
    """Closed: only who knows the join secret is admitted, and all members vote. Open: everybody is, and only members
    who showed the secret vote."""

    secret_digest: bytes = b""
    """SHA-256 of the join secret, so that a member can tell whether it holds the right one."""

    start_members: int = 1
    """Training starts once this many members have been admitted, and then never waits for them again."""

    payloads_min: int = 1
    """A round with fewer payloads is void and is not counted: the rule needs so many for the liars it is to survive."""

    quorum_percent: int = 66
    """Share of the members whose payloads start the grace window."""

    snapshot_rounds: int = 5
    """Every member writes the state to disk after each such round; joiners are served from it."""

    timing: Timing = field(default_factory=Timing)

    validation_digest: str = ""
    """Digest of the validation data, where the task has some."""

    version: int = PROTOCOL_VERSION

    def __post_init__(self) -> None:
        checks = (
            (0 < len(self.name) <= limits.NAME_CHARS_MAX and self.name.isprintable(), "name"),
            (len(self.founder) == PUBLIC_KEY_BYTES, "founder"),
            (len(self.state_digest) == 32, "state_digest"),
            (1 <= self.inner_steps <= 1_000_000, "inner_steps"),
            (0 <= self.rounds <= 1_000_000_000, "rounds"),
            (self.mode in MODES, "mode"),
            (self.mode != "gather" or self.mixing == Mixing(), "mixing (gather does not mix)"),
            (self.trust in TRUSTS, "trust"),
            (len(self.secret_digest) in (0, 32), "secret_digest"),
            (bool(self.secret_digest) or not self.closed, "secret_digest (a closed run needs a join secret)"),
            (1 <= self.start_members <= limits.MEMBERS_MAX, "start_members"),
            (1 <= self.payloads_min <= limits.MEMBERS_MAX, "payloads_min"),
            (1 <= self.quorum_percent <= 100, "quorum_percent"),
            (1 <= self.snapshot_rounds <= 10_000, "snapshot_rounds"),
            (self.version == PROTOCOL_VERSION, "version"),
        )
        for fine, what in checks:
            if not fine:
                value = getattr(self, what.split()[0])
                raise ConfigError(f"genesis: {what} cannot be {value!r}")

    @cached_property
    def canonical_bytes(self) -> bytes:
        """Canonical bytes."""
        value = {item.name: getattr(self, item.name) for item in fields(self)}
        value["founder"] = self.founder.hex()
        value["state_digest"] = self.state_digest.hex()
        value["secret_digest"] = self.secret_digest.hex()
        value["schema"] = self.schema.to_json()
        if self.mode == "gather":
            del value["mixing"]
        else:
            value["mixing"] = self.mixing.to_json()
        value["timing"] = {item.name: getattr(self.timing, item.name) for item in fields(self.timing)}
        return encode_canonical(value)

    @cached_property
    def run_id(self) -> bytes:
        """20 bytes: the hash of the canonical bytes."""
        return run_id_of(self.canonical_bytes)

    def admits(self, secret: bytes) -> bool:
        """Whether `secret` is the run's join secret."""
        return bool(self.secret_digest) and hmac.compare_digest(secret_digest(secret), self.secret_digest)


def run_id_of(genesis_bytes: bytes) -> bytes:
    """The run id that belongs to canonical genesis bytes."""
    return hashlib.sha256(b"farflung run\0" + genesis_bytes).digest()[:RUN_ID_BYTES]


def secret_digest(secret: bytes) -> bytes:
    """What genesis says of the join secret. The secret has 16 random bytes or more: its hash gives nothing away."""
    return hashlib.sha256(b"farflung join secret\0" + secret).digest()


def decode_genesis(data: bytes, run_id: bytes) -> Genesis:
    """The genesis whose hash is `run_id`.

    Raises PeerError if the bytes are malformed or belong to another run, and ConfigError if they are right but this
    version of farflung cannot run them (an unknown key means a newer version).
    """
    value = decode_canonical(data, bytes_max=limits.GENESIS_BYTES_MAX)
    if run_id_of(data) != run_id:
        raise PeerError("?", "a genesis of another run")
    if not isinstance(value, dict):
        raise PeerError("?", "a genesis that is not a table")
    version = value.get("version")
    if version != PROTOCOL_VERSION:
        raise ConfigError(
            f"the run speaks protocol version {version}, this farflung speaks {PROTOCOL_VERSION}: "
            "install the version the run was created with"
        )
    known = {item.name for item in fields(Genesis)}
    unknown = sorted(value.keys() - known)
    if unknown:
        raise ConfigError(f"the run has settings this farflung does not know ({', '.join(unknown)}): update farflung")
    types = {"str": str, "int": int, "bool": bool}
    tables = ((value, fields(Genesis)), (value.get("timing"), fields(Timing)), (value.get("mixing"), fields(Mixing)))
    for table, kinds in tables:
        for item in kinds:
            wanted = types.get(str(item.type))
            if isinstance(table, dict) and item.name in table and wanted and type(table[item.name]) is not wanted:
                raise PeerError("?", f"malformed genesis: {item.name} is not of type {item.type}")
    try:
        genesis = Genesis(
            **{
                **value,
                "founder": bytes.fromhex(value["founder"]),
                "state_digest": bytes.fromhex(value["state_digest"]),
                "secret_digest": bytes.fromhex(value["secret_digest"]),
                "schema": Schema.from_json(value["schema"]),
                "timing": Timing(**value["timing"]),
                "mixing": Mixing(**value.get("mixing", {})),
            }
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PeerError("?", f"malformed genesis: {error}") from None
    if genesis.canonical_bytes != data:
        raise PeerError("?", "a genesis that leaves out settings, or has some that its mode does not know")
    return genesis
