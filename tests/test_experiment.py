"""Experiments: files read and checked, claims judged by numbers worked out by hand, folders kept safe.

The last tests run every experiment that needs no download; `ioi_tiny` takes longest, some ten seconds.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_models

from patching import ActivationPatcher, load_model
from patching.errors import ExperimentError, ModelError, PatchingWarning
from patching.experiment import CLAIMS, material, read_experiment, run
from patching.experiment.cells import Cells
from patching.experiment.claims import Measured
from patching.experiment.file import SWEEP
from patching.experiment.run import _prepare
from patching.results import NullFloor, PairInfo, SweepResult
from patching.sites import Site

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
FILES = sorted(EXPERIMENTS.glob("*.toml"))
OFFLINE = [path for path in FILES if not path.stem.endswith("gpt2")]
ONLINE = [path for path in FILES if path.stem.endswith("gpt2")]

SMALL = """
question = "Which input does the gate need?"
model = "compiled.and_gate"

[sweeps.heads]
activation = "z"
over = ["layer", "role", "head"]
direction = "noising"

[[claims]]
claim = "Both."
source = "by hand"
kind = "effect"
sweep = "heads"
at = { layer = 0, head = [0, 1], role = "END" }
value = 1.0
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def changed(path: Path, *changes: tuple[str, str]) -> Path:
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return path


# What a file says


def test_every_argument_of_a_sweep_can_stand_in_a_file() -> None:
    from inspect import signature

    arguments = set(signature(ActivationPatcher.sweep).parameters)

    assert set(SWEEP) == arguments - {"self", "dataset", "progress", "store", "executor", "workers"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[[claims]]", "[claims]", "claims should be a list"),
        ('model = "compiled.and_gate"', "", "the file: the key 'model' is missing"),
        ("question", "questoin", r"unknown key 'questoin'. Available: claims, figures, model, note, quest"),
        (
            'direction = "noising"',
            "window = true",
            r"\[sweeps.heads\]: window should be a whole number",
        ),
        (
            'direction = "noising"',
            'postions = ["S2"]',
            r"\[sweeps.heads\]: unknown key 'postions'. Avail",
        ),
        (
            'kind = "effect"',
            'kind = "efect"',
            "unknown kind of claim 'efect'. Available: agree, differ",
        ),
        ('kind = "effect"', "kind = []", r"\[\[claims\]\] 1 \('Both.'\): kind should be a text, got \[\]"),
        ("value = 1.0", "value = 1" + "0" * 30, "should be a number, got 10+, which 64 bits do not hold"),
        ('kind = "effect"', "", r"\[\[claims\]\] 1 \('Both.'\): the key 'kind' is missing"),
        ('source = "by hand"', "", r"\[\[claims\]\] 1 \('Both.'\): the key 'source' is missing"),
        ("value = 1.0", 'value = "1"', "value should be a number, got '1'"),
        ("value = 1.0", "", "nothing to check: give value"),
        ("value = 1.0", "tolerance = 0.1\nabove = 0", "tolerance goes with value"),
        ("value = 1.0", "significant = true", r"significant needs p_values in \[statistics\]"),
        ("value = 1.0", "beyond_floor = true", r"beyond_floor needs null_floor in \[statistics\]"),
        ('sweep = "heads"', 'sweep = "haeds"', "unknown sweep 'haeds'. Available: heads"),
        ("[sweeps.heads]", '[sweeps."../heads"]', r"a name of letters, digits"),
        ("[[claims]]", '[task]\nname = "ioi"\n[[claims]]', "'name' has no meaning for 'compiled.and_gate'"),
        ("[[claims]]", '[[figures]]\nsweep = "head"\n[[claims]]', "unknown sweep 'head'. Available: heads"),
        ("[[claims]]", '[[figures]]\nsweep = "heads"\ndim = "p"\n[[claims]]', "unknown dim 'p'"),
        ("question =", "question", "not a TOML file"),
    ],
)
def test_a_mistake_in_a_file_is_named(small: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(ExperimentError, match=message) as error:
        read_experiment(changed(small, (old, new)))
    assert str(error.value).startswith("small.toml: ")


def test_all_mistakes_are_named_at_once(small: Path) -> None:
    changed(small, ("question", "q"), ("kind =", "knd ="), ("activation =", "activatoin ="))
    with pytest.raises(ExperimentError) as error:
        read_experiment(small)
    for key in ("'q'", "'question'"):
        assert key in str(error.value)

    changed(small, ("q =", "question ="))
    with pytest.raises(ExperimentError) as error:
        read_experiment(small)
    for key in ("'knd'", "'kind'", "'activatoin'"):
        assert key in str(error.value)


def test_a_task_needs_a_name_unless_the_circuit_has_its_own(small: Path) -> None:
    with pytest.raises(ExperimentError, match=r"\[task\]: the key 'name' is missing: the sweep 'heads'"):
        read_experiment(changed(small, ("compiled.and_gate", "tiny")))


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"no file .*nowhere.toml"):
        read_experiment(tmp_path / "nowhere.toml")


