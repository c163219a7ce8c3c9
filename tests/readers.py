"""Readers of files, and inputs for them, which the tests of properties and the coverage-guided fuzzer share.

A reader takes a file and gives a result or a PatchingError; any other error is a crash. Inputs are any bytes,
valid files with changed bytes, and valid files in which what they hold is changed (a row, a key, a type) and
written again, checksums included: that reaches what lies behind a parser or a checksum.
"""

import contextlib
import copy
import csv
import functools
import hashlib
import io
import json
import operator
import tempfile
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np
import pyarrow as pa
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from patching import PromptPairDataset, Site, SweepResult
from patching.circuits import Circuit
from patching.edges import Graph
from patching.engine import Outcome
from patching.errors import PatchingError, PatchingWarning
from patching.experiment.again import read_notes, read_validation
from patching.experiment.file import read_experiment
from patching.experiment.folder import RUN, read_run
from patching.identity import canonical, sha256
from patching.latent import ActivationAddition, ActivationStore
from patching.parquet import parquet_table
from patching.report import sections
from patching.report.elements import html
from patching.results import PairInfo
from patching.store import journal, tables
from patching.store.manifest import NAME as MANIFEST
from patching.tasks.file import read_task
from patching.tiny import load_tiny
from patching.units import Part, Size, Unit
from patching.validation_report import PairReport, ValidationReport

# Valid files: small ones, in which everything that a reader knows stands once.

SITES = (Site("blocks.0.attn.hook_z", pos="S2", head=1), Site("blocks.1.mlp.hook_post", pos=-1, neuron=3))
CELLS = ((SITES[0],), (), (SITES[1], SITES[0]))
PAIRS = (PairInfo(4, ("a", "b"), ("a", "c"), {"S2": (1,)}, "t"), PairInfo(5, ("a",), ("d",)))
RESULT = SweepResult(
    {"layer": (0, 1, 2)}, np.array([1.0, np.nan]), np.array([0.5, 2.0]), np.arange(6.0).reshape(3, 2), CELLS,
    PAIRS, ("z", "post"), "denoising", "logit_diff", {"seed": 0, "difference": float("nan")},
)  # fmt: skip
UNIT = Unit(3, (0, 1), range(2, 5))
PART = Part(Outcome(np.zeros(2), np.ones(2), np.ones((3, 2))), {"engine": "exact", "warnings": []})
ROWS = [
    {"clean": "Then, Mary", "corrupted": "Then, John", "correct": " Mary", "incorrect": [" John", 5],
     "roles": {"S": 3}, "template": "then"},
    {"clean": [0, 9, 8], "corrupted": [0, 8, 9], "correct": [7], "incorrect": [[5, 6]],
     "roles": {"S": [1, 2]}},
]  # fmt: skip
IDENTITY, ENVIRONMENT = {"model": {"name": "tiny"}, "seed": 0}, {"torch": "2"}
DESCRIBED = {
    "axes": [{"name": "layer", "values": [0, 1, 2]}], "activation": "z", "direction": "denoising",
    "metric": "logit_diff", "pairs": 2,
}  # fmt: skip

