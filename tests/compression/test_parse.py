import re
import subprocess
import sys

import pytest

from farflung.compression import codec_presets, parse_codec
from farflung.protocol.errors import ConfigError


@pytest.mark.parametrize("spec", codec_presets())
def test_the_canonical_text_parses_to_itself(spec):
    canonical = parse_codec(spec).spec
    assert parse_codec(canonical).spec == canonical


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("q2", "q2(block=512)"),
        (" int8 ( block = 64 ) ", "int8(block=64)"),
        ("ef(1.00) | fp32", "ef(1)|fp32"),
        ("ef(0.950)|topk(64 / 4096)|q2", "ef(0.95)|topk(64/4096)|q2"),
        ("topk(1/16)|int8", "topk(1/16)|int8"),
    ],
)
def test_defaults_are_written_out_and_spaces_dropped(spec, canonical):
    assert parse_codec(spec).spec == canonical


@pytest.mark.parametrize(
    ("spec", "column", "says"),
    [
        ("", 1, "name"),
        ("q3", 1, "allowed: ef"),
        ("ef(1)|q3", 7, "allowed: fp32"),
        ("ef(1)|ef(1)|q2", 7, "allowed: fp32"),
        ("q2|q2", 4, "nothing may follow"),
        ("ef(1)| topk(64/4096)", 8, "value format"),
        ("topk(64/4096)|q2(block=64)", 15, "no argument"),
        ("topk(64/4096)|ef(1)", 15, "fp32, bf16, int8, q2"),
        ("topk(64/4095)|q2", 1, "power of two"),
        ("topk(0/4096)|q2", 1, "k from 1"),
        ("topk(4097/4096)|q2", 1, "k from 1"),
        ("topk(64/32768)|q2", 1, "16384"),
        ("topk|q2", 1, "topk(64/4096)"),
        ("int8(block=1000)", 1, "power of two"),
        ("int8(block=8)", 1, "from 16"),
        ("int8(size=64)", 1, "block"),
        ("int8()", 1, "block"),
        ("fp32(block=4)", 1, "no such stage"),
        ("ef(0)|q2", 1, "beta"),
        ("ef(1.5)|q2", 1, "beta"),
        ("ef(nan)|q2", 1, "beta"),
        ("ef|q2", 1, "beta"),
        ("q2|", 4, "name"),
        ("q2(block=512", 1, "name"),
    ],
)
def test_an_error_names_the_column_and_what_is_allowed(spec, column, says):
    with pytest.raises(ConfigError, match=rf"column {column}: .*{re.escape(says)}"):
        parse_codec(spec)


@pytest.mark.parametrize("spec", ["ef(1)", "x" * 1000, "|" * 200, "٣(١)"])
def test_any_other_nonsense_is_a_config_error(spec):
    with pytest.raises(ConfigError):
        parse_codec(spec)


def test_importing_compression_does_not_import_numba():
    code = "import sys, farflung.compression as c; c.parse_codec('ef(1)|q2'); sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
