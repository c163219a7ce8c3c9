"""Readers of files, fed with anything: what comes back is a result or a PatchingError, never another error.

A few hundred inputs for each reader here, the same each time; ``make fuzz`` tries as many others as it is
told to, and then looks for more by coverage (fuzz.py). The readers and what they are fed are in readers.py.
"""

import json
import os
from random import Random

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from readers import EXPERIMENT, READERS, ROWS, TASK, changed, nested, read_anything

from patching.store import tables

settings.register_profile(
    "few", max_examples=150, deadline=None, database=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
settings.register_profile(
    "many",
    settings.get_profile("few"),
    derandomize=False,
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "20000")),
)
FUZZ = settings.get_profile("many" if "FUZZ_EXAMPLES" in os.environ else "few")


@st.composite
def other_bytes(draw: st.DrawFn, valid: bytes) -> bytes:
    """A valid file with up to four changes."""
    content = bytearray(valid)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(content)))
        match draw(st.sampled_from(["set", "drop", "put", "double", "cut"])):
            case "set" if at < len(content):
                content[at] = draw(st.integers(0, 255))
            case "drop":
                del content[at : at + draw(st.integers(1, 40))]
            case "put":
                content[at:at] = draw(st.binary(min_size=1, max_size=20))
            case "double":
                content[at:at] = content[at : at + draw(st.integers(1, 200))]
            case "cut":
                del content[at:]
    return bytes(content)


@st.composite
def other_content(draw: st.DrawFn, name: str) -> bytes:
    """A valid file in which up to three of the things that it says are changed."""
    content, random = READERS[name].valid, Random(draw(st.integers(0, 2**64)))
    for _ in range(draw(st.integers(1, 3))):
        content = changed(name, content, random)
    return content


@pytest.mark.parametrize("name", READERS)
def test_the_valid_file_reads(name, tmp_path):
    """Else what follows would show nothing."""
    assert read_anything(name, READERS[name].valid, tmp_path)


@pytest.mark.parametrize("name", READERS)
@FUZZ
@given(data=st.data())
def test_anything_gives_a_result_or_a_patching_error(name, data, tmp_path):
    valid = READERS[name].valid
    content = data.draw(st.one_of(st.binary(max_size=300), other_bytes(valid), other_content(name)))
    read_anything(name, content, tmp_path)


def parquet_of_bad_text() -> bytes:
    """A Parquet file whose text is not UTF-8."""
    text = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\x80")]
    )
    return tables._bytes(pa.table({"clean": text}))


def parquet_of_bad_time() -> bytes:
    """A Parquet file with a span of time that Python has no word for."""
    return tables._bytes(pa.table({"clean": pa.array([2**62], pa.duration("s"))}))


MANY, SEVEN = b"\x80" * 5 + b"\x08", b"\x0e"
"""2**37 and 7 as Thrift's compact protocol writes them."""


def parquet_that_claims_rows(name: str, where: int, claim: bytes = MANY) -> bytes:
    """A Parquet file of 6 rows, which in one place of its footer says that they are 2**37, or 7.

    The places are the file (0), its columns (1, 2, 3), and their row group (-1).
    """
    content = READERS[name].valid
    end = len(content) - 8
    start = end - int.from_bytes(content[end : end + 4], "little")
    six, many = b"\x16\x0c", b"\x16" + claim
    parts = content[start:end].split(six)
    assert len(parts) > 3, "the file, its row group, and every column of it"
    at = where % (len(parts) - 1)
    footer = six.join(parts[: at + 1]) + many + six.join(parts[at + 1 :])
    return content[:start] + footer + len(footer).to_bytes(4, "little") + content[-4:]


def parquet_with_other_statistics() -> bytes:
    """A Parquet file with a column that has no empty fields, and statistics that count them.

    Arrow 26 ends the process where it is asked what this column holds (no Python error, an abort).
    """
    may_be_empty, column = b"\x25\x02", b"\x18\x04cell"
    valid = READERS["values"].valid
    assert valid.count(may_be_empty + column) == 1
    return valid.replace(may_be_empty + column, b"\x25\x00" + column)


def without(valid: str, old: str, new: str) -> bytes:
    """A valid text with something else in one place."""
    assert valid.count(old) == 1, f"{old!r} stands {valid.count(old)} times"
    return valid.replace(old, new).encode()


def row_with(**cells: object) -> bytes:
    return json.dumps(ROWS[1] | cells).encode()


