"""Bring your own data: every reader, every way a row can be bad, filters that report, export."""

import hashlib
import json
import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import model_of
from random_pairs import FourMembers, random_dataset, token_prompts

from patching import ActivationPatcher, PatchingDataset, PromptPair, PromptPairDataset, load_model
from patching.errors import MetricError, PairError, PatchingWarning
from patching.metrics import Answers
from patching.tasks import bundled_tasks

# w0 is token 4, so w1 is 5 and so on; BOS is position 0.
GOOD = {"clean": "w1 w2", "corrupted": "w1 w3", "correct": "w4", "incorrect": "w5"}


def rows(*changes):
    """Good rows with some cells changed."""
    return [{**GOOD, **change} for change in changes]


def jsonl(path, *objects):
    path.write_text("".join(json.dumps(o) + "\n" for o in objects), encoding="utf-8")
    return path


def from_jsonl(model, tmp_path, *objects, **options):
    return PromptPairDataset.from_jsonl(model, jsonl(tmp_path / "pairs.jsonl", *objects), **options)


def problems_of(read, *args, **options):
    """The lines of the error, the first of which names the source."""
    with pytest.raises(PairError) as raised:
        read(*args, **options)
    first, *others = str(raised.value).splitlines()
    return first, others


# The five readers


FULL = [
    {**GOOD, "correct": ["w4", "w6"], "roles": {"S": 1, "END": [2]}, "template": "one"},
    {**GOOD, "clean": "w7 w2", "corrupted": "w7 w3", "roles": {"S": 2}},
]
CSV = """clean,corrupted,correct,incorrect,roles,template
w1 w2,w1 w3,"[""w4"", ""w6""]",w5,"{""S"": 1, ""END"": [2]}",one
w7 w2,w7 w3,w4,w5,"{""S"": 2}",
"""


def as_frame(model, tmp_path):
    return PromptPairDataset.from_frame(model, pd.DataFrame(FULL))


def as_csv(model, tmp_path):
    (tmp_path / "pairs.csv").write_text(CSV, encoding="utf-8")
    return PromptPairDataset.from_csv(model, tmp_path / "pairs.csv")


def as_jsonl(model, tmp_path):
    return from_jsonl(model, tmp_path, *FULL)


def uniform(row):
    """Arrow columns have one type: every answer and position in a list."""
    answers = row["correct"] if isinstance(row["correct"], list) else [row["correct"]]
    roles = {role: at if isinstance(at, list) else [at] for role, at in row["roles"].items()}
    return {"template": None, **row, "correct": answers, "roles": roles}


def as_parquet(model, tmp_path):
    pd.DataFrame(map(uniform, FULL)).to_parquet(tmp_path / "pairs.parquet")  # roles become a struct
    return PromptPairDataset.from_parquet(model, str(tmp_path / "pairs.parquet"))


def as_hf(model, tmp_path):
    return PromptPairDataset.from_hf(model, Dataset.from_list(list(map(uniform, FULL))))


@pytest.mark.parametrize("read", [as_frame, as_csv, as_jsonl, as_parquet, as_hf])
def test_every_reader_gives_the_same_pairs(any_model, tmp_path, read):
    dataset = read(any_model, tmp_path)
    assert dataset.get_clean_corrupt_pairs() == [("w1 w2", "w1 w3"), ("w7 w2", "w7 w3")]
    assert [dataset.answers(i) for i in (0, 1)] == [Answers((8, 10), (9,)), Answers((8,), (9,))]
    assert [dataset.roles(i) for i in (0, 1)] == [{"S": (1,), "END": (2,)}, {"S": (2,)}]
    assert [dataset.template(i) for i in (0, 1)] == ["one", ""]


def test_a_file_names_the_dataset_and_goes_into_its_provenance(any_model, tmp_path):
    dataset = as_csv(any_model, tmp_path)
    digest = hashlib.sha256(CSV.encode()).hexdigest()
    assert dataset.name == "pairs"
    assert dataset.parameters == {
        "n_pairs": 2, "metric": "logit_diff", "source": "pairs.csv", "sha256": digest,
    }  # fmt: skip
    named = PromptPairDataset.from_csv(any_model, tmp_path / "pairs.csv", metric="prob", name="mine")
    assert (named.name, named.parameters["metric"]) == ("mine", "prob")
    assert as_frame(any_model, tmp_path).name == "prompt pairs"
    with pytest.raises(MetricError, match="unknown metric 'f1'"):
        PromptPairDataset.from_csv(any_model, tmp_path / "pairs.csv", metric="f1")


