"""Task files, filled templates, roles, answers, and every way a task can be wrong."""

import random
import re
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from patching import IOIDataset, PatchingDataset
from patching.dataset import batched_metric
from patching.errors import PairError, TaskError
from patching.metrics import METRICS
from patching.tasks import TemplateDataset, bundled_tasks, load_task, read_task
from patching.tasks.dataset import _folder
from patching.tiny import build_tokenizer, facts, load_tiny

TASKS = ["country_capital", "gendered_pronoun", "greater_than", "induction", "ioi", "sva"]


@pytest.fixture(scope="module")
def tiny():
    return load_tiny()


def with_tokenizer(tokenizer):
    """What a task needs of a model: its tokenizer, with BOS put in front."""

    def to_tokens(text, prepend_bos=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor([[tokenizer.bos_token_id] * prepend_bos + ids])

    def to_str_tokens(text):
        return tokenizer.convert_ids_to_tokens(to_tokens(text)[0].tolist())

    return SimpleNamespace(tokenizer=tokenizer, to_tokens=to_tokens, to_str_tokens=to_str_tokens)


# What each task asks, written out by hand. Upper-case names stand for the pair's own fillers; the
# positions count BOS as 0 and every word, comma and pair of digits as one token.
CASES = [
    (
        "ioi",
        "s2_swap",
        "went_abba",
        "Then, {IO} and {S1} went to the {PLACE}. {S1} gave a {OBJECT} to",
        "Then, {IO} and {S1} went to the {PLACE}. {IO} gave a {OBJECT} to",
        {"IO": (3,), "S1": (5,), "S1+1": (6,), "S2": (11,), "END": (15,)},
    ),
    (
        "ioi",
        "order_swap",
        "place_first_baba",
        "The {PLACE} {S1} and {IO} went to had a {OBJECT}. {S1} gave it to",
        "The {PLACE} {IO} and {S1} went to had a {OBJECT}. {S1} gave it to",
        {"IO": (5,), "S1": (3,), "S1+1": (4,), "S2": (12,), "END": (15,)},
    ),
    (
        "greater_than",
        "yy_01",
        "lasted",
        "The {NOUN} lasted from the year {XX}{YY} to the year {XX}",
        "The {NOUN} lasted from the year {XX}01 to the year {XX}",
        {"NOUN": (2,), "XX": (7,), "YY": (8,), "XX2": (12,), "END": (12,)},
    ),
    (
        "induction",
        "swap_answer",
        "second_6",
        " {F1} {A} {B} {C} {D} {F2} {F1} {A}",
        " {F1} {A} {D} {C} {B} {F2} {F1} {A}",
        {"A": (2,), "B": (3,), "C": (4,), "D": (5,), "A2": (8,), "END": (8,)},
    ),
    (
        "induction",
        "swap_cue",
        "start_5",
        " {A} {B} {F1} {C} {D} {A}",
        " {C} {B} {F1} {A} {D} {A}",
        {"A": (1,), "B": (2,), "C": (4,), "D": (5,), "A2": (6,), "END": (6,)},
    ),
]


@pytest.mark.parametrize(("task", "corruption", "template", "clean", "corrupted", "roles"), CASES)
def test_prompts_and_roles_are_the_ones_written_out(
    tiny, task, corruption, template, clean, corrupted, roles
):
    dataset = load_task(task, tiny, n_pairs=5, corruption=corruption, templates=[template])

    for i, pair in enumerate(dataset.get_clean_corrupt_pairs()):
        fillers = dataset.fillers(i)
        assert pair == (clean.format(**fillers), corrupted.format(**fillers))
        assert dataset.roles(i) == roles
        assert dataset.template(i) == template


@pytest.mark.parametrize("task", TASKS)
def test_roles_point_at_their_words(tiny, task):
    dataset = load_task(task, tiny, n_pairs=36)

    for i, (clean, _) in enumerate(dataset.get_clean_corrupt_pairs()):
        words = tiny.to_str_tokens(clean)
        row = {**dataset.fillers(i)}
        for role, at in dataset.roles(i).items():
            if role == "END":
                assert at == (len(words) - 1,)
            elif "+" not in role and role != "CITY":  # a CITY shows as its country in some templates
                assert [words[p] for p in at] == [row[role]]


def answer_words(model, answers):
    return tuple(model.tokenizer.convert_ids_to_tokens(list(ids)) for ids in answers)


@pytest.mark.parametrize("corruption", ["s2_swap", "s2_rand", "abc", "order_swap"])
def test_ioi_asks_for_the_name_that_is_not_repeated(tiny, corruption):
    dataset = IOIDataset(tiny, n_pairs=30, corruption=corruption)

    for i, (clean, corrupted) in enumerate(dataset.get_clean_corrupt_pairs()):
        io, s = dataset.fillers(i)["IO"], dataset.fillers(i)["S1"]
        answers = dataset.answers(i)
        assert answer_words(tiny, (answers.correct, answers.incorrect)) == ([io], [s])
        assert dataset.get_target_tokens(i) == (*answers.correct, *answers.incorrect)
        before, after = clean.replace(".", "").split(), corrupted.replace(".", "").split()
        changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
        if corruption == "s2_swap":
            assert changed == [(s, io)]
        elif corruption == "s2_rand":
            assert len(changed) == 1
            assert changed[0][0] == s
            assert changed[0][1] not in (s, io)
        elif corruption == "abc":
            new = [b for _, b in changed]
            assert len(set(new)) == 3
            assert not set(new) & {io, s}
        else:
            assert sorted(changed) == sorted([(io, s), (s, io)])


def test_greater_than_splits_the_hundred_endings_at_the_year(tiny):
    dataset = load_task("greater_than", tiny, n_pairs=10)

    for i in range(10):
        year = int(dataset.fillers(i)["YY"])
        correct, incorrect = answer_words(tiny, (dataset.answers(i).correct, dataset.answers(i).incorrect))
        assert [int(w) for w in correct] == list(range(year + 1, 100))
        assert [int(w) for w in incorrect] == list(range(0, year + 1))


def test_pronouns_verbs_and_capitals(tiny):
    pronoun = load_task("gendered_pronoun", tiny, n_pairs=40, templates=["great"])
    for i, (clean, corrupted) in enumerate(pronoun.get_clean_corrupt_pairs()):
        sides = answer_words(tiny, (pronoun.answers(i).correct, pronoun.answers(i).incorrect))
        assert sorted(sides) == [["he"], ["she"]]
        if clean.startswith("So Mary "):
            assert sides == (["she"], ["he"])
        if corrupted.startswith("So Mary "):
            assert sides == (["he"], ["she"])

    verbs = load_task("sva", tiny, n_pairs=40, templates=["near"])
    for i, (clean, corrupted) in enumerate(verbs.get_clean_corrupt_pairs()):
        subject, other = clean.split()[1], corrupted.split()[1]
        correct, incorrect = answer_words(tiny, (verbs.answers(i).correct, verbs.answers(i).incorrect))
        plural = subject.endswith("s")
        assert other == (subject[:-1] if plural else subject + "s")
        assert ("are" in correct, "is" in correct) == (plural, not plural)
        assert len(correct) == len(incorrect) == 16

    capital = load_task("country_capital", tiny, n_pairs=60, templates=["comma", "capital_is"])
    for i, (clean, _) in enumerate(capital.get_clean_corrupt_pairs()):
        correct, _ = answer_words(tiny, (capital.answers(i).correct, capital.answers(i).incorrect))
        if clean == " Paris, the capital of":
            assert correct == ["France"]
        if clean == "The capital of Japan is":
            assert correct == ["Tokyo"]


@pytest.mark.parametrize("task", TASKS)
def test_every_corruption_of_every_task_makes_aligned_different_pairs(tiny, task):
    definition = read_task(_folder() / f"{task}.toml")
    assert definition.sources
    assert definition.description

    for name, corruption in definition.corruptions.items():
        dataset = load_task(task, tiny, n_pairs=20, corruption=name)
        pairs = dataset.get_clean_corrupt_pairs()
        assert corruption.description.endswith(".")
        assert len(set(pairs)) == len(pairs) == len(dataset) == 20
        assert not dataset.removed
        for i, (clean, corrupted) in enumerate(pairs):
            assert clean != corrupted
            assert tiny.to_tokens(clean).shape == tiny.to_tokens(corrupted).shape
            assert not set(dataset.answers(i).correct) & set(dataset.answers(i).incorrect)


def test_ioi_templates_are_fifteen_frames_in_both_orders():
    templates = read_task(_folder() / "ioi.toml").templates

    frames = {name.removesuffix("_abba") for name in templates if name.endswith("_abba")}
    assert len(frames) == 15
    assert set(templates) == {f"{frame}_{order}" for frame in frames for order in ("abba", "baba")}


def test_the_dataset_scores_with_the_metric_of_its_task(tiny):
    ioi = IOIDataset(tiny, n_pairs=1)
    correct, incorrect = ioi.get_target_tokens(0)
    logits = torch.zeros(1, 4, tiny.cfg.d_vocab)
    logits[0, -1, correct], logits[0, -1, incorrect] = 3.0, 1.0
    assert ioi.compute_metric(logits, 0) == pytest.approx(2.0)
    assert batched_metric(ioi) is METRICS["logit_diff"]

    years = load_task("greater_than", tiny, n_pairs=1)
    logits = torch.full((1, 4, tiny.cfg.d_vocab), -torch.inf)
    logits[0, -1, [*years.answers(0).correct[:3], years.answers(0).incorrect[0]]] = 0.0
    assert years.compute_metric(logits, 0) == pytest.approx(3 / 4 - 1 / 4)
    assert batched_metric(years) is METRICS["prob_diff"]


def test_the_seed_alone_decides_and_the_global_generators_stay(tiny):
    torch_state, python_state = torch.random.get_rng_state(), random.getstate()

    first = IOIDataset(tiny, seed=3).get_clean_corrupt_pairs()

    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    random.seed(1)
    assert IOIDataset(tiny, seed=3).get_clean_corrupt_pairs() == first
    assert IOIDataset(tiny, seed=4).get_clean_corrupt_pairs() != first


def test_tasks_load_by_name_and_by_path(tiny, tmp_path):
    assert bundled_tasks() == TASKS
    dataset = PatchingDataset.load("ioi", tiny, n_pairs=3, corruption="abc", seed=5)
    assert isinstance(dataset, IOIDataset)
    assert dataset.name == "ioi"
    assert dataset.parameters["n_pairs"] == 3
    assert dataset.parameters["corruption"] == "abc"
    assert dataset.parameters["seed"] == 5

    path = tmp_path / "mine.toml"
    path.write_text(MINIMAL)
    mine = PatchingDataset.load(str(path), tiny, n_pairs=2)
    assert mine.name == "mine"
    assert mine.parameters["templates"] == ["likes"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: load_task("oii", m), r"unknown task 'oii'\. Available: country_capital, .* sva\."),
        (
            lambda m: IOIDataset(m, corruption="s3"),
            "unknown corruption 's3'. Available: abc, order_swap, s2_rand, s2_swap.",
        ),
        (lambda m: IOIDataset(m, templates=["gone"]), "unknown template 'gone'. Available: after_abba"),
        (lambda m: IOIDataset(m, templates=[]), "templates is empty"),
        (
            lambda m: load_task("ioi", m, pairs=3),
            "unknown task parameter 'pairs'. Available: corruption, n_pairs, seed, templates.",
        ),
        (lambda m: IOIDataset(m, n_pairs=0), "n_pairs should be a whole number from 1 up, got 0"),
        (lambda m: load_task("gone.toml", m), "no task file at gone.toml. Bundled tasks: country_capital"),
        (lambda m: IOIDataset(SimpleNamespace(tokenizer=None)), "this model has no tokenizer"),
        (
            lambda m: load_task("sva", m, n_pairs=200, templates=["simple"]),
            r"after 48 pairs, 300 draws from the template 'simple' gave no new pair\. Ask for fewer pairs",
        ),
    ],
)
def test_wrong_requests_say_what_exists(tiny, call, message):
    with pytest.raises(TaskError, match=message):
        call(tiny)


