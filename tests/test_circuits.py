"""Circuits: sets of edges by hand, runs against a transformer written out, questions on known circuits."""

import json
from dataclasses import replace

import numpy as np
import pytest
from model_state import assert_same, state_of
from plain_edges import PlainEdges
from random_models import MODELS, HookedTransformer, hooked, model_of, native
from random_pairs import FourMembers, entropy, ragged_dataset, random_dataset, token_prompts

from patching import PromptPair, PromptPairDataset
from patching.circuits import (
    FRACTIONS,
    Ablated,
    Circuit,
    completeness,
    curve,
    faithfulness,
    greedy,
    minimality,
    partial_necessity,
    random_circuit,
    sufficiency,
    threshold,
    top,
)
from patching.circuits.curve import area
from patching.compiled import adder, and_gate, ioi, or_gate
from patching.edges import Edge, Graph, Node
from patching.errors import MetricError, PatchingError, PatchingWarning, SiteError

GRAPH = Graph(n_layers=2, n_heads=2, n_key_value_heads=2)
HEADS = ["a0.h0", "a1.h0", "a2.h0"]
"""The heads of the compiled IOI circuit, all of which another run of theirs (h1) only imitates."""
CHAIN = ["input->a0.h0<q>", "a0.h0->a1.h0<v>", "a1.h0->a2.h0<q>", "a2.h0->logits"]
"""The edges along which the difference of s2_swap travels: S2 asks for its own token, what is found is
inhibited at the end, and the name mover looks away from it."""


@pytest.fixture(scope="module")
def known():
    circuit = ioi()
    return circuit.model(), circuit


@pytest.fixture(scope="module")
def swapped(known):
    model, circuit = known
    return Ablated.of(model, circuit.dataset("s2_swap"))


# Sets of edges


def names(circuit):
    return [str(edge) for edge in circuit]


def test_a_circuit_of_edges_is_a_set():
    some = Circuit.of(GRAPH, ["a0.h1->m0", "input->m0", "input->m0"])
    other = Circuit.of(GRAPH, ["input->m0", "m1->logits"])
    assert len(some) == 2
    assert names(some | other) == ["input->m0", "a0.h1->m0", "m1->logits"]
    assert names(some & other) == ["input->m0"]
    assert some == Circuit.of(GRAPH, [Edge.parse("input->m0"), "a0.h1->m0"])
    assert some != other
    assert "a0.h1->m0" in some
    assert "m0->logits" not in some
    assert some.complement() | some == Circuit.full(GRAPH)
    assert some.complement() & some == Circuit.empty(GRAPH)
    assert len(some.complement()) == GRAPH.n_edges - 2
    assert [str(node) for node in some.nodes] == ["input", "a0.h1", "m0"]
    assert [str(node) for node in some.parts] == ["a0.h1", "m0"]


def test_a_circuit_of_nodes_has_every_edge_between_them():
    circuit = Circuit.of_nodes(GRAPH, ["a0.h1", "m1"])
    assert set(names(circuit)) == {
        "input->a0.h1<q>", "input->a0.h1<k>", "input->a0.h1<v>", "input->m1", "a0.h1->m1", "input->logits",
        "a0.h1->logits", "m1->logits",
    }  # fmt: skip
    every = [str(node) for node in GRAPH.nodes]
    assert Circuit.of_nodes(GRAPH, every) == Circuit.full(GRAPH)
    assert Circuit.full(GRAPH).without(["a0.h0", "a1.h0", "a1.h1", "m0"]) == circuit


def test_positions_of_a_node_circuit():
    """A head is queried where it writes, and reads keys and values anywhere; an MLP reads where it writes."""
    circuit = Circuit.of_nodes(GRAPH, ["a0.h1@S2", "a1.h0@END", "m1"])
    inside = set(names(circuit))
    assert {"input->a0.h1<q>@S2", "input->a0.h1<k>", "a0.h1->a1.h0<v>@S2", "a1.h0->m1@END"} <= inside
    assert {"a0.h1->m1@S2", "input->m1", "m1->logits", "a1.h0->logits@END"} <= inside
    assert not any(name.startswith("a0.h1->a1.h0<q>") for name in inside)  # written at S2, asked at END