def test_prompts_and_answers_as_token_ids(any_model):
    ids = {"clean": [0, 5, 6], "corrupted": np.array([0, 5, 7]), "correct": 8, "incorrect": [9, np.int64(10)]}
    dataset = PromptPairDataset.from_frame(any_model, pd.DataFrame([ids]))
    clean, corrupted = dataset.get_clean_corrupt_pairs()[0]
    assert (clean.tolist(), corrupted.tolist()) == ([0, 5, 6], [0, 5, 7])
    assert dataset.answers(0) == Answers((8,), (9, 10))


def test_text_of_a_csv_is_kept_as_it_stands(any_model, tmp_path):
    """No cell is guessed to be a number or a missing value, no space is trimmed, [ alone is no list."""
    path = tmp_path / "pairs.csv"
    path.write_text("\ufeffclean,corrupted,correct,incorrect\n NA,null, 1.0,[\n", encoding="utf-8")
    [pair] = PromptPairDataset.from_frame(any_model, pd.DataFrame(rows({}))).prompt_pairs()
    assert pair == PromptPair("w1 w2", "w1 w3", "w4", "w5")
    from patching.table import of_csv

    assert of_csv(path).rows == [
        ("line 2", {"clean": " NA", "corrupted": "null", "correct": " 1.0", "incorrect": "["})
    ]


def test_columns_are_mapped(any_model, tmp_path):
    theirs = [{"prompt": "w1 w2", "other": "w1 w3", "correct": "w4", "incorrect": "w5", "id": 7}]
    columns = {"clean": "prompt", "corrupted": "other"}
    dataset = from_jsonl(any_model, tmp_path, *theirs, columns=columns, ignore=["id"])
    assert dataset.get_clean_corrupt_pairs() == [("w1 w2", "w1 w3")]

    first, _ = problems_of(from_jsonl, any_model, tmp_path, *theirs, columns=columns)
    assert first.startswith(
        "pairs.jsonl: unknown columns 'id'. It has: prompt, other, correct, incorrect, id. "
    )
    assert "Expected clean, corrupted, correct, incorrect, and roles and template" in first
    first, _ = problems_of(from_jsonl, any_model, tmp_path, *theirs, columns={"clean": "text"})
    assert "no column 'text' (for 'clean'); no column 'corrupted'; unknown columns 'prompt'" in first
    with pytest.raises(PairError, match="unknown name in columns 'prompt'. Available: clean, correct"):
        from_jsonl(any_model, tmp_path, *theirs, columns={"prompt": "clean"})
    with pytest.raises(PairError, match="no column 'extra' to ignore"):
        from_jsonl(any_model, tmp_path, GOOD, ignore=["extra"])
    with pytest.raises(PairError, match="ignore is a list of column names, got the text 'id'"):
        from_jsonl(any_model, tmp_path, *theirs, columns=columns, ignore="id")


def test_incorrect_answers_may_be_absent_where_the_metric_needs_none(any_model, tmp_path):
    row = {k: v for k, v in GOOD.items() if k != "incorrect"}
    assert from_jsonl(any_model, tmp_path, row, metric="prob").answers(0) == Answers((8,), ())
    assert from_jsonl(any_model, tmp_path, {**row, "incorrect": []}, metric="prob").answers(0).incorrect == ()
    with pytest.raises(PairError, match="no column 'incorrect'"):
        from_jsonl(any_model, tmp_path, row)
    _, others = problems_of(from_jsonl, any_model, tmp_path, {**row, "incorrect": []})
    assert others == ["line 1: incorrect is empty."]


# Bad rows

