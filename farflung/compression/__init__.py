"""Vector <-> payload. Codecs are values made of pure functions; their state belongs to the caller.

Rooms: `formats/` number formats and sparsifiers (fixed-size records, `scheme.py`), `entropy/` coders of integers,
`transforms/` that change the basis, `wrappers/` that change what is sent when, `kernels/` the inner loops. Not here:
anything about who sent a payload or how payloads are combined.

`parse_codec(text)` makes a codec; `codec_presets()` names one of each kind. Importing this costs torch, not numba.
"""

from farflung.compression.codec import Codec
from farflung.compression.parse import codec_presets, parse_codec

__all__ = ["Codec", "codec_presets", "parse_codec"]
