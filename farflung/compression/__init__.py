"""Vector <-> payload. Codecs are values made of pure functions; their state belongs to the caller.

What goes here: number formats, sparsifiers, wrappers such as error feedback, and their kernels. What does not:
anything about who sent a payload or how payloads are combined.

`parse_codec(text)` makes a codec; `codec_presets()` names one of each kind. Importing this costs torch, not numba.
"""

from farflung.compression.codec import Codec
from farflung.compression.parse import codec_presets, parse_codec

__all__ = ["Codec", "codec_presets", "parse_codec"]