# Tokenizers that split words


def test_words_that_the_tokenizer_does_not_keep_whole_are_left_out_and_listed(tiny):
    vocabulary = [w for w in facts()["vocabulary"] if w not in ("Mary", "John")]
    model = with_tokenizer(build_tokenizer(vocabulary))

    dataset = IOIDataset(model, n_pairs=40)

    assert dataset.removed == {"names": ("John", "Mary")}  # in the order of the task file
    texts = " ".join(text for pair in dataset.get_clean_corrupt_pairs() for text in pair)
    assert "Mary" not in texts
    assert "John" not in texts


def test_too_few_words_are_an_error(tiny):
    names = {row["word"] for row in read_task(_folder() / "ioi.toml").words["names"].rows}
    vocabulary = [w for w in facts()["vocabulary"] if w not in names - {"Mary", "John"}]
    model = with_tokenizer(build_tokenizer(vocabulary))

    with pytest.raises(TaskError, match="'names' has no word left for another word in slot S2; 2 of its 99"):
        IOIDataset(model, corruption="s2_rand")


def test_words_that_merge_with_their_neighbour_are_not_drawn(tiny):
    tokenizer = build_tokenizer([*facts()["vocabulary"], "1744", "1301"])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Split(Regex(r"1744|1301|\d{2}"), "isolated")]
    )
    model = with_tokenizer(tokenizer)

    dataset = load_task("greater_than", model, n_pairs=600, templates=["lasted"])

    assert set(dataset.removed) == {"combinations"}
    assert set(dataset.removed["combinations"]) == {"1744", "1301"}
    text = " ".join(t for pair in dataset.get_clean_corrupt_pairs() for t in pair)
    assert "year 1744" not in text
    assert "year 1301" not in text  # every corrupted prompt of the 13th hundred would be
    assert "year 1401" in text