BAD_CELLS = [
    ({"corrupted": ""}, "corrupted is empty."),
    ({"clean": None}, "clean is empty."),
    ({"clean": 5}, "clean is int 5, expected text or a list of token ids."),
    ({"clean": [1, "w2"]}, r"clean is list \[1, 'w2'\], expected text or a list of token ids."),
    ({"clean": [1, True]}, r"clean is list \[1, True\], expected text or a list of token ids."),
    ({"correct": 2.5}, "correct is float 2.5, expected text or a token id, or a list of them."),
    ({"correct": ["w4", ""]}, "correct is str '', expected text or a token id, or a list of them."),
    ({"correct": ["w4", None]}, "correct is NoneType None, expected text or a token id"),
    ({"correct": {"a": 1}}, r"correct is dict \{'a': 1\}, expected text or a token id"),
    ({"template": 3}, "template is int 3, expected text."),
    ({"roles": [3]}, r"roles is list \[3\], expected role names with positions"),
    ({"roles": {"S": None}}, "roles has 'S' at None, expected role names with positions"),
    ({"roles": {"S": [1, 1.5]}}, r"roles has 'S' at \[1, 1.5\], expected role names"),
    ({"roles": "S at 1"}, r"roles is no JSON \(.*\), expected role names with positions"),
    ({"roles": '{"S": 1, "S": 2}'}, r"roles is no JSON \(the key 'S' stands twice"),
    ({"roles": [["S", 1], ["S", 2]]}, r"roles names a role twice \(the key 'S' stands twice"),
    ({"correct": ["w4", []]}, r"correct is list \[\], expected text, a token id or the ids of one answer"),
    ({"incorrect": [["w5", 3]]}, r"incorrect is list \['w5', 3\], expected text, a token id"),
    ({"incorrect": "w4 w6"}, r"the answer \(8,\) is the beginning of the answer \(8, 10\)"),
    ({"incorrect": "w4"}, r"the tokens \[8\] are both correct and incorrect answers"),
    ({"incorrect": 50}, r"answer tokens \[50\] are outside 0..49"),
    ({"corrupted": "w1 w2 w3"}, "clean has 3 tokens, corrupted 4; patching by position needs equal lengths"),
    ({"clean": [0, 99], "corrupted": [0, 5]}, r"token ids must lie in 0..49, got \[0, 99, 0, 5\]"),
    ({"clean": [0, 2**64]}, r"clean is list \[0, 18446744073709551616\], expected text or a list of"),
    ({"clean": "w1 \ud800"}, r"clean is str 'w1 \\ud800', in which character 4 is half of a surrogate pair"),
    ({"correct": "\ud800"}, r"correct is str '\\ud800', in which character 1 is half of a surrogate pair"),
    ({"roles": [[["S"], 1], [["S"], 2]]}, r"roles is list .*, expected role names with positions"),
    ({"clean": "w1 " * 24, "corrupted": "w2 " * 24}, "25 tokens, but the model's context is 24"),
    ({"roles": {"S": 3}}, r"role 'S' is at \(3,\), outside the prompt's positions 0..2"),
    ({"roles": {"S": [-1]}}, r"role 'S' is at \(-1,\), outside the prompt's positions 0..2"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD_CELLS)
def test_a_bad_row_is_named_with_its_line(any_model, tmp_path, change, message):
    first, others = problems_of(from_jsonl, any_model, tmp_path, GOOD, {**GOOD, **change}, GOOD)
    assert first == "pairs.jsonl does not read:"
    assert re.match(f"line 2: {message}", others[0])
    assert all(line.startswith("  ") for line in others[1:]), others


def test_ids_that_are_no_tokens_are_shown_as_they_are(any_model, tmp_path):
    _, others = problems_of(from_jsonl, any_model, tmp_path, {**GOOD, "clean": [0, -1]})
    assert others[0].startswith("line 1: clean has 2 tokens, corrupted 3;")
    assert others[1] == "  clean:     [0, -1]"
    assert others[3].startswith("line 1: token ids must lie in 0..49, got [0, -1, ")


def test_every_bad_row_is_raised_at_once(any_model, tmp_path):
    lines = [json.dumps(GOOD), "", "{not json", json.dumps([1]), json.dumps({**GOOD, "clean": ""}), "",
             json.dumps({"clean": "w1"}), '{"clean": 1, "clean": 2}', '{"clean": NaN}']  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text("\r\n".join(lines), encoding="utf-8")
    _, others = problems_of(PromptPairDataset.from_jsonl, any_model, path)
    assert others == [
        "line 3: not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1).",
        "line 4: list, expected an object {...} with a key per column.",
        "line 8: not JSON: the key 'clean' stands twice in one object.",
        "line 9: not JSON: NaN is no JSON value.",
        "line 5: clean is empty.",
        "line 7: corrupted is missing.",
        "line 7: correct is missing.",
        "line 7: incorrect is missing.",
    ]


def test_lines_of_a_csv_are_those_of_the_file(any_model, tmp_path):
    """A cell may span lines, and blank lines count; a record is placed by its first line."""
    path = tmp_path / "pairs.csv"
    path.write_text(
        "clean,corrupted,correct,incorrect\n"
        '"w1\nw2",w1 w3,w4,w5\n'
        "\n"
        '"w1\n\nw2",w1,w4,w5\n'
        "w1,w2,w4\n"
        "w1,w2,,w5\n"
        "w1,w2,[],w5\n"
        "w1,w2,w4,w5,w6\n",
        encoding="utf-8",
    )
    _, others = problems_of(PromptPairDataset.from_csv, any_model, path)
    assert [line for line in others if not line.startswith("  ")] == [
        "line 8: 3 cells, expected 4 (clean, corrupted, correct, incorrect). "
        "A cell with a comma in it stands in double quotes.",
        "line 11: 5 cells, expected 4 (clean, corrupted, correct, incorrect). "
        "A cell with a comma in it stands in double quotes.",
        "line 5: clean has 3 tokens, corrupted 2; patching by position needs equal lengths.",
        "line 9: correct is empty.",
        "line 10: correct is a list of nothing; leave the cell empty where there is no answer.",
    ]


def test_rows_of_a_table_are_counted_as_people_see_them(any_model, tmp_path):
    frame = pd.DataFrame(rows({}, {"correct": 50}), index=["a", "b"])
    frame.loc["c"] = ["w1", "w2", np.nan, pd.NA]
    _, others = problems_of(PromptPairDataset.from_frame, any_model, frame)
    assert others[0] == "index 'b': answer tokens [50] are outside 0..49."
    assert others[1:] == ["index 'c': correct is empty.", "index 'c': incorrect is empty."]

    table = rows({}, {"clean": None})
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "pairs.parquet")
    _, others = problems_of(PromptPairDataset.from_parquet, any_model, tmp_path / "pairs.parquet")
    assert others == ["row 2: clean is empty."]
    _, others = problems_of(PromptPairDataset.from_hf, any_model, Dataset.from_list(table))
    assert others == ["dataset[1]: clean is empty."]


