"""The demo from the command line's arguments to the files it writes."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

import patching

DEMO = Path(__file__).parent.parent / "demo.py"


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """Runs ``python demo.py`` with some arguments in an empty folder, inside this process."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
        runpy.run_path(str(DEMO), run_name="__main__")

    return run


def stopped(demo, *arguments: str) -> str:
    """The message that the demo exits with; a text makes the exit status 1."""
    with pytest.raises(SystemExit) as stop:
        demo(*arguments)
    assert isinstance(stop.value.code, str)
    return stop.value.code


def effects(printed: str) -> dict[str, float]:
    """Every ``name  +0.123`` line of the printed summaries."""
    return {name: float(value) for name, value in re.findall(r"^  (\S.*?) {2,}([+-]\d\.\d+)", printed, re.M)}


def test_the_demo_finds_the_positions_and_draws_them(demo, capsys) -> None:
    demo("--pairs", "6")
    printed = capsys.readouterr().out
    found = effects(printed)

    assert "clean prompts with IO above S: 100% of 6" in printed
    assert found["L0 pos 11 S2"] == pytest.approx(1.0), "the only differing token, before the first layer"
    assert found["L3 pos 15 'to'"] > 0.5, "before the last layer the answer has reached the last position"
    assert "denoising of z: 4 layer × 8 head, 6 pairs" in printed
    for name in ("positions", "heads"):
        picture = imread(f"out/demo/{name}.png")
        assert min(picture.shape[:2]) > 300
        assert np.ptp(picture[..., :3], axis=(0, 1)).min() > 0.5, "it is not blank"


def test_the_pictures_go_where_they_are_wanted(demo, tmp_path) -> None:
    demo("--pairs", "2", "--out", "some/where")

    assert sorted(path.name for path in (tmp_path / "some/where").iterdir()) == ["heads.png", "positions.png"]


def test_an_unknown_model_is_one_readable_line(demo) -> None:
    message = stopped(demo, "--model", "no-such-model")

    assert "no-such-model" in message
    assert "tiny" in message, "it names the model that always works"
    assert "\n" not in message


def test_a_model_that_cannot_do_the_task_stops_the_demo(demo, monkeypatch, tmp_path) -> None:
    model = patching.load_model("tiny")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    monkeypatch.setattr(patching, "load_model", lambda name: model)

    assert stopped(demo) == "The model cannot do this task (0% right), so there is nothing to explain."
    assert not any(tmp_path.iterdir())


def test_the_demo_fits_on_a_page() -> None:
    assert len(DEMO.read_text("utf-8").splitlines()) <= 60
