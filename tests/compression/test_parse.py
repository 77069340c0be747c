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
        ("int8(64)", "int8(block=64)"),
        ("ef(1.00) | fp32", "ef(1)|fp32"),
        ("ef(beta=0.950)|topk(64 / 4096)|q2", "ef(0.95)|topk(64/4096)|q2(block=512)"),
        ("topk(1/16)|int8(32)", "topk(1/16)|int8(block=32)"),
        (" diloco-fp32 ", "fp32"),
    ],
)
def test_defaults_are_written_out_and_spaces_dropped(spec, canonical):
    assert parse_codec(spec).spec == canonical


@pytest.mark.parametrize(
    ("spec", "column", "says"),
    [
        ("", 1, "name"),
        ("q3", 1, "allowed: fp32"),
        ("ef(1)|q3", 7, "no such stage"),
        ("q2|q2", 1, "nothing but an entropy coder may follow"),
        ("ef(1)| topk(64/4096)", 8, "needs a number format"),
        ("topk(64/4096)|ef(1)|q2", 1, "needs a number format"),
        ("ef(1)", 1, "needs a codec after it"),
        ("topk(64/4095)|q2", 6, "power of two"),
        ("topk(0/4096)|q2", 6, "k from 1"),
        ("topk(4097/4096)|q2", 6, "k from 1"),
        ("topk|q2", 1, "k is missing; allowed: topk(k/chunk)"),
        ("int8(block=1000)", 12, "power of two"),
        ("int8(block=8)", 12, "from 16"),
        ("int8(size=64)", 11, "no such argument: size"),
        ("int8(64, 64)", 10, "no such argument: 64"),
        ("int8(block=64, block=64)", 1, "twice"),
        ("int8()", 5, "empty parentheses"),
        ("fp32(block=4)", 12, "no such argument"),
        ("ef(0)|q2", 4, "beta"),
        ("ef(1.5)|q2", 4, "beta"),
        ("ef(nan)|q2", 4, "beta"),
        ("ef|q2", 1, "beta is missing"),
        ("ef(0.9, beta=0.5)|q2", 14, "beta is given twice"),
        ("ef(1)|ef(1)|q2", 1, "error feedback after it already"),
        ("ef(1)|ef21|q2", 1, "error feedback after it already"),
        ("ef(1)|qsgd", 1, "grow without bound"),
        ("ef(1)|randk(16/1024, form=unbiased)|fp32", 1, "grow without bound"),
        ("ef(1)|sparseloco", 7, "a preset is a whole codec"),
        ("tiles(64)|rules(1d=fp32, else=int2)", 1, "rules belong before it"),
        ("rotate|lowrank(40)|fp32", 1, "its coordinates change in every round"),
        ("tiles(64)|ef21|q2", 1, "nothing with a shared state"),
        ("lookahead(1)|ef(1)|rules(head=lookahead(1)|ef(1)|q2, else=q2)", 14, "error feedback after it already"),
        ("adapt(lowrank(40)|fp32, int2)", 7, "choices keep no state"),
        ("cyclic(2)|cyclic(2)|int8", 1, "some parts would never be sent"),
        ("q2|", 4, "name"),
        ("q2(block=512", 13, "a ) is missing"),
        ("q2)", 3, "a ) without its ("),
        ("q2(block=)", 10, "an argument is missing"),
        ("(" * 12, 9, "parentheses inside each other"),
    ],
)
def test_an_error_names_the_column_and_what_is_allowed(spec, column, says):
    with pytest.raises(ConfigError, match=rf"column {column}: .*{re.escape(says)}"):
        parse_codec(spec)


@pytest.mark.parametrize("spec", ["ef(1)", "x" * 1000, "|" * 200, "٣(١)"])
def test_any_other_nonsense_is_a_config_error(spec):
    with pytest.raises(ConfigError):
        parse_codec(spec)


def test_a_text_that_grows_beyond_the_limit_with_its_defaults_is_refused():
    rules = ", ".join(f"*layer{i}*=tiles|topk(64/4096)|stat|ans" for i in range(40))
    with pytest.raises(ConfigError, match="at most 2000 characters"):
        parse_codec(f"rules({rules}, else=q2)")


def test_a_preset_is_a_codec_wherever_a_whole_one_is_asked_for():
    assert parse_codec("mix(opendiloco-fp16, q2)").spec == "mix(fp16, q2(block=512))"


def test_importing_compression_does_not_import_numba():
    code = "import sys, farflung.compression as c; c.parse_codec('ef(1)|q2'); sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
