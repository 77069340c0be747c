from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Envelope(_message.Message):
    __slots__ = ("public_key", "body", "signature")
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    BODY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    public_key: bytes
    body: bytes
    signature: bytes
    def __init__(self, public_key: _Optional[bytes] = ..., body: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Body(_message.Message):
    __slots__ = ("run_id", "round", "parent", "announce", "proposal", "vote", "promise", "join", "leave", "status", "certified", "mixing")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCE_FIELD_NUMBER: _ClassVar[int]
    PROPOSAL_FIELD_NUMBER: _ClassVar[int]
    VOTE_FIELD_NUMBER: _ClassVar[int]
    PROMISE_FIELD_NUMBER: _ClassVar[int]
    JOIN_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    CERTIFIED_FIELD_NUMBER: _ClassVar[int]
    MIXING_FIELD_NUMBER: _ClassVar[int]
    run_id: bytes
    round: int
    parent: bytes
    announce: bytes
    proposal: Proposal
    vote: Vote
    promise: Promise
    join: bytes
    leave: bytes
    status: Status
    certified: bytes
    mixing: bytes
    def __init__(self, run_id: _Optional[bytes] = ..., round: _Optional[int] = ..., parent: _Optional[bytes] = ..., announce: _Optional[bytes] = ..., proposal: _Optional[_Union[Proposal, _Mapping]] = ..., vote: _Optional[_Union[Vote, _Mapping]] = ..., promise: _Optional[_Union[Promise, _Mapping]] = ..., join: _Optional[bytes] = ..., leave: _Optional[bytes] = ..., status: _Optional[_Union[Status, _Mapping]] = ..., certified: _Optional[bytes] = ..., mixing: _Optional[bytes] = ...) -> None: ...

class Proposal(_message.Message):
    __slots__ = ("view", "manifest")
    VIEW_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    view: int
    manifest: bytes
    def __init__(self, view: _Optional[int] = ..., manifest: _Optional[bytes] = ...) -> None: ...

class Vote(_message.Message):
    __slots__ = ("view", "manifest_digest", "state_digest", "signature")
    VIEW_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    view: int
    manifest_digest: bytes
    state_digest: bytes
    signature: bytes
    def __init__(self, view: _Optional[int] = ..., manifest_digest: _Optional[bytes] = ..., state_digest: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Promise(_message.Message):
    __slots__ = ("view", "voted", "voted_view", "voted_manifest")
    VIEW_FIELD_NUMBER: _ClassVar[int]
    VOTED_FIELD_NUMBER: _ClassVar[int]
    VOTED_VIEW_FIELD_NUMBER: _ClassVar[int]
    VOTED_MANIFEST_FIELD_NUMBER: _ClassVar[int]
    view: int
    voted: bool
    voted_view: int
    voted_manifest: bytes
    def __init__(self, view: _Optional[int] = ..., voted: bool = ..., voted_view: _Optional[int] = ..., voted_manifest: _Optional[bytes] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("view", "upload_bytes_per_s", "inner_step")
    VIEW_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    INNER_STEP_FIELD_NUMBER: _ClassVar[int]
    view: int
    upload_bytes_per_s: int
    inner_step: int
    def __init__(self, view: _Optional[int] = ..., upload_bytes_per_s: _Optional[int] = ..., inner_step: _Optional[int] = ...) -> None: ...

class Reply(_message.Message):
    __slots__ = ("accepted", "why")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    why: str
    def __init__(self, accepted: bool = ..., why: _Optional[str] = ...) -> None: ...

class RecordsRequest(_message.Message):
    __slots__ = ("run_id", "records")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    run_id: bytes
    records: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, run_id: _Optional[bytes] = ..., records: _Optional[_Iterable[bytes]] = ...) -> None: ...

class RecordsReply(_message.Message):
    __slots__ = ("records",)
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    records: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, records: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ChainRequest(_message.Message):
    __slots__ = ("run_id", "from_round")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    FROM_ROUND_FIELD_NUMBER: _ClassVar[int]
    run_id: bytes
    from_round: int
    def __init__(self, run_id: _Optional[bytes] = ..., from_round: _Optional[int] = ...) -> None: ...

class ChainReply(_message.Message):
    __slots__ = ("certificates", "tip_round")
    CERTIFICATES_FIELD_NUMBER: _ClassVar[int]
    TIP_ROUND_FIELD_NUMBER: _ClassVar[int]
    certificates: _containers.RepeatedScalarFieldContainer[bytes]
    tip_round: int
    def __init__(self, certificates: _Optional[_Iterable[bytes]] = ..., tip_round: _Optional[int] = ...) -> None: ...

class GenesisRequest(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: bytes
    def __init__(self, run_id: _Optional[bytes] = ...) -> None: ...

class GenesisReply(_message.Message):
    __slots__ = ("genesis",)
    GENESIS_FIELD_NUMBER: _ClassVar[int]
    genesis: bytes
    def __init__(self, genesis: _Optional[bytes] = ...) -> None: ...

class SnapshotRequest(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: bytes
    def __init__(self, run_id: _Optional[bytes] = ...) -> None: ...

class SnapshotReply(_message.Message):
    __slots__ = ("round", "size", "chunk_bytes", "digest")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    round: int
    size: int
    chunk_bytes: int
    digest: bytes
    def __init__(self, round: _Optional[int] = ..., size: _Optional[int] = ..., chunk_bytes: _Optional[int] = ..., digest: _Optional[bytes] = ...) -> None: ...

class BlobRequest(_message.Message):
    __slots__ = ("run_id", "digest", "chunks")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    run_id: bytes
    digest: bytes
    chunks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, run_id: _Optional[bytes] = ..., digest: _Optional[bytes] = ..., chunks: _Optional[_Iterable[int]] = ...) -> None: ...

class BlobChunk(_message.Message):
    __slots__ = ("index", "data")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    index: int
    data: bytes
    def __init__(self, index: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: bytes
    def __init__(self, run_id: _Optional[bytes] = ...) -> None: ...

class Holding(_message.Message):
    __slots__ = ("digest", "all", "chunks")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ALL_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    all: bool
    chunks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, digest: _Optional[bytes] = ..., all: bool = ..., chunks: _Optional[_Iterable[int]] = ...) -> None: ...

class Holdings(_message.Message):
    __slots__ = ("holdings",)
    HOLDINGS_FIELD_NUMBER: _ClassVar[int]
    holdings: _containers.RepeatedCompositeFieldContainer[Holding]
    def __init__(self, holdings: _Optional[_Iterable[_Union[Holding, _Mapping]]] = ...) -> None: ...