def test_a_frame_with_unknown_words_is_an_error(tiny, tmp_path):
    with pytest.raises(TaskError, match=r"'likes': this model's tokenizer does not know \['adores'\]"):
        TemplateDataset(written(tmp_path, MINIMAL.replace("{A} liked", "{A} adores")), tiny)


def test_roles_on_a_byte_level_tokenizer(tiny):
    """As in GPT-2, a token starts with the space before its word."""
    prompts = [t for pair in IOIDataset(tiny, n_pairs=300).get_clean_corrupt_pairs() for t in pair]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(prompts, trainers.BpeTrainer(vocab_size=3000, special_tokens=["<bos>"]))
    model = with_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>"))

    dataset = IOIDataset(model, n_pairs=2, templates=["went_abba", "argument_baba"])

    assert dataset.roles(0) == {"IO": (3,), "S1": (5,), "S1+1": (6,), "S2": (11,), "END": (15,)}
    assert dataset.roles(1) == {"S1": (3,), "S1+1": (4,), "IO": (5,), "S2": (13,), "END": (15,)}
    words = model.to_str_tokens(dataset.get_clean_corrupt_pairs()[0][0])
    assert words[3] == "Ġ" + dataset.fillers(0)["IO"]
    assert words[11] == "Ġ" + dataset.fillers(0)["S1"]