# Claims about what is not swept


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ("{ layer = 2 }", "layer 2 was not swept: 'heads' has layer 0, 1."),
        ("{ head = [3, 4, 5] }", r"head 4, 5 was not swept: 'heads' has head 0\.\.3\."),
        ('{ role = "S2" }', "role S2 was not swept: 'heads' has role X, Y, END"),
        ("{ pos = 3 }", "'heads' has no axis 'pos'; its axes: layer, role, head"),
        ("{ layer = true }", "layer True was not swept"),
    ],
)
def test_a_claim_about_what_is_not_swept_fails_before_any_forward_pass(
    small: Path, tmp_path: Path, at: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed(small, ('{ layer = 0, head = [0, 1], role = "END" }', at))
    model = material.model_of("compiled.and_gate")

    def forward(*args: Any, **options: Any) -> Any:
        raise AssertionError("the model ran")

    monkeypatch.setattr(type(model), "forward", forward)
    with pytest.raises(ExperimentError, match=message) as error:
        run(small, tmp_path / "out", model=model)
    assert "[[claims]] 1 ('Both.')" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_problems_of_sweeps_and_claims_come_together(small: Path, tmp_path: Path) -> None:
    broken = '[sweeps.more]\nover = ["layer", "neuron"]\n[[claims]]'
    changed(small, ("[[claims]]", broken), ("layer = 0", "layer = 7"))
    with pytest.raises(ExperimentError, match="the experiment cannot run") as error:
        run(small, tmp_path / "out")
    assert "[sweeps.more]: 'z' has no axis 'neuron'" in str(error.value)
    assert "layer 7 was not swept" in str(error.value)


# Verdicts, on numbers made by hand


def result(effects: list[list[float]], clean: float = 4.0, corrupted: float = 0.0) -> SweepResult:
    """A denoising sweep over two layers and two heads whose effects are these in each of two pairs."""
    patched = corrupted + (clean - corrupted) * np.array(effects)[..., None].repeat(2, -1)
    cells = tuple((Site(f"blocks.{l}.attn.hook_z", head=h),) for l in range(2) for h in range(2))
    pairs = (PairInfo(0, ("a",), ("b",)), PairInfo(1, ("a",), ("b",)))
    return SweepResult(
        {"layer": (0, 1), "head": (0, 1)}, np.full(2, clean), np.full(2, corrupted), patched, cells, pairs,
        "z", "denoising", "logit_diff",
    )  # fmt: skip


A = Measured(result([[0.5, -0.7], [0.1, 0.0]]))
B = Measured(result([[0.5, -0.6], [0.4, 0.0]]))
TRUE = np.array([[0.5, -0.7], [0.1, 0.0]])


def cell(layer: int, head: int) -> Cells:
    return Cells({"layer": layer, "head": head})


@pytest.mark.parametrize(
    ("kind", "holds", "fails"),
    [
        ("top", {"k": 2, "cells": [cell(0, 0), cell(0, 1)]}, {"k": 1, "cells": [cell(0, 0)]}),
        ("top", {"k": 1, "cells": [cell(1, 0)], "at": Cells({"layer": 1})}, {"k": 3, "cells": [cell(1, 1)]}),
        ("only", {"threshold": 0.5, "cells": [cell(0, 0), cell(0, 1)]},
         {"threshold": 0.5, "cells": [cell(0, 1)]}),
        ("only", {"threshold": 0.6, "cells": [cell(0, 1)]},
         {"threshold": 0.6, "cells": [cell(0, 0), cell(0, 1)]}),
        ("only", {"threshold": 0.1, "cells": [], "at": Cells({"layer": 1, "head": 1})},
         {"threshold": 0.05, "cells": [], "at": Cells({"layer": 1})}),
        ("effect", {"at": cell(0, 1), "value": -0.6, "tolerance": 0.11},
         {"at": cell(0, 1), "value": -0.6, "tolerance": 0.09}),
        ("effect", {"at": Cells({"head": 0}), "above": 0.05}, {"at": Cells({"head": 0}), "above": 0.1}),
        ("effect", {"at": Cells({"head": 1}), "below": 0.01}, {"at": Cells({"head": 1}), "below": -0.1}),
        ("effect", {"at": cell(1, 1), "value": 0}, {"at": cell(1, 0), "value": 0}),
        ("effect", {"at": cell(0, 0), "value": 2.0, "aggregate": "mean_difference"},
         {"at": cell(0, 0), "value": 0.5, "aggregate": "mean_difference"}),
        ("effect", {"at": cell(0, 1), "beyond_floor": True}, {"at": cell(0, 0), "beyond_floor": True}),
        ("score", {"of": "gap", "value": 4.0}, {"of": "gap", "value": 3.9}),
        ("score", {"of": "clean", "above": 3.9}, {"of": "corrupted", "above": 0.0}),
        ("score", {"of": "clean_above_0", "value": 1.0}, {"of": "clean_above_0", "below": 1.0}),
        ("truth", {"tolerance": 1e-12}, {"tolerance": 1e-12, "sweep": "b"}),
    ],
)  # fmt: skip
def test_claims_about_one_sweep(kind: str, holds: dict, fails: dict) -> None:
    floor = NullFloor(0.6, 0.99, A.result)
    both = {
        "a": Measured(A.result, floor=floor, truth=TRUE),
        "b": Measured(B.result, floor=floor, truth=TRUE),
    }
    said = {"claim": "c", "source": "s", "sweep": "a"}

    assert CLAIMS[kind](**{**said, **holds}).check(both).holds
    assert not CLAIMS[kind](**{**said, **fails}).check(both).holds


def test_claims_about_two_sweeps() -> None:
    both = {"a": A, "b": B}
    said = {"claim": "c", "source": "s", "sweeps": ["a", "b"]}
    agree, differ = CLAIMS["agree"], CLAIMS["differ"]

    assert agree(**said, within=0.31).check(both).holds
    assert not agree(**said, within=0.29).check(both).holds
    assert agree(**said, within=0.11, at=Cells({"layer": 0})).check(both).holds
    assert differ(**said, by=0.29, at=cell(1, 0)).check(both).holds
    assert not differ(**said, by=0.31, at=cell(1, 0)).check(both).holds
    assert not differ(**said, by=0.05, at=Cells({"layer": 0})).check(both).holds
    verdict = differ(**said, by=0.29, at=cell(1, 0)).check(both)
    assert verdict.measured == "L1H0: a +0.100, b +0.400"
    assert verdict.values == {"smallest": pytest.approx(0.3)}


def test_two_sweeps_are_compared_by_values_of_axes_not_by_order() -> None:
    turned = SweepResult(
        {"head": (1, 0), "layer": (0, 1)}, B.result.clean, B.result.corrupted,
        B.result.patched[:, ::-1].swapaxes(0, 1), B.result.cells, B.result.pairs, "z", "denoising",
        "logit_diff",
    )  # fmt: skip
    claim = CLAIMS["agree"](claim="c", source="s", sweeps=["a", "b"], within=1e-12)

    assert claim.check({"a": B, "b": Measured(turned)}).holds
    assert not claim.check({"a": A, "b": Measured(turned)}).holds


def test_undefined_effects_satisfy_no_claim_about_effects() -> None:
    nothing = {"a": Measured(result([[0.5, 0.5], [0.5, 0.5]], clean=1.0, corrupted=1.0))}
    said = {"claim": "c", "source": "s", "sweep": "a"}

    assert CLAIMS["undefined"](**said).check(nothing).holds
    assert not CLAIMS["undefined"](**said).check({"a": A}).holds
    assert not CLAIMS["effect"](**said, at=Cells(), above=-9.0).check(nothing).holds
    assert not CLAIMS["effect"](**said, at=Cells(), value=0.0, tolerance=9.0).check(nothing).holds
    assert not CLAIMS["top"](**said, k=4, cells=[cell(0, 0)]).check(nothing).holds
    assert not CLAIMS["only"](**said, threshold=0.1, cells=[]).check(nothing).holds


def test_what_a_verdict_says() -> None:
    claim = CLAIMS["top"](claim="c", source="s", sweep="a", k=1, cells=[cell(0, 0)])
    verdict = claim.check({"a": A})

    assert verdict.as_dict() == {
        "claim": "c", "kind": "top", "sweeps": ["a"], "holds": False, "source": "s",
        "expected": "L0H0 among the 1 strongest", "measured": "L0H0 +0.500 is 2nd", "values": {"L0H0": 0.5},
    }  # fmt: skip
    assert str(verdict).startswith("FAILS  c\n")


# Running, and the folder that a run leaves


def test_a_run_leaves_everything(small: Path, tmp_path: Path) -> None:
    finished = run(small, tmp_path / "out", progress=False)

    assert finished.holds
    assert finished.results["heads"].effect()[0, 2, :2].tolist() == [1.0, 1.0]
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")}
    assert {
        "run.json", "experiment.toml", "claims.json", "report.html", "sweeps/heads/manifest.json",
        "tables/heads.csv", "figures/heads.pdf", "figures/heads.png",
    } <= names  # fmt: skip
    claims = json.loads((tmp_path / "out/claims.json").read_text())
    assert claims["holding"] == 1
    assert claims["claims"][0]["measured"] == "2 cells, all 1"
    stored = SweepResult.load(tmp_path / "out/sweeps/heads")
    np.testing.assert_array_equal(stored.patched, finished.results["heads"].patched)


def test_a_claim_that_fails_is_a_result(small: Path, tmp_path: Path) -> None:
    finished = run(changed(small, ("noising", "denoising")), tmp_path / "out", progress=False)

    assert not finished.holds
    assert "0 of 1 claims hold" in str(finished)
    assert json.loads((tmp_path / "out/claims.json").read_text())["failing"] == 1


def test_a_null_floor_that_cannot_be_had_is_a_problem_before_any_sweep(tmp_path: Path) -> None:
    lonely = SMALL.replace("compiled.and_gate", "tiny").replace(
        "[[claims]]", "[statistics]\nnull_floor = 0.99\n[[claims]]"
    )
    (tmp_path / "lonely.toml").write_text(lonely + '[task]\nname = "ioi"\nn_pairs = 2\n')
    with pytest.raises(ExperimentError, match=r"\[statistics\] null_floor: .* draws from another pair"):
        run(tmp_path / "lonely.toml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_experiment_is_brought_up_to_date_from_what_is_stored(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(small, tmp_path / "out", progress=False)
    changed(small, ("value = 1.0", "value = 0.5"))
    monkeypatch.setattr("patching.engine.exact.run", None)  # whoever runs a sweep again fails
    again = run(small, tmp_path / "out", progress=False)

    assert first.holds
    np.testing.assert_array_equal(again.results["heads"].patched, first.results["heads"].patched)
    assert not again.holds
    assert json.loads((tmp_path / "out/claims.json").read_text())["failing"] == 1


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda out, file: (out / "notes.txt").write_text("mine"), "holds other files and no run"),
        (lambda out, file: (out / "run.json").write_text("{"), "run.json does not read"),
        (lambda out, file: (out / "run.json").write_text('{"format": 9}'), "has format 9, and this version"),
        (lambda out, file: run(file.rename(file.with_stem("first")), out, progress=False),
         "holds the experiment 'first', not 'small'"),
        (lambda out, file: run(changed(file, ('"noising"', '"denoising"')), out, progress=False),
         '(?s)another definition.*sweeps.heads.direction: "denoising" then, "noising" now'),
    ],
)  # fmt: skip
def test_a_folder_with_something_else_is_left_as_it_is(
    small: Path, tmp_path: Path, make: Any, message: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    make(out, small)
    small.write_text(SMALL)
    before = contents(out)
    with pytest.raises(ExperimentError, match=message):
        run(small, out, progress=False)
    assert contents(out) == before


def test_a_file_in_place_of_a_folder(small: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ExperimentError, match="out is a file"):
        run(small, tmp_path / "out", progress=False)
    assert (tmp_path / "out").read_text() == "mine"


# Prompts from elsewhere


def test_prompts_come_from_a_table_beside_the_experiment(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text(
        "clean,corrupted,correct,incorrect\n"
        '"Then, Mary and John went to the store. John gave a ring to",'
        '"Then, Mary and John went to the store. Mary gave a ring to"," Mary"," John"\n'
    )
    text = SMALL[: SMALL.index("[[claims]]")].replace("compiled.and_gate", "tiny").replace('"role", ', "")
    (tmp_path / "mine.toml").write_text(text + 'claims = []\n[task]\nname = "pairs.csv"\n')
    changed(tmp_path / "mine.toml", ("claims = []\n", ""), ("question", "claims = []\nquestion"))
    finished = run(tmp_path / "mine.toml", tmp_path / "out", progress=False)

    assert finished.results["heads"].clean.shape == (1,)
    assert finished.holds


# The experiments of the repository


def test_there_are_experiments_of_every_kind() -> None:
    used = {claim.kind for path in FILES for claim in read_experiment(path).claims}

    assert used == set(CLAIMS)
    assert len(OFFLINE) >= 6
    assert len(ONLINE) >= 4


@pytest.mark.parametrize("path", OFFLINE, ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::patching.errors.PatchingWarning")
def test_the_claims_of_offline_experiments_hold(path: Path, tmp_path: Path) -> None:
    finished = run(path, tmp_path / "out", progress=False)

    assert finished.holds, str(finished)
    assert finished.verdicts
    for figure in finished.experiment.figures:
        assert (tmp_path / f"out/figures/{figure.name}.pdf").stat().st_size > 1000


@pytest.fixture(scope="module")
def gpt2_shape() -> Any:
    """A random model of 12 layers of 12 heads that reads the bundled tasks' words."""
    build = random_models.hooked if random_models.HookedTransformer is not None else random_models.native
    tiny = load_model("tiny")
    return build(
        tiny.tokenizer, n_layers=12, n_heads=12, d_head=2, d_model=24, d_mlp=24, n_ctx=40,
        d_vocab=int(tiny.cfg.d_vocab),
    )  # fmt: skip


@pytest.mark.parametrize("path", ONLINE, ids=lambda path: path.stem)
def test_experiments_on_gpt2_resolve_on_its_shape(path: Path, gpt2_shape: Any) -> None:
    experiment = read_experiment(path)
    ready = _prepare(experiment, gpt2_shape)

    assert experiment.model == "gpt2-small"
    assert "HF_HUB_OFFLINE=0 patching run" in experiment.note
    assert set(ready.datasets) == set(experiment.sweeps)


def test_a_claim_beyond_gpt2_would_be_seen(gpt2_shape: Any, tmp_path: Path) -> None:
    copy = tmp_path / "copy.toml"
    copy.write_text((EXPERIMENTS / "ioi_gpt2.toml").read_text())
    changed(copy, ("layer = 8, head = 6", "layer = 8, head = 12"))
    with pytest.raises(ExperimentError, match=r"head 12 was not swept: 'heads' has head 0\.\.11"):
        _prepare(read_experiment(copy), gpt2_shape)


def test_without_the_weights_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="out of reach") as error:
        run(EXPERIMENTS / "ioi_gpt2.toml", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_without_plotly_only_the_report_is_missing(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "plotly", None)
    with pytest.warns(PatchingWarning, match="report.html is not written.*pip install"):
        finished = run(small, tmp_path / "out", progress=False)
    assert finished.holds
    assert not (tmp_path / "out/report.html").exists()