CSV = """\
clean,corrupted,correct,incorrect,roles,template
"Then, Mary","Then, John", Mary,"["" John"", 5]","{""S"": 3}",then

Mary and,John and, Mary, John,,
"""
TASK = """
name = "mine"
description = "Who is liked?"
sources = ["here"]
metric = "logit_diff"
corruption = "swap"
roles = ["A", "B", "A2", "A2+1"]
[slots]
A = "people"
B = "people"
A2 = "A"
N = "years"
[answers]
correct = { clean = "B" }
incorrect = { clean = "A" }
prefix = " "
[templates]
likes = "{A} liked {B} in {N.year}. {A2} liked"
[templates.more]
text = "{A} liked {N}"
correct = { words = "years", above = "N" }
incorrect = { words = "years", up_to = "N" }
[corruptions.swap]
label = "flips"
description = "The other one comes second."
replace = { A2 = "B", N = { word = "1999" }, B = { fresh = "people" } }
[corruptions.other]
label = "preserves"
description = "Another year."
replace = { N = { fresh = "years", same = "century", differ = "year" } }
[words]
people = ["Mary", "John"]
places = { columns = ["place"], rows = [["Rome"]] }
[words.years]
columns = ["year", "century"]
rows = [["1998", "20"], ["1999", "20"]]
key = "year"
single_token = false
[[published]]
model = "gpt2"
measure = "logit difference"
source = "a paper"
value = 1.5
"""
EXPERIMENT = """
question = "Which heads?"
model = "tiny"
note = "small"
[task]
name = "ioi"
n_pairs = 4
templates = ["went_abba"]
[sweeps.heads]
activation = "z"
over = ["layer", "head"]
task = { corruption = "abc" }
[sweeps.sites]
activation = [{ hook_point = "blocks.0.attn.hook_z", pos = "S2", head = 1 }]
[statistics]
interval = 0.95
p_values = "holm"
null_floor = 0.95
stability = 3
[[figures]]
sweep = "heads"
dim = "p_values"
[[figures]]
name = "both"
sweeps = ["heads", "sites"]
limit = 1.0
""" + "".join(
    f'[[claims]]\nclaim = "So."\nsource = "by hand"\n{rest}\n'
    for rest in (
        'kind = "top"\nsweep = "heads"\nk = 3\ncells = [{ layer = 3, head = 1 }]\nat = { layer = 3 }',
        'kind = "only"\nsweep = "heads"\nthreshold = 0.5\ncells = []',
        'kind = "effect"\nsweep = "heads"\nat = { layer = [0, 1] }\nvalue = 1.0\ntolerance = 0.1',
        'kind = "effect"\nsweep = "heads"\nat = {}\nabove = 0\nsignificant = true\nbeyond_floor = true',
        'kind = "agree"\nsweeps = ["heads", "sites"]\nwithin = 0.1',
        'kind = "differ"\nsweeps = ["heads", "sites"]\nat = {}\nby = 0.1',
        'kind = "score"\nsweep = "heads"\nof = "gap"\nbelow = 2',
        'kind = "undefined"\nsweep = "heads"',
    )
)  # fmt: skip


SHARD = save_tensors(
    {
        "0/rows": np.arange(2),
        "0/tokens": np.ones((2, 3), np.int64),
        "0/ln_final": np.ones((2, 3, 4), np.float32),
    }
)
STORE = {
    "format": 1, "asked": {"names": ["ln_final"], "batch_size": 2, "model": "abc"},
    "shards": [{"file": "shard-000000.safetensors", "prompts": 2, "groups": 1, "tokens_sha256": "abc"}],
}  # fmt: skip
ADDITION = save_tensors(
    {"ln_final": np.ones(4, np.float32)},
    metadata={"activation_addition": json.dumps({"position": -1, "relative": None})},
)


CIRCUIT = Circuit.of(Graph(2, 2, 1), ["input->a1.h0<k>@S2", "a0.h1->m0@-1", "m1->logits"]).to_json()
CLAIMS = json.dumps({
    "experiment": "mine", "question": "Which heads?", "model": "tiny", "holding": 1, "failing": 0,
    "claims": [{
        "claim": "So.", "kind": "effect", "sweeps": ["heads"], "holds": True, "expected": "above 0",
        "measured": "+1.0", "values": {"effect": 1.0}, "source": "by hand",
    }],
}).encode()  # fmt: skip
VALIDATION = json.dumps([ValidationReport(
    "ioi", "tiny", "logit_diff",
    (
        PairReport(0, "t", 3, 3, (2,), 1, False, True, False, 1.5, -1.0, None, ()),
        PairReport(1, "t", 3, 4, None, 2, True, None, None, float("nan"), float("nan"), 0, ("unequal",)),
    ),
    (float("nan"), float("nan")), ("a b c", "a b d", (0, 1, 2), (0, 1, 2, 3)),
).as_dict()]).encode()  # fmt: skip