def test_pairs_of_unequal_length_are_all_listed_with_their_tokens(tmp_path):
    model = with_tokenizer(build_tokenizer([*facts()["vocabulary"], "-"]))  # a name-name is three tokens
    path = written(tmp_path, UNEQUAL)

    with pytest.raises(PairError) as caught:
        TemplateDataset(path, model, n_pairs=2)

    first, *rest = str(caught.value).split("pair 1: ")
    assert len(rest) == 1  # both pairs are in the message
    lengths = re.match(r"pair 0: clean has (\d+) tokens, corrupted (\d+); patching by position", first)
    assert sorted(lengths.groups()) == ["5", "7"]
    assert "['<bos>', 'Mary', 'went', 'to', 'the']" in first
    assert "['<bos>', 'John', '-', 'James', 'went', 'to', 'the']" in first


# Task files that do not read


def written(folder, text):
    path = folder / "task.toml"
    path.write_text(text)
    return path


UNEQUAL = """
name = "unequal"
description = "Somebody goes somewhere."
sources = []
metric = "logit_diff"
corruption = "other"
roles = ["WHO"]
[slots]
WHO = "people"
WHERE = "places"
ELSEWHERE = "places"
[answers]
correct = { clean = "WHERE" }
incorrect = { clean = "ELSEWHERE" }
[templates]
went = "{WHO} went to the"
[corruptions.other]
label = "preserves"
description = "Somebody else."
replace = { WHO = { fresh = "people" } }
[words]
places = ["store", "school"]
[words.people]
columns = ["word"]
rows = [["Mary"], ["John-James"]]
single_token = false
"""