def test_an_edge_everywhere_contains_it_at_a_position():
    everywhere, there = Circuit.of(GRAPH, ["input->m0"]), Circuit.of(GRAPH, ["input->m0@S2", "m0->m1@3"])
    assert there.positioned
    assert not everywhere.positioned
    assert "input->m0@S2" in everywhere
    assert "input->m0" not in there
    assert names(everywhere | there) == ["input->m0", "m0->m1@3"]
    assert names(everywhere & there) == ["input->m0@S2"]
    rest = there.complement(positions=["S2", 3])
    assert "input->m0@3" in rest
    assert "m0->m1@S2" in rest
    assert "input->m1" in rest
    assert "input->m0@S2" not in rest
    with pytest.raises(PatchingError, match=r"complement\(positions="):
        there.complement()


def test_outside_of_a_circuit_in_a_prompt():
    circuit = Circuit.of(GRAPH, ["input->m0@S2", "m0->m1"])
    outside = {str(edge) for edge in circuit.outside(4, {"S2": (1, 2)})}
    assert {"input->m0@0", "input->m0@3", "input->m1"} <= outside
    assert not {"input->m0", "input->m0@1", "input->m0@2", "m0->m1"} & outside
    assert len(outside) == GRAPH.n_edges - 2 + 2
    with pytest.raises(SiteError, match="has no position 'S2'; its roles: none"):
        circuit.outside(4, {})


def test_connected_drops_what_is_on_no_path():
    path = ["input->m0", "m0->m1", "m1->logits"]
    circuit = Circuit.of(GRAPH, [*path, "input->a1.h0<q>", "a1.h1->logits", "a0.h0->a1.h1<v>"])
    assert names(circuit.connected()) == path
    assert Circuit.full(GRAPH).connected() == Circuit.full(GRAPH)
    assert Circuit.of(GRAPH, ["m0->m1"]).connected() == Circuit.empty(GRAPH)


def test_paths_through_shared_keys():
    grouped = Graph(n_layers=2, n_heads=4, n_key_value_heads=2)
    path = ["input->a0.h0<k>", "a0.h1->a1.h1<v>", "a1.h3->logits"]  # key/value head 0 is of h0, h1
    assert names(Circuit.of(grouped, path).connected()) == path
    broken = [*path[:2], "a1.h1->logits"]
    assert names(Circuit.of(grouped, ["input->a0.h1<k>", *broken[1:]]).connected()) == []


def test_json_and_back():
    circuit = Circuit.of(GRAPH, ["input->a1.h0<k>@S2", "a0.h1->m0@-1", "m1->logits"])
    text = circuit.to_json()
    assert Circuit.from_json(text) == circuit
    assert json.loads(text)["edges"] == ["a0.h1->m0@-1", "input->a1.h0<k>@S2", "m1->logits"]
    with pytest.raises(PatchingError, match="this is not a circuit"):
        Circuit.from_json('{"nodes": []}')
    with pytest.raises(SiteError, match="no node a7.h0 that writes"):
        Circuit.from_json(text.replace("a0.h1->m0", "a7.h0->m0"))


@pytest.mark.parametrize(
    ("counts", "why"),
    [
        ({"n_layers": 10**9}, "no model has 1000000000 layers of 2 heads"),
        ({"n_heads": 0}, "no model has 2 layers of 0 heads"),
        ({"n_layers": -1}, "no model has -1 layers"),
        ({"n_heads": 3, "n_key_value_heads": 2}, "3 heads do not share 2 key/value heads evenly"),
        ({"n_layers": "2"}, "n_layers should be a whole number, got '2'"),
        ({"mlp": True}, "unknown key 'mlp'"),
    ],
)
def test_counts_that_no_model_has_are_no_circuit(counts, why):
    whole = json.loads(Circuit.of(GRAPH, ["m1->logits"]).to_json())
    with pytest.raises(PatchingError, match=f"this is not a circuit:\n  its graph: .*{why}"):
        Circuit.from_json(json.dumps({**whole, "graph": {**whole["graph"], **counts}}))


def test_an_edge_that_is_no_text_is_no_circuit():
    whole = json.loads(Circuit.of(GRAPH, ["m1->logits"]).to_json())
    with pytest.raises(PatchingError, match="its edges: expected a list of texts"):
        Circuit.from_json(json.dumps({**whole, "edges": ["m1->logits", 5]}))