def saved() -> dict[str, bytes]:
    """The files of a finished result."""
    with tempfile.TemporaryDirectory() as folder:
        return {path.name: path.read_bytes() for path in RESULT.save(Path(folder) / "run").iterdir()}


def running() -> bytes:
    """The manifest of a sweep that goes on."""
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder)):
        return (Path(folder) / MANIFEST).read_bytes()


# Ways to read them


@functools.cache
def tiny() -> Any:
    """The embedded model, whose tokens prompts are made of; they are kept, since most texts come again."""
    model = load_tiny()
    model.to_tokens = functools.lru_cache(10_000)(model.to_tokens)
    return model


def opened(folder: Path) -> contextlib.AbstractContextManager[journal.OpenJournal]:
    return journal.journal(journal.Journal(folder, pairs=2), IDENTITY, DESCRIBED, Size(2, 3), ENVIRONMENT)


def go_on(path: Path) -> object:
    """What a sweep finds that goes on: its size, or its result. That it was elsewhere before is no matter."""
    ignored = warnings.catch_warnings(action="ignore", category=PatchingWarning)
    with ignored, opened(signed(path)) as found:
        return found.result() if found.finished else found.size


def activations(folder: Path) -> object:
    """What a store holds, by prompt and in batches."""
    store = ActivationStore.open(folder)
    return store[0], list(store.batches())


def shown(part: Iterable[Element]) -> str:
    """Sections as the page has them."""
    return "".join(map(html, part))


def load(folder: Path) -> SweepResult:
    result = SweepResult.load(folder)
    assert result.patched.shape[-1] == len(result.pairs)
    return result


def signed(path: Path) -> Path:
    """The folder of a manifest, whose checksum now agrees if it is a manifest at all."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        entries = json.loads(path.read_bytes())
        if isinstance(entries, dict):
            stated = {key: value for key, value in entries.items() if key != "checksum"}
            path.write_text(json.dumps({**stated, "checksum": sha256(canonical(stated))}))
    return path.parent


# Ways to change what they hold


ODD = (
    None, True, False, 0, 1, -1, 3, 2**40, -(2**63), 2**70, 10**400,
    0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "a", "A", "heads", "S2", "people", "year", "z", "../x", "/etc/passwd", "values.parquet", "$float",
    "nan", "effect", ".x", "+1", "{A}", "{", "[1", '{"a": 1}', "\0", "\ud800", "é",
)  # fmt: skip
"""Values at the ends of what there is, and names that mean something to some reader."""


def anything(random: Random) -> Any:
    """A JSON value."""
    match random.randrange(12):
        case 0:
            return nested(random.choice([30, 200, random.randrange(400, 1000)]))
        case 1 | 2:
            return [anything(random) for _ in range(random.randrange(3))]
        case 3 | 4:
            return {str(random.choice(ODD)): anything(random) for _ in range(random.randrange(3))}
        case _:
            return random.choice(ODD)


def nested(depth: int) -> list:
    """A list in a list in a list."""
    return functools.reduce(lambda inner, _: [inner], range(depth), [])


def places(value: Any, above: tuple = ()) -> Iterator[tuple]:
    """Every place inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*above, key)
        yield from places(item, (*above, key))


def with_change(value: Any, random: Random) -> Any:
    """A JSON value in which one place is gone, twice there, or holds something else, perhaps from elsewhere.

    The value itself is changed: it has been read for this.
    """
    known = list(places(value))
    if not known:
        return anything(random)
    *above, key = random.choice(known)
    parent = functools.reduce(operator.getitem, above, value)
    there = functools.reduce(operator.getitem, random.choice(known), value)
    new = copy.deepcopy(there) if random.randrange(2) else anything(random)
    match random.randrange(5):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, list):
            parent.insert(key, new)
        case 1:
            parent[str(random.choice(ODD))] = new
        case 2 if isinstance(parent[key], str):
            at = random.randint(0, len(parent[key]))
            parent[key] = f"{parent[key][:at]}{random.choice(ODD)}{parent[key][at:]}"
        case _:
            parent[key] = new
    return value


