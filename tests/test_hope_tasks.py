"""Data and scores of the Hope example's tasks, against answers worked out symbol by symbol."""

import io
import itertools
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from random import Random

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from home_assistant_intents import get_intents
from num2words import num2words

from examples.hope import data
from examples.hope.tasks import (
    IGNORED,
    Batch,
    Formal,
    Intents,
    Languages,
    Mad,
    Needle,
    Recall,
    Task,
    Text,
    base,
    compression,
    continual,
    counted,
    forward_transfer,
    fuzzy_recall,
    in_context_recall,
    mean_interval,
    memorisation,
    needle,
    noisy_recall,
    parity,
    repeated,
    selective_copy,
    sentences,
    shuffled,
    wilson,
)
from examples.hope.tasks.intents import WORDS


def corpus(letters: bytes = b"abcdefgh", size: int = 3000) -> data.Corpus:
    """Training bytes are small letters, held-out ones are capitals."""
    draw = torch.randint(len(letters), (2, size), generator=torch.Generator().manual_seed(0))
    train, valid = (
        torch.tensor(list(letters))[draw[0]],
        torch.tensor(list(letters.upper()))[draw[1]],
    )
    return data.Corpus(train.byte(), valid.byte(), "0" * 64, 2 * size, "3.11", "letters")


CORPUS = corpus()
TASKS: dict[str, Callable[[], Task]] = {
    "mqar": partial(Recall, pairs=4, vocabulary=64, length=32, tests=40),
    "overwriting": partial(Recall, pairs=6, vocabulary=64, length=48, updates=3, tests=40),
    "in_context_recall": partial(in_context_recall, examples=60),
    "odd length": partial(in_context_recall, length=31, examples=60),
    "noisy_recall": partial(noisy_recall, examples=60),
    "fuzzy_recall": partial(fuzzy_recall, examples=60),
    "selective_copy": partial(selective_copy, length=48, copied=6, examples=60),
    "compression": partial(compression, length=8, examples=60),
    "memorisation": partial(memorisation, vocabulary=32, length=9, examples=60),
    "parity": parity,
    "(aa)*": partial(repeated, "aa"),
    "(abab)*": partial(repeated, "abab"),
    "a^nb^n": partial(counted, 2, longest=10),
    "a^nb^nc^n": partial(counted, 3, longest=10),
    "shuffle-2": partial(shuffled, longest=12),
    "repeated": partial(Needle, CORPUS, "repeated", length=96, tests=3, depths=(0.0, 0.3, 1.0)),
    "text": partial(Needle, CORPUS, "text", length=96, tests=3, asked_only=True),
    "hexadecimal": partial(Needle, CORPUS, "hexadecimal", length=160, tests=3, lengths=(160, 400)),
    "language model": partial(Text, CORPUS, length=16, tests=32),
}


@cache
def task(name: str) -> Task:
    return TASKS[name]()


def dictionary(row: list[int], shown: int) -> list[int]:
    """Answers to the queries behind the first `shown` pairs."""
    newest = dict(zip(row[0 : 2 * shown : 2], row[1 : 2 * shown : 2], strict=True))
    return [
        newest.get(token, IGNORED) if place >= 2 * shown else IGNORED
        for place, token in enumerate(row)
    ]


def recalled(row: list[int], keys: int, values: int) -> list[int]:
    """Tokens of every value whose key came before; keys and values may have several tokens."""
    answers, known, place = [IGNORED] * len(row), {}, 0
    while place < len(row):
        start = place
        while place < len(row) and row[place] < keys:
            place += 1
        key, middle = tuple(row[start:place]), place
        while place < len(row) and keys <= row[place] < values:
            place += 1
        value = row[middle:place]
        if key in known:
            # At the right edge a value is cut, but its next token is asked.
            asked = known[key][: len(row) - middle + 1]
            answers[middle - 1 : middle - 1 + len(asked)] = asked
        elif key:
            known[key] = value
        if start == place:
            place += 1
    return answers


def one_by_one(row: list[int], keys: int, values: int) -> list[int]:
    """The same for single tokens; what is neither a key nor a value is noise."""
    answers, known = [IGNORED] * len(row), {}
    for place in range(0, len(row), 2):
        if row[place] >= values:
            continue
        if row[place] in known:
            answers[place] = known[row[place]]
        elif place + 1 < len(row):
            known[row[place]] = row[place + 1]
    return answers