def test_unknown_nodes_and_edges_are_listed_with_what_there_is(known, swapped):
    with pytest.raises(SiteError) as error:
        Circuit.of_nodes(GRAPH, ["a5.h0", "m9", "b3"])
    assert "no node a5.h0 in this model. Available: input, a0.h0 .. a1.h1, m0 .. m1, logits." in str(
        error.value
    )
    assert "no node m9" in str(error.value)
    assert "'b3' is not a node" in str(error.value)
    with pytest.raises(SiteError, match="a0.h0 does not read m0"):
        Circuit.of(GRAPH, ["m0->a0.h0<q>"])
    with pytest.raises(PatchingError, match="a circuit of another model"):
        swapped.scores([Circuit.full(GRAPH)])
    with pytest.raises(PatchingError, match="of different models"):
        Circuit.full(GRAPH) | Circuit.full(known[0])
    with pytest.raises(SiteError, match="give them without a position"):
        Circuit.full(GRAPH).without(["m0@S2"])


# Runs


def plain_score(model, pair, circuit, written, roles=()):
    """The logit difference of a circuit, from a transformer written out edge by edge."""
    plain = PlainEdges(model)
    edges = [str(edge) for edge in circuit.outside(len(pair.clean), dict(roles))]
    logits = plain(pair.clean, edges, written)["logits"][-1]
    return float(logits[pair.correct] - logits[pair.incorrect])


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("outside", ["paired", "mean", "zero"])
def test_scores_equal_a_transformer_written_out(kind, outside):
    model = model_of(kind)
    dataset = random_dataset(model, 2)
    ablated = Ablated.of(model, dataset, outside)
    graph = ablated.graph
    circuits = [
        random_circuit(graph, 40, 0),
        random_circuit(graph, 90, 1),
        Circuit.of_nodes(graph, ["a0.h1@2", "a1.h0@6", "m1@4", "m2"]),
        Circuit.of_nodes(graph, ["a0.h1", "a2.h3", "m0"]),
    ]
    got = ablated.scores(circuits)
    plain = PlainEdges(model)
    sources = [plain(pair.corrupted) for pair in dataset.pairs]
    if outside == "mean":
        mean = {node: sum(one[node] for one in sources) / 2 for node in sources[0]}
        sources = [mean, mean]
    if outside == "zero":
        sources = [{node: 0 * value for node, value in one.items()} for one in sources]
    for p, (pair, source) in enumerate(zip(dataset.pairs, sources, strict=True)):
        expected = [plain_score(model, pair, circuit, source) for circuit in circuits]
        np.testing.assert_allclose(got[:, p], expected, atol=2e-4)
    assert np.ptp(got) > 1e-2


@pytest.mark.parametrize("outside", ["paired", "mean", "zero"])
def test_the_whole_model_is_1_and_no_edge_is_0_exactly(model, outside):
    before = state_of(model)
    ablated = Ablated.of(model, random_dataset(model, 3), outside)
    assert faithfulness(ablated, Circuit.full(model)) == 1
    assert faithfulness(ablated, Circuit.empty(model)) == 0
    assert_same(before, state_of(model))


def test_both_ends_are_the_models_own_runs(model):
    dataset = random_dataset(model, 2)
    ablated = Ablated.of(model, dataset)
    for p, pair in enumerate(dataset.pairs):
        for prompt, score in ((pair.clean, ablated.clean), (pair.corrupted, ablated.empty)):
            logits = model(prompt[None], return_type="logits")[0, -1].detach()
            assert score[p] == pytest.approx(float(logits[pair.correct] - logits[pair.incorrect]), abs=1e-4)


def test_edges_on_no_path_change_nothing(model):
    ablated = Ablated.of(model, random_dataset(model, 2))
    generator = np.random.default_rng(0)
    edges = ablated.graph.edges
    some = [edges[i] for i in generator.choice(len(edges), 60, replace=False)]
    circuit = Circuit.of(ablated.graph, [*some, "input->m0", "m0->logits"])
    assert len(circuit.connected()) < len(circuit)
    scores = ablated.scores([circuit, circuit.connected()])
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-4)
    assert np.abs(scores[0] - ablated.empty).max() > 1e-3


def test_prompts_of_several_lengths_and_roles(model):
    ragged = ragged_dataset(model)
    circuit = Circuit.of_nodes(model, ["a0.h1@CHANGED", "m1@END", "a2.h0"])
    got = Ablated.of(model, ragged).scores([circuit])[0]
    for p, pair in enumerate(ragged.pairs):
        one = PromptPairDataset(model, [pair])
        np.testing.assert_allclose(Ablated.of(model, one, max_rows=1).scores([circuit])[0], got[p], atol=1e-4)