def test_tables_that_do_not_read(any_model, tmp_path):
    data = PromptPairDataset
    with pytest.raises(PairError, match="no file at .*nowhere.csv"):
        data.from_csv(any_model, tmp_path / "nowhere.csv")
    path = tmp_path / "pairs.bad"
    for stored, read, message in [
        (b"", data.from_csv, "pairs.bad is empty; expected a line of column names"),
        (b"", data.from_jsonl, "pairs.bad: no column 'clean'; .* It has: no columns"),
        (b"clean,corrupted,correct,incorrect\n", data.from_csv, "pairs.bad has no rows"),
        (b"a,a,b\n", data.from_csv, "pairs.bad has several columns called 'a'; rename them"),
        (b'a,b\n"x"y,z\n', data.from_csv, "pairs.bad, line 2: not CSV: ',' expected after '\"'"),
        (b"a,b\n\n\xff,1\n", data.from_csv, r"pairs.bad, line 3: not UTF-8 \(invalid start byte\)"),
        (b"{}\n\xff\n", data.from_jsonl, "pairs.bad, line 2: not UTF-8"),
        (b"PAR1 no", data.from_parquet, "pairs.bad: not a Parquet file that can be read"),
    ]:
        path.write_bytes(stored)
        with pytest.raises(PairError, match=message):
            read(any_model, path)
    with pytest.raises(PairError, match="from_frame reads a pandas DataFrame, got list"):
        data.from_frame(any_model, rows({}))
    with pytest.raises(PairError, match="from_hf reads a datasets.Dataset, got list"):
        data.from_hf(any_model, rows({}))
    splits = DatasetDict(train=Dataset.from_list(rows({})))
    with pytest.raises(PairError, match="got DatasetDict with the splits train; give one of them"):
        data.from_hf(any_model, splits)
    with pytest.raises(PairError, match="the DataFrame has several columns called 'clean'"):
        data.from_frame(any_model, pd.DataFrame([["a", "b"]], columns=["clean", "clean"]))


def test_text_needs_a_tokenizer():
    from random_models import native

    with pytest.raises(PairError, match="index 0: the prompts are text, but this model has no tokenizer"):
        PromptPairDataset.from_frame(native(), pd.DataFrame(rows({})))


# Round trips

WORDS = st.sampled_from([f"w{i}" for i in range(46)] + ["naïve", "漢字", "Ω"])  # the last three are <unk>
SPACES = st.sampled_from([" ", "  ", "\n", "\t", "\r\n", "\u2028"])


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)  # any but lone surrogates
ROLES = pa.map_(pa.string(), pa.list_(pa.int64()))