def copied(row: list[int], blank: int, behind: int) -> list[int]:
    tokens = [token for token in row[:behind] if token < blank]
    return [IGNORED] * (len(row) - len(tokens)) + tokens


def automaton(name: str, row: list[int]) -> list[int]:
    """The state after every symbol, from what was read so far and from the sizes of blocks."""
    string = row[: row.index(0)] if 0 in row else row
    states: list[int] = []
    for end in range(1, len(string) + 1):
        read = string[:end]
        if name == "parity":
            states.append(int(read.count(2) % 2 == 0))
        elif name in ("(aa)*", "(abab)*"):
            word = [1, 1] if name == "(aa)*" else [1, 2, 1, 2]
            states.append(int(read == word * (end // len(word))))
        elif name == "shuffle-2":
            opened = [read.count(1) - read.count(2), read.count(3) - read.count(4)]
            assert min(opened) >= 0
            states.append((opened[0] > 0) + 2 * (opened[1] > 0))
        elif read[-1] == 1:
            states.append(0)
        else:
            states.append(read[-1] - (read.count(read[-1]) < read.count(1)))
    return states + [IGNORED] * (len(row) - len(string))


def told(row: list[int], digits: int) -> list[int]:
    """The digits of a needle's word, where the question asks them."""
    text = bytes(row)
    word = text[text.rindex(b"The key of ") :][11:16]
    place = text.index(b"\nThe key of " + word + b" is ") + 21
    assert text[place + digits : place + digits + 2] == b".\n"
    return [IGNORED] * (len(row) - digits) + row[place : place + digits]


TABLE = {
    place: int(value)
    for batch in itertools.islice(task("memorisation").batches(16, 9), 8)
    for row, asked in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)
    for place, value in zip(row[0:8:2], asked[1:9:2], strict=True)
}
ORACLES: dict[str, Callable[[list[int]], list[int]]] = {
    "mqar": partial(dictionary, shown=4),
    "overwriting": partial(dictionary, shown=9),
    "in_context_recall": partial(one_by_one, keys=8, values=16),
    "odd length": partial(one_by_one, keys=8, values=16),
    "noisy_recall": partial(one_by_one, keys=8, values=16),
    "fuzzy_recall": partial(recalled, keys=8, values=16),
    "selective_copy": partial(copied, blank=14, behind=41),
    "compression": partial(copied, blank=15, behind=8),
    "memorisation": lambda row: [
        TABLE[row[place - 1]] if place % 2 else IGNORED for place in range(9)
    ],
    **{n: partial(automaton, n) for n in TASKS if isinstance(task(n), Formal)},
    "repeated": partial(told, digits=6),
    "text": partial(told, digits=6),
    "hexadecimal": partial(told, digits=32),
}
SCORED = [name for name in ORACLES]


def knowing(oracle: Callable[[list[int]], list[int]], outputs: int):
    """An answering function that puts all its trust into what `oracle` says."""

    def answer(tokens: torch.Tensor) -> torch.Tensor:
        told = torch.tensor([oracle(row) for row in tokens.tolist()])
        return 100.0 * F.one_hot(told.clamp_min(0), outputs)

    return answer


def guessing(outputs: int):
    source = torch.Generator().manual_seed(0)
    return lambda tokens: torch.rand(*tokens.shape, outputs, generator=source)


def equal(one: Batch, other: Batch) -> bool:
    return torch.equal(one.inputs, other.inputs) and torch.equal(one.targets, other.targets)


def decoded(row: torch.Tensor) -> str:
    return bytes(row[row > 0].tolist()).decode(errors="replace")


@pytest.mark.parametrize("name", [n for n in SCORED if not isinstance(task(n), Needle)])
def test_targets_are_those_worked_out_by_hand(name):
    for batch in itertools.islice(task(name).batches(32, 1), 3):
        assert batch.inputs.dtype == batch.targets.dtype == torch.int64
        assert 0 <= batch.inputs.min() and batch.inputs.max() < task(name).vocabulary
        assert batch.targets.max() < task(name).outputs and (batch.targets != IGNORED).any(1).all()
        for row, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            answers = ORACLES[name](row)
            assert answers[:-1] == targets[:-1]
            # Whether a fuzzy key goes on behind the right edge is not to be seen.
            assert targets[-1] in (answers[-1], IGNORED if name == "fuzzy_recall" else answers[-1])


@pytest.mark.parametrize("name", SCORED)
def test_who_knows_scores_one_and_who_guesses_scores_chance(name):
    figures = task(name).score(knowing(ORACLES[name], task(name).outputs))
    assert set(figures.values()) == {1.0} and task(name).metric in figures
    assert task(name).better == "higher"
    guessed = task(name).score(guessing(task(name).outputs), quick=True)
    assert guessed.keys() == figures.keys() and json.loads(json.dumps(guessed)) == guessed
    share = {"bin0": "bin0 states", "bin1": "bin1 states"}.get(task(name).metric)
    assert abs(guessed[share or task(name).metric] - 1 / task(name).outputs) < 0.06


@pytest.mark.parametrize("name", TASKS)
def test_the_seed_alone_decides_and_a_resumed_run_goes_on(name):
    torch.manual_seed(1)
    batches = task(name).batches(4, 3)
    row = [next(batches) for _ in range(4)]
    torch.manual_seed(2)
    again = task(name).batches(4, 3)
    assert equal(next(again), row[0]) and equal(next(again), row[1])
    buffer = io.BytesIO()
    torch.save(again.state_dict(), buffer)
    buffer.seek(0)
    resumed = task(name).batches(4, 3)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    assert equal(next(resumed), row[2]) and equal(next(resumed), row[3])
    other = task(name).batches(4, 4)
    assert not all(equal(next(other), same) for same in row)
    with pytest.raises(ValueError, match=r"cannot resume: .* seed = 3, this run has seed = 4"):
        other.load_state_dict(again.state_dict())
    with pytest.raises(ValueError, match="batch = 0: at least 1"):
        task(name).batches(0, 3)


@pytest.mark.parametrize("name", TASKS)
def test_the_record_names_data_that_nothing_outside_changes(name):
    record = task(name).record()
    assert json.loads(json.dumps(record)) == record and len(record["sha256"]) == 64
    torch.manual_seed(5)
    assert TASKS[name]().record() == record


def test_records_of_different_data_differ():
    records = [json.dumps(task(name).record()) for name in TASKS]
    assert len(set(records)) == len(records)
    assert parity().record()["sha256"] != parity(longest=40).record()["sha256"]


def test_queries_come_at_even_distances_and_rather_soon():
    batch = next(Recall(pairs=4, vocabulary=64, length=40).batches(4000, 0))
    keys, rest = batch.inputs[:, 0:8:2], batch.inputs[:, 8:]
    assert (rest[:, 1::2] == 0).all()
    assert torch.equal(keys.sort(1).values, rest.sort(1).values[:, -4:])
    assert 1 <= keys.min() and keys.max() == 31 and batch.inputs[:, 1:8:2].min() == 32
    assert (batch.inputs[:, 1:8:2].sort(1).values.diff(dim=1) > 0).all()
    # The first key's query is one draw from the 16 distances: their shares are g^-0.99, scaled.
    first = (rest == keys[:, :1]).int().argmax(1) // 2
    shares = np.arange(1, 17) ** -0.99
    found = np.bincount(first.numpy(), minlength=16) / 4000
    assert np.abs(found - shares / shares.sum()).max() < 0.03


def test_updated_and_untouched_keys_are_told_apart():
    overwriting = task("overwriting")

    def oldest(row: list[int]) -> list[int]:
        first = dict(zip(row[16::-2], row[17::-2], strict=True))
        return [first.get(token, IGNORED) if place >= 18 else 0 for place, token in enumerate(row)]

    figures = overwriting.score(knowing(oldest, 64))
    assert figures == {"accuracy": 0.5, "updated": 0.0, "untouched": 1.0}
    assert task("mqar").score(knowing(ORACLES["mqar"], 64)).keys() == {"accuracy"}


def test_noise_has_the_share_that_was_asked_and_tokens_of_its_own():
    inputs = next(noisy_recall(noise=0.4, length=256, examples=300).batches(300, 0)).inputs
    noisy = inputs[:, 0::2] >= 16
    assert torch.equal(noisy, inputs[:, 1::2] >= 16)
    assert abs(noisy[:, 1:-1].double().mean() - 0.4) < 0.02
    assert not noisy[:, [0, -1]].any()


def test_training_draws_from_the_examples_there_are():
    few = compression(length=8, examples=5)
    rows = torch.cat([next(batches).inputs for batches in [few.batches(64, 0)] * 3])
    assert len(rows.unique(dim=0)) == 5
    assert isinstance(few, Mad) and few.record()["examples"] == 5


def test_the_table_is_the_same_for_all_seeds_and_never_shown():
    for seed in (1, 2):
        batch = next(task("memorisation").batches(32, seed))
        asked = batch.targets != IGNORED
        assert (batch.inputs[asked] == 31).all() and batch.targets[asked].min() >= 15
        for row, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            assert ORACLES["memorisation"](row) == targets


@pytest.mark.parametrize("name", [n for n in TASKS if isinstance(task(n), Formal)])
def test_strings_are_of_the_language_and_in_the_window(name):
    language = task(name)
    assert isinstance(language, Formal)
    blocks = {"a^nb^n": 2, "a^nb^nc^n": 3}.get(name, 1)
    high = language.longest
    inside, outside = (2, high), (high + 1, 2 * high)
    train = next(language.batches(500, 0))
    for (low, most), batch in zip((inside, outside, inside), (*language._bins, train), strict=True):
        strings = [[token for token in row if token] for row in batch.inputs.tolist()]
        assert {len(row) % blocks for row in strings} == {0}
        sizes = {len(row) // blocks for row in strings}
        assert low <= min(sizes) <= low + 3 and most - 3 <= max(sizes) <= most
        last = [
            row[len(string) - 1]
            for row, string in zip(batch.targets.tolist(), strings, strict=True)
        ]
        accepting = {"shuffle-2": 0, "a^nb^n": 2, "a^nb^nc^n": 3}.get(name, 1)
        assert set(last) == {accepting}
        assert all(max(string) <= language.vocabulary - 1 for string in strings)


def test_a_string_counts_as_often_as_it_was_drawn():
    language = task("(aa)*")
    assert isinstance(language, Formal)
    short = (language._bins[0].inputs > 0).sum(1) <= 20

    def up_to_twenty(tokens: torch.Tensor) -> torch.Tensor:
        assert len(tokens) <= 25
        even = torch.arange(1, tokens.shape[1] + 1) % 2 == 0
        return F.one_hot((even & (torch.arange(tokens.shape[1]) < 20)).long().expand_as(tokens), 2)

    figures = language.score(up_to_twenty)
    assert figures["bin0"] == pytest.approx(short.double().mean().item()) and figures["bin1"] == 0


@pytest.mark.parametrize("kind", ["repeated", "text", "hexadecimal"])
def test_half_of_the_training_rows_carry_a_needle_at_any_depth(kind):
    digits = {"hexadecimal": 32}.get(kind, 6)
    batch = next(Needle(CORPUS, kind, length=200).batches(400, 0))
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    rows = torch.cat([batch.inputs, batch.targets[:, -1:]], 1).tolist()
    texts = [bytes(row) for row in rows]
    with_needle = [text for text in texts if b"The key of " in text]
    assert 0.4 < len(with_needle) / 400 < 0.6
    assert all(set(text) <= set(b"abcdefgh") for text in texts if text not in with_needle)
    places = []
    for text in with_needle:
        alphabet = rb"[0-9a-f]" if digits == 32 else rb"\d"
        found = re.fullmatch(
            rb"(.*)\nThe key of ([a-z]{5}) is (%b{%d})\.\n(.*)\nThe key of \2 is \3"
            % (alphabet, digits),
            text,
        )
        assert found
        places.append(len(found[1]) / len(found[1] + found[4]))
        straw = needle.SENTENCE * 3 if kind == "repeated" else bytes(CORPUS.train.tolist())
        assert found[1] + found[4] in straw
    assert min(places) < 0.05 and max(places) > 0.95 and 0.4 < np.mean(places) < 0.6


def test_needles_of_the_test_lie_at_their_depth_in_held_out_text():
    seen: dict[tuple[int, float], int] = {}

    def look(tokens: torch.Tensor) -> torch.Tensor:
        for row in tokens.tolist():
            before, told, _ = bytes(row).split(b"\nThe key of ")
            after = told.partition(b".\n")[2]
            assert set(before + after) <= set(b"ABCDEFGH")
            cell = (len(row), round(len(before) / len(before + after), 1))
            seen[cell] = seen.get(cell, 0) + 1
        return torch.zeros(*tokens.shape, 256)

    Needle(CORPUS, length=128, depths=(0.0, 0.3, 1.0), tests=7).score(look)
    assert seen == {(n, d): 7 for n in (128, 256, 512) for d in (0.0, 0.3, 1.0)}


def test_cells_of_the_needle_and_their_means():
    haystack = Needle(CORPUS, length=128, depths=(0.0, 1.0), tests=4, lengths=(128, 200))

    def blind(row: list[int]) -> list[int]:
        """Knows needles near the end, and of others all but the last digit."""
        answers = told(row, 6)
        near = bytes(row).index(b"\nThe key of ") > 40
        return answers if near else [*answers[:-1], 0]

    figures = haystack.score(knowing(blind, 256))
    assert figures["128@0"] == figures["200@0"] == 0 and figures["128@1"] == 1
    assert figures["200@0 digits"] == pytest.approx(5 / 6) and figures["200@1 digits"] == 1
    assert figures["exact@128"] == figures[haystack.metric] == 0.5
    assert figures["digits@200"] == pytest.approx(11 / 12) and haystack.metric == "exact@200"


def test_bits_per_byte_are_those_of_the_windows():
    weights = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    crops = data.windows(CORPUS.valid, 32, 16, 1)[0]
    loss = F.cross_entropy(weights[crops[:, :-1]].flatten(0, 1), crops[:, 1:].flatten())
    figures = task("language model").score(lambda tokens: weights[tokens])
    assert figures["bits_per_byte"] == pytest.approx(loss.item() / math.log(2), rel=1e-6)
    assert task("language model").score(lambda t: torch.zeros(*t.shape, 256), quick=True)[
        task("language model").metric
    ] == pytest.approx(8)
    batch = next(task("language model").batches(50, 0))
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    text = bytes(CORPUS.train.tolist())
    assert all(bytes(row) in text for row in batch.inputs.tolist())


def test_long_rows_are_answered_in_pieces_without_gradients():
    calls = []

    def answer(tokens: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        calls.append(tokens.numel())
        return torch.zeros(*tokens.shape, 2)

    parity(longest=100).score(answer)
    assert max(calls) <= base.TOKENS and 590_000 < sum(calls) <= 2000 * (100 + 200)


@pytest.mark.parametrize("name", ["mqar", "language model"])
def test_logits_of_another_shape_are_refused(name):
    with pytest.raises(ValueError, match=r"logits of shape \(\d+, \d+, 7\) for tokens"):
        task(name).score(lambda tokens: torch.zeros(*tokens.shape, 7))


def reached(template: str, draws: int = 400, **lists: object) -> set[str]:
    rules = {"the": "(the|my)", "lamp": "[<the>] lamp[s]"}
    grammar = sentences.Grammar(rules, lists, ("milk",))
    return {grammar.sample(template, random) for random in map(Random, range(draws))}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("a [b] c", ["a c", "a b c"]),
        ("(a|b[c]|)d", ["ad", "bd", "bcd", "d"]),
        ("turn (on;<the> x)", ["turn on the x", "turn on my x", "turn the x on", "turn my x on"]),
        ("<lamp>", ["lamp", "lamps", "the lamp", "the lamps", "my lamp", "my lamps"]),
        ("{color:shade} {x}", ["red milk", "dark red milk", "2 milk"]),
        (
            "{level}[([ ]%)| percent]",
            [f"{n}{s}" for n in "369" for s in ("", "%", " %", " percent")],
        ),
    ],
)
def test_a_template_reaches_all_its_sentences_and_no_other(template, expected):
    color = {"values": [{"in": "[dark] red", "out": 1}, "2"]}
    level = {"range": {"from": 3, "to": 9, "step": 3}}
    assert reached(template, color=color, level=level) == set(expected)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a (b|c", r"'a \(b\|c': '\)' is missing"),
        ("a {b", r"'a \{b': '\}' is missing"),
        ("a] b", r"'a\] b': '\]' at 1 closes nothing"),
        ("<other>", "<other>: there are the rules lamp, the"),
    ],
)
def test_a_broken_template_is_quoted(template, message):
    with pytest.raises(ValueError, match=message):
        reached(template)


@cache
def intents() -> Intents:
    return Intents()


def pattern(text: str, source: dict) -> str:
    """The template as a regular expression, where nothing counts spaces."""
    names = "|".join(word.replace(" ", "") for word in WORDS)

    def listed(found: re.Match) -> str:
        entry = source["lists"].get(found[1].split(":")[0], {})
        values = [pattern(value["in"], source) for value in entry.get("values", [])]
        return f"(?:{'|'.join(values) or (r'-?[0-9]+' if 'range' in entry else names)})"

    while (rule := re.search("<([a-z_]+)>", text)) is not None:
        text = text.replace(rule[0], f"({source['expansion_rules'][rule[1]]})")
    text = re.sub(r"([.?+*$^])", r"\\\1", text.replace(" ", "")).replace("(", "(?:")
    return re.sub(r"\{([^}]*)\}", listed, text.replace("[", "(?:").replace("]", ")?"))


def sentences_of(stream: Intents, part: int, side: int) -> dict[str, str]:
    batch = stream._data[part][side]
    classes = (batch.targets.max(1).values).tolist()
    return {
        decoded(row): stream.classes[index]
        for row, index in zip(batch.inputs, classes, strict=True)
    }


def test_sentences_are_those_of_their_intent():
    source = get_intents("en")
    checked = 0
    for part in range(7):
        for sentence, name in sentences_of(intents(), part, 0).items():
            templates = [t for e in source["intents"][name]["data"] for t in e["sentences"]]
            if len(templates) < 30 and not any(";" in t for t in templates):
                joined = "|".join(pattern(template, source) for template in templates)
                assert re.fullmatch(joined, sentence.replace(" ", "")), (name, sentence)
                checked += 1
    assert checked > 500


def test_intents_come_in_parts_and_are_held_out_by_sentence():
    stream = intents()
    assert len(stream.parts) == 7 and stream.outputs == len(stream.classes) >= 30
    assert sorted(", ".join(stream.parts).split(", ")) == sorted(stream.classes)
    everywhere: list[str] = []
    for part, names in enumerate(stream.parts):
        train, test = (sentences_of(stream, part, side) for side in (0, 1))
        assert set(train.values()) == set(test.values()) == set(names.split(", "))
        assert 0.22 < len(test) / (len(train) + len(test)) < 0.26
        everywhere += [*train, *test]
        batch = next(stream.batches(part, 64, 0))
        for row, targets in zip(batch.inputs, batch.targets, strict=True):
            sentence = decoded(row)
            asked = (targets != IGNORED).nonzero().flatten().tolist()
            assert asked == [len(sentence.encode()) - 1]
            assert stream.classes[targets[asked[0]]] == train[sentence]
    assert len(set(everywhere)) == len(everywhere)
    first, second = (replace(stream, joint=True).batches(part, 512, 0) for part in (0, 1))
    joint = next(first)
    assert len(joint.targets.max(1).values.unique()) > 0.9 * stream.outputs
    assert not torch.equal(joint.inputs, next(second).inputs)


def test_parts_of_a_stream_are_scored_alone():
    stream = intents()
    index = {name: place for place, name in enumerate(stream.classes)}
    known = {s: index[n] for part in (0, 1) for s, n in sentences_of(stream, part, 1).items()}

    def answer(tokens: torch.Tensor) -> torch.Tensor:
        classes = torch.tensor([known.get(decoded(row), 0) for row in tokens])
        return F.one_hot(classes, stream.outputs)[:, None].expand(*tokens.shape, -1)

    assert stream.score(0, answer) == stream.score(1, answer) == 1
    assert stream.score(2, answer) == 0
    assert abs(stream.score(3, guessing(stream.outputs)) - 1 / stream.outputs) < 0.05


STREAMS = {
    "intents": intents,
    "numbers": cache(partial(Languages, languages=("de", "ja"), numbers=400)),
    "names": cache(partial(Languages, "names", ("en", "fa"), length=64)),
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_follow_their_seed_and_resume(name):
    stream = STREAMS[name]()
    batches = stream.batches(1, 4, 0)
    row = [next(batches) for _ in range(3)]
    again = stream.batches(1, 4, 0)
    assert equal(next(again), row[0])
    resumed = stream.batches(1, 4, 0)
    resumed.load_state_dict(again.state_dict())
    assert equal(next(resumed), row[1]) and equal(next(resumed), row[2])
    assert not any(equal(next(stream.batches(1, 4, 1)), same) for same in row)
    with pytest.raises(ValueError, match=r"part = .*, this run has part = "):
        stream.batches(0, 4, 0).load_state_dict(again.state_dict())
    with pytest.raises(ValueError, match=r"part -1: there are parts 0 to \d"):
        stream.score(-1, guessing(stream.outputs))
    record = stream.record()
    assert json.loads(json.dumps(record)) == record and len(record["sha256"]) == 64


def test_numbers_are_held_out_in_every_language_alike():
    stream = STREAMS["numbers"]()
    sides = [
        [{int(given.split()[1]) for given, _ in side} for side in stream._lines[language]]
        for language in stream.parts
    ]
    assert sides[0] == sides[1]
    train, held_out = sides[0]
    assert not train & held_out and len(train | held_out) == 400
    assert 0.05 < len(held_out) / 400 < 0.15
    more = Languages(languages=("de",), numbers=800)
    others = [{int(given.split()[1]) for given, _ in side} for side in more._lines["de"]]
    assert train < others[0] and held_out < others[1]


def test_training_rows_are_whole_lines_of_the_language():
    stream = STREAMS["numbers"]()
    held_out = {given for given, _ in stream._lines["de"][1]}
    batch = next(stream.batches(0, 50, 0))
    assert batch.inputs.shape == (50, 128) and batch.inputs.min() > 0
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    for row in batch.inputs:
        lines = decoded(row).split("\n")
        assert len(lines) > 2
        for line in lines[:-1]:
            number = int(re.match(r"de (\d+) = ", line)[1])
            assert line == f"de {number} = {num2words(number, lang='de')}"
            assert f"de {number} = " not in held_out
    first, second = (next(replace(stream, joint=True).batches(part, 50, 0)) for part in (0, 1))
    assert not torch.equal(first.inputs, second.inputs)
    mixed = bytes(first.inputs.flatten().tolist())
    assert mixed.count(b"\nde ") > 30 and mixed.count(b"\nja ") > 30


@pytest.mark.parametrize("name", ["numbers", "names"])
def test_who_knows_the_words_needs_no_bits(name):
    stream = STREAMS[name]()
    lines = {given + words for given, words in stream._lines[stream.parts[1]][1]}

    def answer(tokens: torch.Tensor) -> torch.Tensor:
        wanted = torch.zeros(*tokens.shape, dtype=torch.int64)
        for row, line in enumerate(map(decoded, tokens)):
            line = line.removesuffix("\n")
            assert line in lines
            end = len(line.encode())
            wanted[row, : end - 1] = tokens[row, 1:end]
            wanted[row, end - 1] = 10
        return 100.0 * F.one_hot(wanted, 256)

    assert stream.score(1, answer) == 0 and stream.more(1, answer) == {"exact": 1}
    assert stream.score(1, lambda t: torch.zeros(*t.shape, 256)) == pytest.approx(8)
    almost = stream.more(1, lambda t: answer(t) * (torch.arange(256) != 10))["exact"]
    assert almost == 0  # the end of the line belongs to the answer
    count = sum(len(words.encode()) + 1 for _, words in stream._lines[stream.parts[1]][1])
    assert (stream._tests[stream.parts[1]].targets != IGNORED).sum() == count


def test_names_come_once_and_without_tones_of_skin():
    stream = STREAMS["names"]()
    for language in stream.parts:
        names = [words for side in stream._lines[language] for _, words in side]
        assert len(set(names)) == len(names) > 1000
        assert not any("skin tone" in name or "_" in name or ":" == name[0] for name in names)
    assert ("en ", "grinning face") in stream._lines["en"][0] + stream._lines["en"][1]


@pytest.mark.parametrize(
    ("package", "build"),
    [
        ("home_assistant_intents", Intents),
        ("num2words", Languages),
        ("emoji", partial(Languages, "names")),
    ],
)
def test_a_missing_package_is_named(package, build, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"pip install {package.replace('_', '-')}"):
        build()


MATRIX = [[0.9, 0.1, 0.2], [0.5, 0.8, 0.3], [0.4, 0.6, 0.7]]


def test_metrics_of_a_matrix_by_hand():
    higher = continual(MATRIX, "higher")
    assert higher == pytest.approx(
        {
            "average": (0.4 + 0.6 + 0.7) / 3,
            "backward_transfer": (-0.5 - 0.2) / 2,
            "forgetting": (0.5 + 0.2) / 2,
            "learning": (0.9 + 0.8 + 0.7) / 3,
        }
    )
    lower = continual(MATRIX, "lower")
    # The best scores so far are 0.5 and 0.1, the last 0.4 and 0.6.
    assert lower["forgetting"] == pytest.approx((0.4 - 0.5 + 0.6 - 0.1) / 2)
    assert lower["backward_transfer"] == higher["backward_transfer"]
    assert forward_transfer(MATRIX, [0.3, 0.2, 0.1]) == pytest.approx((0.1 - 0.2 + 0.3 - 0.1) / 2)


@pytest.mark.parametrize("count", [*range(2, 34), 100])
def test_intervals_are_those_of_student(count):
    values = np.random.default_rng(count).normal(size=count)
    mean, half = mean_interval(values.tolist())
    low, high = scipy.stats.t.interval(0.95, count - 1, values.mean(), scipy.stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("count", "of"), [(0, 3), (3, 3), (2, 5), (70, 100)])
def test_shares_have_wilsons_interval(count, of):
    expected = scipy.stats.binomtest(count, of).proportion_ci(method="wilson")
    assert wilson(count, of) == pytest.approx((expected.low, expected.high), abs=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(wilson, 4, 3), "4 of 3: a count of trials"),
        (partial(Recall, pairs=40), "length = 128 is too short: 40 pairs, 0 updates .* 160"),
        (partial(Recall, updates=20), "updates = 20: between 0 and the 16 pairs"),
        (partial(Recall, vocabulary=100), "vocabulary = 100: an even number of at least 130"),
        (partial(Recall, pairs=0), "pairs = 0: at least 1"),
        (partial(in_context_recall, 15), "15 tokens for keys and values: an even number"),
        (partial(noisy_recall, noise=1.5), "noise = 1.5: a share"),
        (partial(fuzzy_recall, entries=9), "entries = 9: at most .* 8"),
        (partial(fuzzy_recall, length=8), "length = 8: at least 12"),
        (partial(selective_copy, length=30), "length = 30: at least 33"),
        (partial(compression, length=0), "length = 0: at least 1"),
        (partial(compression, examples=0), "examples = 0: at least 1"),
        (partial(memorisation, 2), "vocabulary = 2: at least 3"),
        (partial(parity, 3), "longest = 3: at least 4"),
        (partial(repeated, ""), "word = '': at least one letter"),
        (partial(counted, 1), "letters = 1: at least 2"),
        (partial(Needle, CORPUS, "straw"), "kind = 'straw': 'repeated', 'text' or"),
        (partial(Needle, CORPUS, length=50), "length = 50: at least 56"),
        (partial(Needle, CORPUS, depths=(0.5, 1.5)), "depth 1.5: between 0"),
        (partial(Needle, CORPUS, lengths=(9000,)), "3000 bytes, a length of 9000 needs .* 9001"),
        (partial(Text, CORPUS, length=3000), "too small: it has 3000 bytes"),
        (partial(Intents, "xx"), "language 'xx': one of .*, en, "),
        (partial(Intents, tasks=99), "tasks = 99: at most the 36 intents"),
        (partial(Intents, least=121), "least = 121: no intent of 'en' has so many .* 120 drawn"),
        (partial(Languages, "words"), "kind = 'words': 'numbers' or 'names'"),
        (partial(Languages, languages=("xx",)), "language 'xx': one of .*, de, "),
        (partial(Languages, "names", ("xx",)), "language 'xx': one of .*, de, "),
        (partial(Languages, numbers=7), "numbers = 7: from 100 to 100000"),
        (partial(continual, [[1.0, 2.0], [1.0]], "higher"), r"2 rows of \[2, 1\] columns"),
        (partial(continual, MATRIX, "best"), "better = 'best': 'higher' or 'lower'"),
        (partial(forward_transfer, MATRIX, [0.1]), "1 scores of the untrained model for 3 parts"),
        (partial(mean_interval, [1.0]), "an interval from 1 values: at least 2"),
    ],
)
def test_a_bad_size_is_quoted(call, message):
    with pytest.raises(ValueError, match=message):
        call()