def test_a_metric_of_ones_own_on_whole_logits(any_model):
    pairs = token_prompts(2)
    ablated = Ablated.of(any_model, FourMembers(pairs))
    for p, (clean, corrupted) in enumerate(pairs):
        for prompt, scores in ((clean, ablated.clean), (corrupted, ablated.empty)):
            logits = any_model(prompt[None], return_type="logits").detach()
            assert scores[p] == pytest.approx(entropy(logits), abs=1e-4)


def test_measured_circuits_are_a_sweep_result(swapped, known):
    result = swapped.measure({"chain": Circuit.of(known[0], CHAIN), "nothing": Circuit.empty(known[0])})
    assert result.axes == {"circuit": ("chain", "nothing")}
    np.testing.assert_allclose(result.effect(), [1, 0], atol=1e-9)
    assert result.to_frame().shape[0] == 2 * 6
    assert result.provenance["outside"] == "paired"
    assert "chain" in result.summary()
    [ax] = result.plot().axes
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["chain", "nothing"]


# Known circuits


@pytest.mark.parametrize("corruption", ["s2_swap", "s2_rand"])
@pytest.mark.parametrize("outside", ["paired", "mean", "zero"])
def test_the_true_circuit_is_faithful_and_the_rest_is_not(known, corruption, outside):
    model, circuit = known
    ablated = Ablated.of(model, circuit.dataset(corruption), outside)
    true = Circuit.of_nodes(model, HEADS)
    assert faithfulness(ablated, true) == pytest.approx(1, abs=1e-9)
    assert faithfulness(ablated, true.complement()) == pytest.approx(0, abs=1e-9)
    imitators = Circuit.of_nodes(model, [head.replace("h0", "h1") for head in HEADS])
    assert faithfulness(ablated, imitators) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("corruption", "outside", "expected"),
    [
        ("s2_swap", "paired", 0),  # IO is inhibited in place of S: -5, as in the corrupted run
        ("s2_rand", "paired", -1 / 3),  # nothing is: one IO, two S, so 5/3 - 10/3 = -5/3; corrupted 0
        ("s2_rand", "zero", -1 / 3),
    ],
)
def test_the_model_without_its_inhibition_by_hand(known, corruption, outside, expected):
    model, circuit = known
    ablated = Ablated.of(model, circuit.dataset(corruption), outside)
    broken = Circuit.full(model).without(["a1.h0"])
    assert faithfulness(ablated, broken) == pytest.approx(expected, abs=1e-9)


def test_the_edges_of_the_true_circuit(known, swapped):
    """The four edges are enough, each is needed, and each has one position at which it counts."""
    model, _ = known
    assert faithfulness(swapped, Circuit.of(model, CHAIN)) == pytest.approx(1, abs=1e-9)
    for edge in CHAIN:
        broken = Circuit.of(model, [other for other in CHAIN if other != edge])
        assert faithfulness(swapped, broken) == pytest.approx(0, abs=1e-9)
    there = [f"{edge}@{at}" for edge, at in zip(CHAIN, ["S2", "S2", "END", "END"], strict=True)]
    assert faithfulness(swapped, Circuit.of(model, there)) == pytest.approx(1, abs=1e-9)
    elsewhere = [edge.replace("@S2", "@S1") for edge in there]
    assert faithfulness(swapped, Circuit.of(model, elsewhere)) == pytest.approx(0, abs=1e-9)


def test_the_true_circuit_is_complete_and_minimal(known, swapped):
    model, _ = known
    true = Circuit.of_nodes(model, HEADS)
    for search in ("random", "greedy"):
        found = completeness(swapped, true, search=search, samples=8)
        np.testing.assert_allclose(found.incompleteness, 0, atol=1e-9)
        assert found.gap == pytest.approx(10)
    assert len(completeness(swapped, true, search="greedy").subsets) == 4
    needed = minimality(swapped, true, samples=2)
    assert list(map(str, needed.nodes)) == HEADS
    np.testing.assert_allclose(needed.change, 10, atol=1e-9)
    with_more = Circuit.of_nodes(model, [*HEADS, "a1.h2"])
    frame = minimality(swapped, with_more, samples=4).to_frame()
    assert frame.node[0] == "a1.h2"
    assert frame.change[0] == pytest.approx(0, abs=1e-9)
    assert frame.share_of_gap[1] == pytest.approx(1)