def json_changed(content: bytes, random: Random) -> bytes:
    return json.dumps(with_change(json.loads(content), random)).encode()


def jsonl_changed(content: bytes, random: Random) -> bytes:
    rows = with_change([json.loads(line) for line in content.splitlines()], random)
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def csv_changed(content: bytes, random: Random) -> bytes:
    """CSV whose cells may be JSON."""
    rows = with_change(list(csv.reader(io.StringIO(content.decode()))), random)
    text = io.StringIO()
    csv.writer(text).writerows(
        [cell if isinstance(cell, str) else json.dumps(cell) for cell in row] for row in rows
    )
    return text.getvalue().encode()


def toml_changed(content: bytes, random: Random) -> bytes:
    entries = with_change(tomllib.loads(content.decode()), random)
    return "".join(f"{json.dumps(key)} = {as_toml(entry)}\n" for key, entry in entries.items()).encode()


def as_toml(value: Any) -> str:
    """A value as TOML has it within a line; a date for what TOML has no word for."""
    match value:
        case dict():
            return f"{{{', '.join(f'{json.dumps(key)} = {as_toml(item)}' for key, item in value.items())}}}"
        case list():
            return f"[{', '.join(map(as_toml, value))}]"
        case str():
            return json.dumps(value, ensure_ascii=False)
        case bool() | int() | float():
            return str(value).lower()
        case _:
            return "1979-05-27"


def rows_changed(content: bytes, random: Random, schema: pa.Schema | None = None) -> bytes:
    """A Parquet file with other rows, of the same columns if a schema says so."""
    rows = with_change(parquet_table(content).to_pylist(), random)
    return tables._bytes(pa.Table.from_pylist(rows, schema=schema))


TYPES = (
    pa.bool_(), pa.uint64(), pa.float16(), pa.decimal128(38, 2), pa.date32(), pa.date64(), pa.time32("s"),
    pa.time64("ns"), pa.duration("s"), pa.timestamp("s"), pa.timestamp("ns"), pa.timestamp("us", "nowhere"),
)  # fmt: skip


def columns_changed(content: bytes, random: Random) -> bytes:
    """A Parquet file with other rows, or with a column of any type and any bits."""
    if random.randrange(2):
        return rows_changed(content, random)
    table = parquet_table(content)
    bits = pa.py_buffer(random.randbytes(16 * len(table)))
    odd = pa.Array.from_buffers(random.choice(TYPES), len(table), [None, bits])
    return tables._bytes(table.set_column(random.randrange(len(table.columns)), "clean", odd))


def tensors_changed(content: bytes, random: Random) -> bytes:
    """A safetensors file whose header says something else, of tensors that lie where they lay."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json_changed(content[8:end], random)
    return len(header).to_bytes(8, "little") + header + content[end:]


def part_changed(content: bytes, random: Random) -> bytes:
    """A part with other facts, or an array of another type or length."""
    arrays = load_tensors(content)
    name = random.choice(sorted(arrays))
    if name == "facts":
        facts = json_changed(arrays["facts"].tobytes(), random)
        arrays["facts"] = np.frombuffer(facts, np.uint8)
    else:
        kind = random.choice(["float32", "float64", "int64", "bool"])
        arrays[name] = np.ascontiguousarray(arrays[name].astype(kind)[random.randrange(2) :])
    return save_tensors(arrays)


# The readers


@dataclass(frozen=True)
class Reader:
    """A way to read a file, a file that it takes, and how such a file is changed."""

    read: Callable[[Path], object]
    valid: bytes
    change: Callable[[bytes, Random], bytes]
    """Another file of the kind; may raise where the content is none."""
    name: str = "file"
    """The file's name, with ``{sha256}`` where that of its content stands."""
    beside: Mapping[str, bytes] = field(default_factory=dict)
    """Files in the same folder, by name."""