MINIMAL = """
name = "mine"
description = "Who is liked?"
sources = ["here"]
metric = "logit_diff"
corruption = "swap"
roles = ["A", "B", "A2"]
[slots]
A = "people"
B = "people"
A2 = "A"
[answers]
correct = { clean = "B" }
incorrect = { clean = "A" }
[templates]
likes = "{A} liked {B}. {A2} liked"
[corruptions.swap]
label = "flips"
description = "The other one comes second."
replace = { A2 = "B" }
[words]
people = ["Mary", "John", "James"]
"""


def test_a_task_is_a_file(tiny, tmp_path):
    dataset = TemplateDataset(written(tmp_path, MINIMAL), tiny, n_pairs=3)

    for i, pair in enumerate(dataset.get_clean_corrupt_pairs()):
        a, b = dataset.fillers(i)["A"], dataset.fillers(i)["B"]
        assert pair == (f"{a} liked {b}. {a} liked", f"{a} liked {b}. {b} liked")
        assert dataset.roles(i) == {"A": (1,), "B": (3,), "A2": (5,), "END": (6,)}


def test_the_example_of_the_card_runs(tiny, tmp_path):
    card = (_folder() / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", card, flags=re.DOTALL)

    dataset = TemplateDataset(written(tmp_path, example), tiny, n_pairs=5)

    a, b = dataset.fillers(0)["A"], dataset.fillers(0)["B"]
    assert dataset.get_clean_corrupt_pairs()[0] == (f"{a} liked {b}. {a} liked", f"{a} liked {b}. {b} liked")


BROKEN = [
    ('name = "mine"', "name = mine", "not a TOML file"),
    ('name = "mine"', 'nam = "mine"', r"unknown key 'nam'\. Available: answers, .*words\."),
    ('name = "mine"', 'nam = "mine"', "the key 'name' is missing"),
    ('name = "mine"', "name = 3", "name should be a text, got 3"),
    ('["here"]', '"here"', "sources should be a list, got 'here'"),
    ('["here"]', "[1]", r"sources: expected a list of texts, got \[1\]"),
    ('"logit_diff"', '"logit_dif"', "metric: unknown metric 'logit_dif'. Available: accuracy, log_prob"),
    ('"logit_diff"', '"kl_div"', "metric: unknown metric 'kl_div'"),
    ('corruption = "swap"', 'corruption = "swop"', "unknown corruption 'swop'. Available: swap."),
    ('"A", "B", "A2"]', '"A", "C"]', "roles: unknown slot 'C'. Available: A, A2, B."),
    ('B = "people"', 'B = "persons"', "B: unknown word list or slot 'persons'. Available: A, people."),
    ('{ clean = "B" }', '{ clean = "C" }', r"\[answers\] correct: unknown slot 'C'"),
    ('{ clean = "B" }', '{ clean = "B.age" }', "unknown column of people 'age'. Available: word."),
    ('{ clean = "B" }', '{ cleen = "B" }', r"expected \{ clean = SLOT \}, .* got \{'cleen': 'B'\}"),
    ('{ clean = "B" }', '{ words = "people", above = "B" }', r"compare numbers, but .*\['Mary', 'John'"),
    ('{ clean = "B" }', '{ words = "nobody", same = "B" }', "unknown word list 'nobody'. Available: people"),
    ('{ clean = "B" }', "{ clean = 5 }", r"expected \{ clean = SLOT \}, .* got \{'clean': 5\}"),
    ('"{A} liked {B}', '"{A} liked {C}', r"\[templates\] likes: unknown slot 'C'"),
    ('"{A} liked {B}', '"{A liked {B}', r"\[templates\] likes: a brace without its partner"),
    ('label = "flips"', 'label = "turns"', "unknown label 'turns'. Available: destroys, flips, preserves."),
    ('{ A2 = "B" }', "{}", r"\[corruptions.swap\]: replace is empty"),
    ('{ A2 = "B" }', '{ A3 = "B" }', r"\[corruptions.swap\]: unknown slot 'A3'"),
    ('{ A2 = "B" }', '{ A2 = "C" }', r"\[corruptions.swap\]: unknown slot 'C'"),
    ('{ A2 = "B" }', '{ A2 = { frsh = "people" } }', "unknown key 'frsh'. Available: differ, fresh, same."),
    ('{ A2 = "B" }', '{ A2 = { fresh = "people", differ = "age" } }', "unknown column of people 'age'"),
    ('"Mary", "John", "James"]', '"Mary", 3]', r"\[words\] people: expected a list of texts"),
    (
        'people = ["Mary", "John", "James"]',
        'people = { columns = ["name", "age"], rows = [["Mary"]] }',
        r"\[words.people\]: the row \['Mary'\] should have 2 words: \['name', 'age'\]",
    ),
    (
        'people = ["Mary", "John", "James"]',
        'people = { columns = ["name"], rows = [["Mary"]], key = "age" }',
        r"\[words.people\]: unknown key 'age'\. Available: name\.",
    ),
    (
        'people = ["Mary", "John", "James"]',
        "people = { columns = [], rows = [] }",
        r"\[words.people\]: columns is empty; name at least one\.",
    ),
]


@pytest.mark.parametrize(("right", "wrong", "message"), BROKEN)
def test_a_broken_file_says_where_and_what_is_allowed(tmp_path, right, wrong, message):
    assert right in MINIMAL

    with pytest.raises(TaskError, match=r"^task\.toml: ") as caught:
        read_task(written(tmp_path, MINIMAL.replace(right, wrong)))

    assert re.search(message, str(caught.value)), str(caught.value)


def test_everything_wrong_with_a_file_is_said_at_once(tmp_path):
    text = MINIMAL.replace('["here"]', "[1]").replace('label = "flips"', 'label = "turns"')

    with pytest.raises(TaskError, match=r"sources: .*(\n.*)*unknown label 'turns'"):
        read_task(written(tmp_path, text))


def test_answers_that_overlap_are_an_error(tiny, tmp_path):
    text = MINIMAL.replace('incorrect = { clean = "A" }', 'incorrect = { clean = "B" }')

    with pytest.raises(TaskError, match="'(Mary|John|James)' is a correct and an incorrect answer at once"):
        TemplateDataset(written(tmp_path, text), tiny)


def test_a_corruption_that_changes_nothing_in_a_template_is_an_error(tiny, tmp_path):
    text = MINIMAL.replace("[corruptions.swap]", 'knows = "{A} knows {B}. They know"\n[corruptions.swap]')

    with pytest.raises(TaskError, match=r"changes nothing in the templates \['knows'\]; use .*'likes'"):
        TemplateDataset(written(tmp_path, text), tiny)