def manifest_with(name: str, *place: str, value: object) -> bytes:
    """A valid manifest with something else in one place."""
    entries = json.loads(READERS[name].valid)
    *above, key = place
    inner = entries
    for step in above:
        inner = inner[step]
    inner[key] = value
    return json.dumps(entries).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("parquet", parquet_of_bad_text()),
        ("parquet", parquet_of_bad_time()),
        ("task", b"a = " + b"[" * 3000),
        ("task", b"a = 1" + b"0" * 5000),
        ("task", b"a" + b".a" * 3000 + b" = 1"),
        ("task", without(TASK, 'clean = "B"', "clean = 5")),
        ("task", without(TASK, 'words = "years", above', "words = [], above")),
        ("task", without(TASK, 'above = "N"', 'above = "N.x"')),
        ("task", without(TASK, 'columns = ["place"]', "columns = []")),
        ("experiment", without(EXPERIMENT, 'kind = "top"', "kind = []")),
        ("experiment", without(EXPERIMENT, '"sites"]\nwithin', "[]]\nwithin")),
        ("experiment", without(EXPERIMENT, "threshold = 0.5", "threshold = -1" + "0" * 400)),
        ("jsonl", b"[" * 100_000),
        ("jsonl", b'{"clean": 1' + b"0" * 5000 + b"}"),
        ("jsonl", row_with(clean="\ud800")),
        ("jsonl", row_with(correct="\ud800")),
        ("jsonl", row_with(clean=[2**70])),
        ("jsonl", row_with(clean=[2**40], corrupted=[1, 2])),
        ("jsonl", row_with(roles=[[[], 1], [[], 2]])),
        ("csv", b"clean,corrupted,correct,incorrect\na,a,b," + b"[" * 100_000),
        ("csv", b"clean,corrupted,correct,incorrect,roles\na,a,b,c," + b"[" * 100_000),
        ("csv", b"clean\n" + b"x" * 200_000),
        ("csv", b'clean\n"\x00'),
        ("part", b"\xff" * 8),
        ("part", (2**40).to_bytes(8, "little") + b"{}"),
        ("values", b"PAR1" + b"\xff" * 40 + b"PAR1"),
        ("values", parquet_that_claims_rows("values", 0)),
        ("values", parquet_that_claims_rows("values", 0, SEVEN)),
        ("values", parquet_that_claims_rows("values", -1, SEVEN)),
        ("values", parquet_with_other_statistics()),
        ("values", parquet_that_claims_rows("values", -1)),
        ("signed", manifest_with("signed", "provenance", "a", value=nested(490))),
        ("signed", manifest_with("signed", "files", "x" * 300, value="")),
        ("signed", manifest_with("signed", "files", value={"$float": "nan"})),
        ("signed", manifest_with("signed", "result", value={"$float": "nan"})),
        ("running", b"0"),
        ("signed", b"[]"),
        ("running", manifest_with("running", "run", "identity", value=1)),
        ("running", manifest_with("running", "run", "size", value={"pairs": 2})),
        ("running", manifest_with("running", "run", "sessions", value={"a": 1})),
        ("running", manifest_with("running", "run", "sessions", value=[{"started": "now"}])),
        ("running", manifest_with("running", "run", "sessions", value=[{"environment": {"a": nested(200)}}])),
        ("running", manifest_with("running", "provenance", "a", value="\ud800")),
        ("run", b"[" * 100_000),
        ("store", b"{"),
        ("store", b"[]"),
        ("store", manifest_with("store", "asked", value=1)),
        ("store", manifest_with("store", "shards", value=[{"prompts": 2}])),
        ("shard", b""),
        ("shard", READERS["shard"].valid.replace(b"0/rows", b"1/rows")),
        ("addition", READERS["addition"].valid.replace(b"position", b"positiom")),
    ],
)
def test_what_has_broken_readers_before(name, content, tmp_path):
    """Deep nesting, long numbers, fields without end, lengths that lie, values of another type."""
    assert not read_anything(name, content, tmp_path)


@pytest.mark.parametrize("where", [1, 2, 3])
def test_columns_that_claim_more_values_take_no_memory_for_them(where, tmp_path):
    """The rows are there, and are read."""
    assert read_anything("values", parquet_that_claims_rows("values", where), tmp_path)


def test_what_reads_may_be_too_deep_to_be_shown(tmp_path):
    """Where Python still reads a list in a list in a list, it may not have the stack to write it down."""
    for depth in range(600, 1000):
        answer = b"[" * depth + b"]" * depth
        assert not read_anything("jsonl", row_with(correct="@").replace(b'"@"', answer), tmp_path)
