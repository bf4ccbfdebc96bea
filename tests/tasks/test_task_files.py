"""The published formats of the tasks: what becomes of their lines, how answers are judged, what is said of a broken file."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import toys

from megatron.data.errors import DataError
from megatron.data.fast_tokenizers import BertWordPieceLowerCase
from megatron.tasks.glue import MNLI, QQP, PairClassification
from megatron.tasks.race import Race
from megatron.tasks.samples import Example, PaddedExamples, ShuffledEpochs, TaskScore
from megatron.tasks.squad import Squad, normalize_answer, word_f1
from megatron.tasks.tagging import Tagging, collect_labels, entities, read_sentences

CLASSES = ("contradiction", "entailment", "neutral")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return BertWordPieceLowerCase(str(toys.write_vocabulary(tmp_path_factory.mktemp("vocab"))), 0)


def tokens_in_words(words, row) -> str:
    return " ".join(words.piece(int(token)) for token in row.tokens)


def scored_labels(row) -> dict[int, int]:
    return {int(place): int(row.labels[place]) for place in row.loss_mask.nonzero()[0]}


def test_a_pair_and_how_it_is_cut(words):
    task = PairClassification(words, 8, MNLI, CLASSES)
    first, second = words.tokenize("tom has a hat"), words.tokenize("it is red")
    row = task.build_pair(first, second, 2)
    assert tokens_in_words(words, row) == "[CLS] tom has a hat [SEP] it [SEP]"
    assert (row.first_length, scored_labels(row)) == (6, {0: 2})
    assert tokens_in_words(words, task.build_pair(first * 3, second, 0)) == "[CLS] tom has a hat tom has [SEP]"
    assert tokens_in_words(words, task.build_pair(first, [], 0)) == "[CLS] tom has a hat [SEP]"


def test_mnli_and_qqp(words, tmp_path):
    path = toys.write_mnli(tmp_path / "mnli.tsv", 5, 1)
    task = PairClassification(words, 32, MNLI, CLASSES)
    items = task.read(str(path), training=True)
    lines = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    assert [(item.name, item.truth) for item in items] == [(line[2], line[6]) for line in lines]
    assert tokens_in_words(words, items[0].rows[0]) == f"[CLS] {lines[0][4]} [SEP] {lines[0][5]} [SEP]"
    assert task.decode(items[0], torch.tensor([0.0, 3.0, 1.0])) == "entailment"
    score = task.score(items, [items[0].truth, *["nothing"] * 4])
    assert score.metrics == {"accuracy": 20.0} and score.counts == {"correct": 1, "total": 5}
    # The published QQP has a few torn lines, and its test file no answers.
    (tmp_path / "qqp.tsv").write_text(
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n7\t1\t2\twho is tom ?\twho ?\t1\n8\t1\twho\n9\t1\t2\ta\tb\t0\n"
    )
    task = PairClassification(words, 32, QQP, ("0", "1"))
    assert [(i.name, i.truth) for i in task.read(str(tmp_path / "qqp.tsv"), training=True)] == [("7", "1"), ("9", "0")]
    assert task.notes == [f"{tmp_path}/qqp.tsv: 1 lines without 6 columns are left out; the first is line 3"]
    (tmp_path / "test.tsv").write_text("id\tquestion1\tquestion2\n0\ttom\tann\n")
    (item,) = task.read(str(tmp_path / "test.tsv"), training=False)
    assert (
        item.truth is None
        and scored_labels(item.rows[0]) == {}
        and task.score([item], ["1"]) == TaskScore({}, {"correct": 0, "total": 0})
    )
    with pytest.raises(DataError, match="a test file cannot be trained on"):
        task.read(str(tmp_path / "test.tsv"), training=True)


def test_what_windows_programs_leave_in_a_file(words, tmp_path):
    """A byte order mark before the header, line ends of two characters, and one of them alone within a sentence."""
    lines = ["id\tquestion1\tquestion2\tis_duplicate", "7\twho is\rtom ?\twho ?\t1", ""]
    (tmp_path / "qqp.tsv").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    task = PairClassification(words, 32, QQP, ("0", "1"))
    (item,) = task.read(str(tmp_path / "qqp.tsv"), training=True)
    assert tokens_in_words(words, item.rows[0]) == "[CLS] who is tom ? [SEP] who ? [SEP]" and task.notes == []
    (tmp_path / "ner.txt").write_bytes(b"\xef\xbb\xbf-DOCSTART-\tO\r\n\r\ntom\tB-PER\r\n\r\nann\tO\r\n")
    assert list(read_sentences(str(tmp_path / "ner.txt"))) == [[("tom", "B-PER")], [("ann", "O")]]


def test_a_row_has_room_for_a_sample(words):
    for make, shortest in ((lambda n: Tagging(words, n, ("O",)), 3), (lambda n: Squad(words, n), 8)):
        make(shortest)
        with pytest.raises(DataError, match=f"--seq-length {shortest - 1} is too short for a sample; legal: {shortest} and"):
            make(shortest - 1)


def test_race_puts_the_choice_into_the_blank(words, tmp_path):
    made = {"article": "tom has a red hat .", "questions": ["the hat is _ .", "what has tom ?"], "answers": ["B", "D"]}
    made["options"] = [["blue", "red", "green", "black"], ["a cup", "a book", "a ball", "a hat"]]
    (tmp_path / "high1.txt").write_text(json.dumps(made))
    first, second = Race(words, 32, "ABCD").read(str(tmp_path), training=True)
    assert tokens_in_words(words, first.rows[1]) == "[CLS] the hat is red . [SEP] tom has a red hat . [SEP]"
    assert tokens_in_words(words, second.rows[3]) == "[CLS] what has tom ? a hat [SEP] tom has a red hat . [SEP]"
    assert (first.truth, second.truth, second.name) == ("B", "D", "high1-1")
    assert [scored_labels(row) for row in first.rows] == [{0: 1}, {}, {}, {}]  # one row stands for all


def squad_file(path, context: str, answers: list[tuple[str, int]], impossible: bool | None = None):
    qa = {"id": "q", "question": "what has tom ?", "answers": [{"text": t, "answer_start": s} for t, s in answers]}
    if impossible is not None:
        qa["is_impossible"] = impossible
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": context, "qas": [qa]}]}]}))
    return str(path)


def test_squad_looks_through_windows(words, tmp_path, monkeypatch):
    monkeypatch.setattr("megatron.tasks.squad.MAX_STRIDE", 4)
    context = "ann holds a cup then tom has a red hat ."
    path = squad_file(tmp_path / "s.json", context, [("red hat", context.index("red"))])
    task = Squad(words, 16)
    items = task.read(path, training=True)  # question and its ends take 7 tokens of a row of 16, 9 are left
    assert [tokens_in_words(words, item.rows[0]).split("[SEP]")[1].strip() for item in items] == [
        "ann holds a cup then tom has a red", "then tom has a red hat .",
    ]  # fmt: skip
    assert scored_labels(items[0].rows[0]) == {0: 0, 1: 0}  # not in this window
    start = items[1].detail.first + 4
    assert scored_labels(items[1].rows[0]) == {0: start, 1: start + 1}
    logits = torch.zeros(2, 16)
    logits[0, start], logits[1, start + 1], logits[:, 0] = 5.0, 5.0, 9.0
    best = task.decode(items[1], logits)
    assert best == [10.0, "red hat", 18.0]
    # Without questions that have no answer, the score of none does not count; with them it does.
    assert task.score(items, [[3.0, "cup", 1.0], best]).metrics == {"exact_match": 100.0, "f1": 100.0}
    none = task.read(squad_file(tmp_path / "n.json", context, [], True), training=True)
    assert task.score(none, [[3.0, "cup", 1.0], best]).counts == {"correct": 0, "total": 1}
    assert task.score(none, [[3.0, "cup", 11.0], best]).counts == {"correct": 1, "total": 1}
    untold = task.read(squad_file(tmp_path / "u.json", context, []), training=False)  # of a test file
    assert task.score(untold, [[3.0, "cup", 1.0], best]) == TaskScore({}, {"correct": 0, "total": 0})
    backwards = torch.zeros(2, 16)
    backwards[0, start + 1], backwards[1, start] = 5.0, 5.0
    assert task.decode(items[1], backwards)[0] == 5.0  # an answer does not end before it begins


@pytest.mark.parametrize("seq_length", [8, 16, 64, 256])
def test_squads_windows_leave_no_gap(words, seq_length, tmp_path):
    """However short the rows are beside the question, of which at most half a row is taken."""
    context = " ".join(["tom has a red hat ."] * 50)
    path = squad_file(tmp_path / "s.json", context, [("red hat", context.rindex("red"))])
    items = Squad(words, seq_length).read(path, training=True)
    assert all(len(item.rows[0].tokens) <= seq_length for item in items)
    seen = {span for item in items for span in item.detail.offsets}
    assert len(seen) == len(words.tokenize(context))
    assert any(scored_labels(item.rows[0])[0] > 0 for item in items) or seq_length == 8  # which holds no answer of two words


def test_squads_answer_is_found_where_it_does_not_begin_with_a_token(words, tmp_path):
    context = "tom has a red hat ."
    path = squad_file(tmp_path / "s.json", context, [(" red hat ", context.index(" red"))])
    (item,) = Squad(words, 32).read(path, training=True)
    begin = item.detail.first + 3
    assert scored_labels(item.rows[0]) == {0: begin, 1: begin + 1}


def test_squads_words_are_compared_as_its_script_does():
    assert normalize_answer("The  Cat's hat!") == "cats hat"
    assert word_f1("a red hat", "the red cup") == pytest.approx(2 * 1 / 4)
    assert word_f1("red", "blue") == 0.0 and word_f1("the", "a") == 1.0


def test_tags_stand_at_first_pieces(words, tmp_path):
    (tmp_path / "t.txt").write_text("-DOCSTART- O\n\ntom X B-PER\nthis X O\nhat X B-OBJ\n\nann Y B-PER\n")
    labels = collect_labels([str(tmp_path / "t.txt")])
    assert labels == ("O", "B-OBJ", "B-PER")
    task = Tagging(words, 4, labels)
    first, second = task.read(str(tmp_path / "t.txt"), training=True)
    assert tokens_in_words(words, first.rows[0]) == "[CLS] tom [UNK] [SEP]" and scored_labels(first.rows[0]) == {1: 2, 2: 0}
    assert task.notes == [f"{tmp_path}/t.txt: 1 words are cut off by --seq-length 4"]
    logits = torch.zeros(4, 3)
    logits[1, 2] = logits[2, 1] = 1.0
    answers = [task.decode(item, logits) for item in (first, second)]
    assert answers == [["B-PER", "B-OBJ", "O"], ["B-PER"]]
    score = task.score([first, second], answers)
    assert score.counts == {"correct": 2, "total": 4, "entities": 3}
    assert score.metrics == {"accuracy": 50.0, "f1": pytest.approx(100 * 2 * 2 / (3 + 3))}
    with pytest.raises(DataError, match=r"t\.txt:5: the model has no tag B-OBJ"):
        Tagging(words, 8, ("O", "B-PER")).read(str(tmp_path / "t.txt"), training=False)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-A I-A O", [(1, 3, "A")]),
        ("B-A B-A I-B", [(0, 1, "A"), (1, 2, "A"), (2, 3, "B")]),
        ("I-A I-A B-A", [(0, 2, "A"), (2, 3, "A")]),
        ("O O", []),
        ("S-A B-A I-A E-A O E-B", [(0, 1, "A"), (1, 4, "A"), (5, 6, "B")]),
        ("B-A L-A U-A", [(0, 2, "A"), (2, 3, "A")]),
    ],
)
def test_entities_are_read_off_tags(tags, found):
    assert list(entities(tags.split())) == found


def test_tags_that_name_no_entities_have_no_f1(words, tmp_path):
    (tmp_path / "t.txt").write_text("tom NOUN\nhas VERB\n")
    task = Tagging(words, 8, collect_labels([str(tmp_path / "t.txt")]))
    items = task.read(str(tmp_path / "t.txt"), training=False)
    score = task.score(items, [["NOUN", "NOUN"]])
    assert score.metrics == {"accuracy": 50.0} and score.counts == {"correct": 1, "total": 2}


def test_a_sentence_that_is_too_long_loses_its_end(words, tmp_path):
    (tmp_path / "t.txt").write_text("tom O\nhas-a-red-hat O\nnow O\n")
    task = Tagging(words, 5, ("O",))
    (item,) = task.read(str(tmp_path / "t.txt"), training=False)
    assert tokens_in_words(words, item.rows[0]) == "[CLS] tom [SEP]" and list(item.detail) == [0]
    assert task.notes == [f"{tmp_path}/t.txt: 2 words are cut off by --seq-length 5"]


def test_every_epoch_has_each_sample_at_most_once():
    items = [Example((), str(i), i) for i in range(10)]
    epochs = ShuffledEpochs(items, 3, 4, seed=5)
    seen = [[epochs[i].truth for i in range(e * 8, (e + 1) * 8)] for e in range(3)]
    assert len(epochs) == 24 and all(len(set(epoch)) == 8 for epoch in seen)
    assert seen[0] != seen[1] and len({tuple(sorted(epoch)) for epoch in seen}) > 1
    again = ShuffledEpochs(items, 3, 4, seed=5)
    assert [again[i].truth for i in (23, 0, 9)] == [epochs[i].truth for i in (23, 0, 9)]
    with pytest.raises(DataError, match="fewer than one global batch of 11"):
        ShuffledEpochs(items, 3, 11, seed=5)
    task = SimpleNamespace(padding_example=lambda: "nothing")
    assert [PaddedExamples(items, task, 4)[i] for i in (9, 10, 11)] == [items[9], "nothing", "nothing"]


ASKED = '{"id": 1, "question": "who ?", "answers": [{"text": "c", "answer_start": 0}]}'
TWICE = f'{{"data": [{{"paragraphs": [{{"context": "c", "qas": [{ASKED}, {ASKED}]}}]}}]}}'
BROKEN = [
    ("MNLI", "", "names no column pairID, sentence1, sentence2"),
    ("MNLI", "pairID\tsentence1\tsentence2\tgold_label\n", "contains no samples"),
    ("MNLI", "pairID\tsentence1\tsentence2\tgold_label\n1\ta\tb\tmaybe\n", ":2: gold_label is 'maybe'; legal: contradiction"),
    ("SQUAD", "nonsense", ": it is not JSON: Expecting value: line 1 column 1 (char 0); expected SQuAD's JSON"),
    ("SQUAD", '{"data": []}', "contains no questions"),
    (
        "SQUAD",
        '{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": 1}]}]}]}',
        ": data[0].paragraphs[0].qas[0]: it has no `question` (its keys: id)",
    ),
    (
        "SQUAD",
        ("a red hat", [("hat", 2)]),
        ".qas[0].answers[0]: at character 2, its answer_start, the paragraph has 'red' instead of 'hat'",
    ),
    ("SQUAD", ("a red hat", []), ": data[0].paragraphs[0].qas[0]: it has no answer: a test file cannot be trained on"),
    (
        "SQUAD",
        '{"data": [{"paragraphs": [{"context": 5, "qas": []}]}]}',
        ": data[0].paragraphs[0].context: it is a number 5, not text; expected SQuAD's",
    ),
    (
        "SQUAD",
        '{"data": [{"paragraphs": [{"context": "c", "qas": [{"id": 1, "question": 2}]}]}]}',
        "qas[0].question: it is a number 2, not text",
    ),
    ("SQUAD", TWICE, ".qas[1]: its id '1' is that of data[0].paragraphs[0].qas[0] as well"),
    ("NER", "tom\n", ":1: 'tom' is not a word and its tag"),
    ("NER", "\n\n", "contains no words"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_broken_files_are_named(name, content, message, words, tmp_path):
    path = tmp_path / "broken"
    if isinstance(content, tuple):
        squad_file(path, *content)
    else:
        path.write_text(content)
    task = {
        "MNLI": lambda: PairClassification(words, 32, MNLI, CLASSES),
        "SQUAD": lambda: Squad(words, 32),
        "NER": lambda: Tagging(words, 32, ("O",)),
    }[name]()
    with pytest.raises(DataError) as caught:
        task.read(str(path), training=True)
    assert str(path) in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "1.txt: it has no `article` (its keys: none); expected RACE's JSON"),
        (
            '{"article": "a", "questions": ["q"], "options": [["a", "b"]], "answers": ["A"]}',
            ": options[0]: it has 2 options; legal: 4",
        ),
        (
            '{"article": "a", "questions": ["q"], "options": [[1, 2, 3, 4]], "answers": ["A"]}',
            ": options[0][0]: it is a number 1, not text",
        ),
        ('{"article": "a", "questions": ["q", "r"], "options": [], "answers": []}', "whose numbers should be equal"),
    ],
)
def test_broken_race_is_named(content, message, words, tmp_path):
    (tmp_path / "1.txt").write_text(content)
    with pytest.raises(DataError, match=r"1\.txt") as caught:
        Race(words, 32, "ABCD").read(str(tmp_path), training=True)
    assert message in str(caught.value)
    with pytest.raises(DataError, match="contains no questions"):
        Race(words, 32, "ABCD").read(str(tmp_path / "nothing"), training=True)