def test_half_of_an_or_gate_is_faithful_and_incomplete():
    """x or y: x alone answers, and without x only the whole model does: |-5 - 5| is missing."""
    gate = or_gate()
    model = gate.model()
    ablated = Ablated.of(model, gate.dataset("both"))
    half, both = (Circuit.of_nodes(model, nodes) for nodes in (["a0.h0", "m0"], ["a0.h0", "a0.h1", "m0"]))
    assert faithfulness(ablated, half) == pytest.approx(1, abs=1e-9)
    found = completeness(ablated, half, [["a0.h0"], []])
    np.testing.assert_allclose(found.incompleteness, [10, 0], atol=1e-9)
    np.testing.assert_allclose([found.circuit[0], found.model[0]], [-5, 5], atol=1e-9)
    assert found.worst == (Node("head", 0, 0),)
    assert found.to_frame().nodes.tolist() == ["a0.h0", "none"]
    assert completeness(ablated, half, search="greedy").worst == (Node("head", 0, 0),)
    np.testing.assert_allclose(completeness(ablated, both, samples=20).incompleteness, 0, atol=1e-9)


def test_backups_are_needed_given_what_they_stand_in_for():
    gate = or_gate()
    model = gate.model()
    ablated = Ablated.of(model, gate.dataset("both"))
    both = Circuit.of_nodes(model, ["a0.h0", "a0.h1", "m0"])
    alone = minimality(ablated, both, samples=0)
    np.testing.assert_allclose(alone.change, [0, 0, 10], atol=1e-9)
    given = minimality(ablated, both, {"a0.h0": ["a0.h1"], "a0.h1": ["a0.h0"]}, samples=0)
    np.testing.assert_allclose(given.change, 10, atol=1e-9)
    assert given.given[:2] == ((Node("head", 0, 1),), (Node("head", 0, 0),))
    np.testing.assert_allclose(minimality(ablated, both, samples=10).change, 10, atol=1e-9)


def test_half_of_an_and_gate_is_not_faithful():
    gate = and_gate()
    model = gate.model()
    ablated = Ablated.of(model, gate.dataset("both"))
    assert faithfulness(ablated, Circuit.of_nodes(model, ["a0.h0", "m0"])) == pytest.approx(0, abs=1e-9)
    assert faithfulness(ablated, Circuit.of_nodes(model, ["a0.h0", "a0.h1", "m0"])) == pytest.approx(1)


def test_questions_refuse_what_is_not_in_the_circuit(known, swapped):
    true = Circuit.of_nodes(known[0], HEADS)
    with pytest.raises(
        SiteError, match=r"a1.h2: not in the circuit. Its heads and MLPs: a0.h0, a1.h0, a2.h0"
    ):
        completeness(swapped, true, [["a1.h2"]])
    with pytest.raises(SiteError, match="a2.h2: not in the circuit"):
        minimality(swapped, true, {"a2.h2": []})
    with pytest.raises(PatchingError, match="unknown search 'all'. Available: greedy, random"):
        completeness(swapped, true, search="all")
    with pytest.raises(PatchingError, match="unknown ablation 'noise'. Available: mean, paired, zero"):
        Ablated.of(known[0], known[1].dataset(), "noise")


def test_no_gap_is_said(known):
    model, circuit = known
    ablated = Ablated.of(model, circuit.dataset("order_swap"))
    with pytest.warns(PatchingWarning, match="faithfulness: the mean gap") as caught:
        assert np.isnan(faithfulness(ablated, Circuit.of_nodes(model, HEADS)))
    assert caught[0].filename == __file__


# Chance


def test_random_circuits_are_connected_and_of_the_size_asked_for():
    grouped = Graph(n_layers=3, n_heads=4, n_key_value_heads=2)
    for graph in (GRAPH, grouped):
        for size in (1, 4, 25, graph.n_edges):
            drawn = [random_circuit(graph, size, seed) for seed in range(5)]
            assert {len(circuit) for circuit in drawn} == {size}
            if size in (25, graph.n_edges):
                assert all(circuit.connected() == circuit for circuit in drawn)
    assert random_circuit(GRAPH, 25, 0) == random_circuit(GRAPH, 25, 0) != random_circuit(GRAPH, 25, 1)
    with pytest.raises(PatchingError, match=f"this model has {GRAPH.n_edges} edges"):
        random_circuit(GRAPH, 1000, 0)


