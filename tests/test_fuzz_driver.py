"""The fuzzer finds what it looks for: a planted bug is a crash, what our readers refuse is none."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
import readers

from patching.errors import PatchingError

HAS_ATHERIS = importlib.util.find_spec("atheris") is not None
needs_atheris = pytest.mark.skipif(not HAS_ATHERIS, reason="needs atheris, which `make fuzz` installs")
TESTS = Path(__file__).parent


def planted(path: Path) -> str:
    """A reader with a bug: text that begins so is an error that is none of ours."""
    text = path.read_bytes()
    if text.startswith(b"bu"):
        raise ValueError("a planted bug")
    if not text.startswith(b"valid"):
        raise PatchingError("not valid.")
    return text.decode()


PLANTED = readers.Reader(planted, b"valid", lambda content, random: b"bu" + content)


@pytest.fixture
def judge(monkeypatch, tmp_path):
    """One input fed to the planted reader, as the fuzzer feeds it."""
    monkeypatch.setitem(readers.READERS, "planted", PLANTED)
    return fuzz.counting(lambda content: readers.read_anything("planted", content, tmp_path), tmp_path / "n")


def test_a_planted_bug_is_let_through_and_a_refusal_is_not(judge, tmp_path):
    for content in (b"valid", b"other", b"valid too"):
        judge(content)
    with pytest.raises(ValueError, match="a planted bug"):
        judge(b"bug")
    counts = fuzz.counted(tmp_path / "n")
    assert (counts.inputs, counts.valid) == (4, 2), "also the input that crashed is counted"
    assert [path.name for path in tmp_path.iterdir()] == ["n"], "inputs do not stay behind"


def test_nothing_is_counted_where_nothing_ran(tmp_path):
    assert fuzz.counted(tmp_path / "none") == (0, 0, 0.0)


def test_a_change_of_what_is_no_file_begins_at_the_valid_one():
    assert b'"clean"' in readers.changed("jsonl", b"\xff", readers.Random(0))


def test_a_process_that_ends_early_is_a_crash(monkeypatch, capsys):
    monkeypatch.setattr(fuzz.sys, "executable", shutil.which("false"))
    assert fuzz.crashes("part", runs=10, seed=1)
    row, *told = capsys.readouterr().out.splitlines()
    assert row.split() == ["part", "0", "0", "0", "1"]
    assert told == ["    kept: nothing"]


def test_the_input_that_crashed_is_named():
    log = "INFO: much\n#1 NEW\nValueError: a planted bug\nartifact_prefix='x/'; Test unit written to x/a-1\n"
    first, *_, last = fuzz.story(log)
    assert first.strip() == "ValueError: a planted bug"
    assert last.strip() == "kept: x/a-1"


FEED_PLANTED = """
import sys, fuzz, readers, test_fuzz_driver
from pathlib import Path
readers.READERS["planted"] = test_fuzz_driver.PLANTED
fuzz.feed("planted", Path(sys.argv[1]), 5000, "-seed=1", f"-artifact_prefix={sys.argv[1]}/")
"""


@needs_atheris
def test_atheris_finds_a_planted_bug_and_keeps_the_input(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FEED_PLANTED, str(tmp_path)], cwd=TESTS, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "ValueError: a planted bug" in done.stdout + done.stderr
    (kept,) = tmp_path.glob("crash-*")
    assert kept.read_bytes().startswith(b"bu")
    assert 0 < fuzz.counted(tmp_path / "counts").inputs < 5000


@needs_atheris
def test_a_short_run_of_the_driver(capsys):
    assert fuzz.main(["part", "--runs", "300", "--jobs", "1", "--seed", "1"]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["reader", "inputs", "run", "inputs/s", "read", "as", "valid", "crashes"]
    name, inputs, _, valid, crashed = row.split()
    assert (name, inputs, crashed) == ("part", "300", "0")
    assert 0 < int(valid) < 300


@needs_atheris
def test_a_reader_that_does_not_exist_is_named(capsys):
    with pytest.raises(SystemExit):
        fuzz.main(["prat"])
    assert "unknown readers: prat; there are values, cells" in capsys.readouterr().err


def test_without_atheris_the_command_says_where_it_comes_from(monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        fuzz.main(["part"])
    assert "atheris is not installed; on Linux (x86_64)" in capsys.readouterr().err