@st.composite
def prompts_of(draw, length):
    words = [draw(WORDS) + draw(SPACES) for _ in range(length)]
    return draw(st.sampled_from(["", " "])) + "".join(words)


@st.composite
def text_pairs(draw):
    """Pairs of equal length with one or several answers of one token, roles and templates."""
    length = draw(st.integers(1, 6))
    answers = draw(
        st.lists(st.sampled_from([f" w{i}" for i in range(20)]), min_size=2, max_size=6, unique=True)
    )
    cut = draw(st.integers(1, len(answers) - 1))
    sides = [
        side[0] if len(side) == 1 and draw(st.booleans()) else tuple(side)
        for side in (answers[:cut], answers[cut:])
    ]
    position = st.integers(0, length)  # BOS is position 0
    places = st.one_of(position, st.lists(position, min_size=1, max_size=3).map(tuple))
    roles = draw(st.dictionaries(NAMES, places, max_size=3))
    return PromptPair(draw(prompts_of(length)), draw(prompts_of(length)), *sides, roles, draw(NAMES))


ROUND_TRIP = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@ROUND_TRIP
@given(pairs=st.lists(text_pairs(), min_size=1, max_size=4))
def test_any_pairs_survive_jsonl(any_model, tmp_path, pairs):
    path = tmp_path / "pairs.jsonl"
    digest = PromptPairDataset(any_model, pairs).to_jsonl(path)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert PromptPairDataset.from_jsonl(any_model, path).prompt_pairs() == pairs