def test_the_true_circuit_beats_chance_and_a_random_one_does_not(known, swapped):
    """p-values by hand: P(Bin(30, 0.9) >= 30) = 0.9 ** 30, and P(Bin(30, .9) >= 0) = 1."""
    model, _ = known
    true, arbitrary = Circuit.of(model, CHAIN), random_circuit(Graph.of(model), 4, 99)
    found = sufficiency(swapped, true, circuits=30)
    assert found.distance == pytest.approx(0, abs=1e-9)
    assert (found.random > 1).all()
    assert found.wins == 30
    assert found.p_value == pytest.approx(0.9**30)
    assert sufficiency(swapped, arbitrary, circuits=30).p_value == pytest.approx(1)
    needed = partial_necessity(swapped, true, circuits=30)
    assert needed.distance == pytest.approx(10)
    assert needed.wins == (needed.random < 10).sum() > 20
    assert f"better than {needed.wins} of 30 random circuits" in needed.summary()
    assert partial_necessity(swapped, arbitrary, circuits=30).wins == 0


def test_what_the_tests_refuse(known, swapped):
    placed = Circuit.of(known[0], ["input->logits@END"])
    with pytest.raises(PatchingError, match=r"(?s)quantile=1 .*circuits=0 .*drawn without positions"):
        sufficiency(swapped, placed, quantile=1, circuits=0)


# Building

SCORES = {"m1->logits": 0.5, "input->m1": -2.0, "input->logits": 0.1, "m0->m1": 1.0, "input->m0": 0.2,
          "a0.h0->a1.h0<q>": 3.0}  # fmt: skip


def test_thresholds_and_the_strongest_edges_by_hand():
    assert names(threshold(GRAPH, SCORES, 0.5, absolute=False)) == ["a0.h0->a1.h0<q>", "m0->m1", "m1->logits"]
    assert "input->m1" in threshold(GRAPH, SCORES, 0.5, absolute=True)
    assert names(top(GRAPH, SCORES, 2, absolute=True)) == ["a0.h0->a1.h0<q>", "input->m1"]
    assert names(top(GRAPH, SCORES, 2, absolute=False)) == ["a0.h0->a1.h0<q>", "m0->m1"]
    ties = dict.fromkeys(reversed(GRAPH.edges), 1.0)
    assert list(top(GRAPH, ties, 3, absolute=True)) == list(GRAPH.edges[:3])
    with pytest.raises(PatchingError, match="n=7: there are 6 scored edges"):
        top(GRAPH, SCORES, 7, absolute=True)
    with pytest.raises(SiteError, match="no node a9.h0"):
        top(GRAPH, {"a9.h0->logits": 1.0}, 1, absolute=True)


def test_greedy_grows_from_the_logits():
    """.5 into the logits, then of what can be reached: 2 (in size) into m1; 1 into m1; and so on."""
    assert names(greedy(GRAPH, SCORES, 2, absolute=True)) == ["input->m1", "m1->logits"]
    assert names(greedy(GRAPH, SCORES, 3, absolute=True)) == ["input->m1", "m1->logits"]  # m0 is not fed yet
    four = greedy(GRAPH, SCORES, 4, absolute=True)
    assert names(four) == ["input->m0", "input->m1", "m0->m1", "m1->logits"]
    signed = greedy(GRAPH, SCORES, 3, absolute=False)
    assert names(signed) == ["input->m0", "m0->m1", "m1->logits"]
    assert "a0.h0->a1.h0<q>" not in greedy(GRAPH, SCORES, 6, absolute=True)  # on no path


def test_the_true_circuit_is_built_from_the_effects_of_edges(known, swapped):
    """Every edge knocked out by itself: the effects are exact, and the four strongest are the circuit."""
    model, _ = known
    whole = Circuit.full(model)
    scores = swapped.scores([Circuit(whole.graph, whole.edges - {edge}) for edge in whole]).mean(-1)
    effects = {edge: (5 - score) / 10 for edge, score in zip(whole, scores, strict=True)}
    strong = {str(edge): effect for edge, effect in effects.items() if abs(effect) > 1e-9}
    # the other name at S2 is a key like any other, and draws half of the attention
    assert strong == pytest.approx({**dict.fromkeys(CHAIN, 1), "input->a2.h0<k>": 1 / 2})
    chain = Circuit.of(model, CHAIN)
    assert threshold(model, effects, 0.75, absolute=True) == chain
    assert top(model, effects, 4, absolute=False) == chain
    assert greedy(model, effects, 4, absolute=True) == chain


