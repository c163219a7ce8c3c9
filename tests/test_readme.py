"""The README does what it says: its code runs, its output is real, its tree is the tree.

`python tests/test_readme.py` writes the real output into it.
"""

import contextlib
import re
import tempfile
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
NUMBER = re.compile(r"[+-]?\d+\.\d+")


def run() -> list[str]:
    """What stands in each ``text`` block if the blocks above it run, in this folder, as one session."""
    lines: list[str] = []
    session: dict = {"print": lambda *values: lines.append(" ".join(map(str, values)))}
    outputs = []
    for language, code in BLOCK.findall(README):
        if language == "toml":
            Path(f"{tomllib.loads(code)['name']}.toml").write_text(code, "utf-8")
        elif language == "python":
            lines.clear()
            exec(compile(code, "README.md", "exec"), session)
        elif language == "text":
            outputs.append("".join(line.rstrip() + "\n" for line in "\n".join(lines).splitlines()))
    return outputs


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("readme")
    with contextlib.chdir(folder):
        outputs = run()
    assert (folder / "components.png").read_bytes().startswith(b"\x89PNG")
    return outputs


def without_bars(text: str) -> list[str]:
    return [line.rstrip("█ ") for line in text.splitlines()]


def test_the_output_is_what_the_code_prints(printed) -> None:
    in_readme = [code for language, code in BLOCK.findall(README) if language == "text"]

    assert len(printed) == 3
    for written, real in zip(in_readme, printed, strict=True):
        message = f"README.md should say (python tests/test_readme.py writes it)\n{real}"
        words = [[NUMBER.sub("#", line) for line in without_bars(text)] for text in (written, real)]
        assert words[0] == words[1], message
        written_numbers, real_numbers = (
            [float(number) for number in NUMBER.findall(text)] for text in (written, real)
        )
        assert written_numbers == pytest.approx(real_numbers, abs=0.005), message


def test_the_example_is_short() -> None:
    assert len(BLOCK.search(README)[2].splitlines()) <= 12


def test_the_tree_has_a_line_for_every_room() -> None:
    tree = README[README.index("## The tree") :]
    rooms = {path.name for path in (ROOT / "patching").iterdir() if not path.name.startswith(("_", "py."))}
    named = {name for line in re.findall(r"^  .*", tree, re.M) for name in re.findall(r"\w+(?:\.py|/)", line)}

    assert {name.rstrip("/") for name in named} == rooms


def test_everything_named_is_there() -> None:
    tree = README[README.index("## The tree") :]
    linked = re.findall(r"\]\(([^):]+)\)", README)
    folders = re.findall(r"^([\w.]+/?)  ", tree, re.M)

    assert len(linked) > 3
    assert len(folders) > 3
    missing = [name for name in (*linked, *folders) if not (ROOT / name).exists()]
    assert not missing


def test_the_picture_is_small() -> None:
    pictures = list((ROOT / "docs/images").glob("*.png"))

    assert pictures
    assert max(path.stat().st_size for path in pictures) < 300_000


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        outputs = iter(run())
    fresh = BLOCK.sub(lambda b: f"```text\n{next(outputs)}```" if b[1] == "text" else b[0], README)
    (ROOT / "README.md").write_text(fresh, "utf-8")