def readers() -> Iterator[tuple[str, Reader]]:
    """Every reader by name."""

    def of_rows(schema: pa.Schema) -> Callable[[bytes, Random], bytes]:
        return functools.partial(rows_changed, schema=schema)

    yield (
        "values",
        Reader(
            lambda p: tables.read_values(p.read_bytes(), "f", 3, 2),
            tables.write_values(np.ones((3, 2))),
            of_rows(tables.VALUES),
        ),
    )
    yield (
        "cells",
        Reader(
            lambda p: tables.read_cells(p.read_bytes(), "f", 3),
            tables.write_cells(CELLS),
            of_rows(tables.CELLS),
        ),
    )
    yield (
        "pairs",
        Reader(
            lambda p: tables.read_pairs(p.read_bytes(), "f"),
            tables.write_pairs(PAIRS, *np.ones((2, 2))),
            of_rows(tables.PAIRS),
        ),
    )
    yield (
        "part",
        Reader(
            lambda p: journal._unpacked(p, "run", UNIT),
            journal._packed("run", UNIT, PART),
            part_changed,
            "0000003.{sha256}.safetensors",
        ),
    )
    yield "csv", Reader(lambda p: PromptPairDataset.from_csv(tiny(), p), CSV.encode(), csv_changed)
    yield (
        "jsonl",
        Reader(
            lambda p: PromptPairDataset.from_jsonl(tiny(), p),
            "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
            jsonl_changed,
        ),
    )
    yield (
        "parquet",
        Reader(
            lambda p: PromptPairDataset.from_parquet(tiny(), p),
            tables._bytes(pa.Table.from_pylist(ROWS[1:])),
            columns_changed,
        ),
    )
    yield "task", Reader(read_task, TASK.encode(), toml_changed)
    yield "experiment", Reader(read_experiment, EXPERIMENT.encode(), toml_changed)
    files = saved()
    manifest = files.pop(MANIFEST)
    yield "manifest", Reader(lambda p: load(p.parent), manifest, json_changed, MANIFEST, files)
    yield "signed", Reader(lambda p: load(signed(p)), manifest, json_changed, MANIFEST, files)
    yield "running", Reader(go_on, running(), json_changed, MANIFEST)
    yield "run", Reader(lambda p: read_run(p.parent), b'{"format": 1, "sweeps": {}}', json_changed, RUN)
    stored, shard = json.dumps(STORE).encode(), STORE["shards"][0]["file"]
    yield "store", Reader(lambda p: activations(p.parent), stored, json_changed, MANIFEST, {shard: SHARD})
    yield "shard", Reader(lambda p: activations(p.parent), SHARD, tensors_changed, shard, {MANIFEST: stored})
    yield "addition", Reader(ActivationAddition.load, ADDITION, tensors_changed)
    yield (
        "circuit",
        Reader(lambda p: Circuit.from_json(p.read_text("utf-8", "replace")), CIRCUIT.encode(), json_changed),
    )
    yield "claims", Reader(lambda p: shown(sections.notes(read_notes(p))), CLAIMS, json_changed)
    yield (
        "validation",
        Reader(lambda p: shown(sections.validation(read_validation(p))), VALIDATION, json_changed),
    )


READERS = dict(readers())


def changed(name: str, content: bytes, random: Random) -> bytes:
    """Another file of the kind that a reader takes, made of this one, or of the valid one if this is none."""
    reader = READERS[name]
    for start in (content, *[reader.valid] * 4):
        with contextlib.suppress(Exception):  # whatever a parser says of bytes, or a writer of odd values
            return reader.change(start, random)
    return content


def read_anything(name: str, content: bytes, folder: Path) -> bool:
    """Whether a reader takes this content. Any error but a PatchingError goes up: a crash."""
    reader = READERS[name]
    for other, there in reader.beside.items():
        if not (folder / other).exists():
            (folder / other).write_bytes(there)
    path = folder / reader.name.format(sha256=hashlib.sha256(content).hexdigest())
    path.write_bytes(content)
    try:
        reader.read(path)
    except PatchingError:
        return False
    finally:
        path.unlink()
    return True