# The curve


def test_areas_by_hand():
    """CPR of f = .5, 1 over .1 to 1: .9 * .75; CMD: .9 * .25. f = 1.5 is .5 away from 1."""
    assert area([0.1, 1], [0.5, 1]) == pytest.approx(0.675)
    assert area([0.1, 1], np.abs(1 - np.array([1.5, 1]))) == pytest.approx(0.225)
    assert area(FRACTIONS, np.ones(10)) == pytest.approx(0.999)


def test_the_curve_of_the_true_circuit(known, swapped):
    """The four edges of the circuit are ranked first, so f is 0 until they are all there and 1 after.

    The model has n edges: at a fraction k there are int(kn), and the trapezoid between the last
    fraction below 4 / n and the first above is half.
    """
    model, _ = known
    scores = {str(edge): float(str(edge) in CHAIN) for edge in Graph.of(model).edges}
    found = curve(swapped, scores, absolute=True)
    n = len(scores)
    there = np.array([int(k * n) >= 4 for k in FRACTIONS])
    assert 0 < there.sum() < len(there)
    np.testing.assert_allclose(found.faithfulness, there, atol=1e-9)
    last, first = (FRACTIONS[i] for i in (there.argmax() - 1, there.argmax()))
    assert found.cpr == pytest.approx((1 - first) + (first - last) / 2)
    assert found.cmd == pytest.approx((last - 0.001) + (first - last) / 2)
    assert found.faithfulness[-1] == 1
    twice = found.result.patched + (found.result.patched - swapped.empty)
    beyond = replace(found, result=replace(found.result, patched=twice))  # f is 0 or 2: 1 away from 1
    assert beyond.cmd == pytest.approx(0.999)
    assert beyond.cpr == pytest.approx(2 * found.cpr)
    frame = found.to_frame()
    assert frame.edges.tolist()[-1] == n
    assert frame.columns.tolist() == ["fraction", "edges", "faithfulness"]


def test_signs_count_only_if_absolute_says_so(known, swapped):
    model, _ = known
    scores = {str(edge): -float(str(edge) in CHAIN) for edge in Graph.of(model).edges}
    by_size, signed = (curve(swapped, scores, absolute=absolute).faithfulness for absolute in (True, False))
    assert by_size[-3] == pytest.approx(1)
    assert signed[-3] == pytest.approx(0, abs=1e-9)
    with pytest.raises(PatchingError, match="they grow, and lie between 0 and 1"):
        curve(swapped, scores, absolute=True, fractions=[0.5, 0.1])


def test_an_adder_is_faithful_in_shares():
    """x carries a quarter, y three quarters."""
    gate = adder()
    model = gate.model()
    ablated = Ablated.of(model, gate.dataset("both"))
    assert faithfulness(ablated, Circuit.of_nodes(model, ["a0.h0"])) == pytest.approx(1 / 4)
    assert faithfulness(ablated, Circuit.of_nodes(model, ["a0.h1"])) == pytest.approx(3 / 4)


def test_means_are_those_of_the_template():
    """Two templates: the mean of a pair's own is written, not that of all pairs."""
    model = (hooked if HookedTransformer is not None else native)()
    prompts = token_prompts(4)
    pairs = [PromptPair(c, d, 5, 6, template="ab"[i // 2]) for i, (c, d) in enumerate(prompts)]
    ablated = Ablated.of(model, PromptPairDataset(model, pairs), "mean")
    halves = [Ablated.of(model, PromptPairDataset(model, pairs[i : i + 2]), "mean") for i in (0, 2)]
    np.testing.assert_allclose(ablated.empty, np.concatenate([h.empty for h in halves]), atol=1e-5)
    assert ablated.empty[0] == pytest.approx(ablated.empty[1], abs=1e-5)
    assert abs(ablated.empty[0] - ablated.empty[2]) > 1e-3


def test_answers_of_several_tokens_are_refused_before_the_first_run():
    model = model_of("native")
    pair = PromptPair(*token_prompts(1, 6)[0], correct=((5, 6),), incorrect=((7, 8),))
    dataset, runs = PromptPairDataset(model, [pair]), []
    handle = model.register_forward_pre_hook(lambda *given: runs.append(given))
    try:
        with pytest.raises(MetricError, match="circuits do not run"):
            Ablated.of(model, dataset)
    finally:
        handle.remove()
    assert not runs