@ROUND_TRIP
@given(pairs=st.lists(text_pairs(), min_size=1, max_size=4))
def test_any_pairs_survive_parquet(any_model, tmp_path, pairs):
    """Written by pyarrow with answers as lists and roles as a map: compared as what they mean."""
    before = PromptPairDataset(any_model, pairs)
    columns = {
        "clean": pa.array([p.clean for p in pairs]),
        "corrupted": pa.array([p.corrupted for p in pairs]),
        **{
            side: pa.array([[getattr(p, side)] if isinstance(getattr(p, side), str) else
                            list(getattr(p, side)) for p in pairs])
            for side in ("correct", "incorrect")
        },
        "roles": pa.array([list(p.positions().items()) for p in pairs], ROLES),
        "template": pa.array([p.template for p in pairs]),
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    assert_same(before, PromptPairDataset.from_parquet(any_model, tmp_path / "pairs.parquet"))


def assert_same(before, after):
    assert before.get_clean_corrupt_pairs() == after.get_clean_corrupt_pairs()
    for i in range(len(before)):
        assert before.answers(i) == after.answers(i)
        assert before.roles(i) == after.roles(i)
        assert before.template(i) == after.template(i)


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny")


@pytest.mark.parametrize("task", bundled_tasks())
def test_a_bundled_task_survives_export(tiny, tmp_path, task):
    before = PatchingDataset.load(task, tiny, n_pairs=8)
    path = tmp_path / "pairs.jsonl"
    digest = before.to_jsonl(path)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == PatchingDataset.load(task, tiny, n_pairs=8).to_jsonl(tmp_path / "again.jsonl")
    after = PromptPairDataset.from_jsonl(tiny, path, metric=before.metric.name)
    assert_same(before, after)
    logits = torch.randn(1, 3, 603, generator=torch.Generator().manual_seed(0))
    assert after.compute_metric(logits, 5) == before.compute_metric(logits, 5)
    texts = [a for pair in map(json.loads, path.read_text("utf-8").splitlines()) for a in [pair["correct"]]]
    assert all(isinstance(a, str) or all(isinstance(b, str) for b in a) for a in texts)


def test_token_prompts_are_exported_too(any_model, tmp_path):
    before = random_dataset(any_model)
    before.to_jsonl(tmp_path / "pairs.jsonl")
    after = PromptPairDataset.from_jsonl(any_model, tmp_path / "pairs.jsonl")
    for i, prompts in enumerate(before.get_clean_corrupt_pairs()):
        assert all(map(torch.equal, prompts, after.get_clean_corrupt_pairs()[i]))
        assert (before.answers(i), before.roles(i)) == (after.answers(i), after.roles(i))


def test_what_an_exported_line_looks_like(any_model, tmp_path):
    pair = PromptPair("w1 naïve", "w1 w3", "w4", ("w5", 10), {"S": 1, "END": (2,)}, "one")
    PromptPairDataset(any_model, [pair]).to_jsonl(tmp_path / "pairs.jsonl")
    assert (tmp_path / "pairs.jsonl").read_text("utf-8") == (
        '{"clean": "w1 naïve", "corrupted": "w1 w3", "correct": "w4", "incorrect": ["w5", 10], '
        '"roles": {"S": 1, "END": [2]}, "template": "one"}\n'
    )


# Filters


def five(model):
    pairs = [PromptPair(f"w{i} w2", f"w{i} w3", "w4", "w5", template="ab"[i % 2]) for i in range(5)]
    return PromptPairDataset(model, pairs, name="five")


def test_where_keeps_and_records(any_model):
    some = five(any_model).where(lambda pair: pair.template == "a", reason="template b")
    assert len(some) == 3
    assert some.get_clean_corrupt_pairs() == [(f"w{i} w2", f"w{i} w3") for i in (0, 2, 4)]
    assert some.removed == {"template b": (1, 3)}
    assert some.kept == (0, 2, 4)
    assert some.name == "five"
    assert some.parameters == {"n_pairs": 5, "metric": "logit_diff", "removed": {"template b": [1, 3]}}

    again = some.where(np.array([True, False, True]), reason="mask")
    assert again.removed == {"template b": (1, 3), "mask": (2,)}
    assert again.get_clean_corrupt_pairs() == [(f"w{i} w2", f"w{i} w3") for i in (0, 4)]
    assert [pair.clean for pair in again.prompt_pairs()] == ["w0 w2", "w4 w2"]
    assert five(any_model).where([True] * 5).removed == {}
    assert len(five(any_model).where(pd.Series([True, False] * 2 + [True], index=list("edcba")))) == 3


def test_where_refuses_what_is_no_mask(any_model):
    dataset = five(any_model)
    with pytest.raises(PairError, match="the mask of where.. has 2 values, the dataset 'five' has 5 pairs"):
        dataset.where([True, False])
    with pytest.raises(PairError, match="the mask of where.. holds 0 for pair 0; expected True"):
        dataset.where([0, 1, 2, 3, 4])
    with pytest.raises(PairError, match="the predicate of where.. returned None for pair 0"):
        dataset.where(lambda pair: None)
    with pytest.raises(PairError, match=r"none of the 5 pairs of 'five' is left \(odd: 5\)"):
        dataset.where([False] * 5, reason="odd")


def test_a_filtered_dataset_is_swept_as_its_pairs_were(any_model):
    whole = random_dataset(any_model, 4)
    patcher = ActivationPatcher(any_model)
    some = whole.where([False, True, False, True])
    expected = patcher.sweep(whole, "z", pair_indices=[1, 3], progress=False)
    result = patcher.sweep(some, "z", progress=False)
    np.testing.assert_array_equal(result.patched, expected.patched)
    assert result.metric == "logit_diff"
    assert result.provenance["dataset_parameters"]["removed"] == {"where": [0, 2]}


def test_a_filtered_dataset_keeps_its_own_metric():
    model = model_of("native")

    class Numbered(FourMembers):
        def compute_metric(self, logits, pair_idx):
            return float(logits[0, -1, 10 + pair_idx])

    some = Numbered(token_prompts(3)).where([False, False, True])
    logits = torch.arange(50.0).view(1, 1, 50)
    assert some.compute_metric(logits, 0) == 12.0
    assert some.get_target_tokens(0) == Numbered(token_prompts(3)).get_target_tokens(2)
    result = ActivationPatcher(model).sweep(some, "resid_pre", ("layer",), progress=False)
    assert result.metric == "compute_metric"


# A sweep looks for repeated pairs


def test_a_sweep_warns_of_repeated_pairs_once(any_model):
    pairs = [PromptPair(f"w{i % 2} w2", f"w{i % 2} w3", "w4", "w5") for i in range(4)]
    dataset = PromptPairDataset(any_model, pairs)
    patcher = ActivationPatcher(any_model)
    message = r"2 of 4 pairs repeat the prompts of an earlier one \(pairs 0 and 2, 1 and 3\)"
    with pytest.warns(PatchingWarning, match=message) as caught:
        patcher.sweep(dataset, "resid_pre", ("layer",), progress=False)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with pytest.warns(PatchingWarning, match=message):
        patcher.run_patching_experiment(dataset, ["blocks.0.hook_resid_pre"])
    patcher.sweep(dataset, "resid_pre", ("layer",), pair_indices=[0, 1], progress=False)
