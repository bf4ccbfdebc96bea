"""A small world in which four tasks can be learnt: people who hold things of a colour.

Its corpus, and each task's files in the format in which the real ones are published.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

NAMES = ["tom", "ann", "bob", "eve", "max", "ida"]
COLOURS = ["red", "blue", "green", "black"]
THINGS = ["hat", "ball", "book", "cup"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["has", "a", "the", "of", "is", "what", "who", "?", ".", "and", "then", "holds", "now", "not", "it"]


def write_vocabulary(folder: Path) -> Path:
    """Write vocab.txt, and return its path."""
    path = folder / "vocab.txt"
    path.write_text("\n".join([*SPECIAL, *NAMES, *COLOURS, *THINGS, *WORDS]) + "\n")
    return path


def draw_fact(random_: random.Random) -> tuple[str, str, str]:
    """Draw who holds a thing of which colour."""
    return random_.choice(NAMES), random_.choice(COLOURS), random_.choice(THINGS)


def write_corpus(folder: Path, documents: int) -> Path:
    """Write documents of two sentences that say the same fact, so that masked words can be guessed from the other one."""
    random_, path = random.Random(0), folder / "corpus.jsonl"
    with path.open("w") as out:
        for _ in range(documents):
            name, colour, thing = draw_fact(random_)
            said = [f"{name} has a {colour} {thing} .", f"the {thing} of {name} is {colour} ."]
            text = " ".join(s.capitalize() for s in said)
            out.write(json.dumps({"text": text}) + "\n")
    return path


def write_mnli(path: Path, count: int, seed: int) -> Path:
    """Write pairs of sentences: the second repeats the colour, denies it, or speaks of something else.

    Args:
        path: of the TSV file.
        count: number of pairs.
        seed: other seeds give other pairs.
    """
    random_ = random.Random(seed)
    columns = ["index", "promptID", "pairID", "genre", "sentence1", "sentence2", "gold_label"]
    with path.open("w") as out:
        out.write("\t".join(columns) + "\n")
        for i in range(count):
            name, colour, thing = draw_fact(random_)
            label = random_.choice(["entailment", "contradiction", "neutral"])
            said = {"entailment": f"is {colour}", "contradiction": f"is not {colour}", "neutral": "is now a book"}[label]
            row = [i, i, f"{i}x", "toy", f"{name} has a {colour} {thing} .", f"the {thing} of {name} {said} .", label]
            out.write("\t".join(map(str, row)) + "\n")
    return path


def write_race(folder: Path, count: int, seed: int) -> Path:
    """Write questions about a colour: a blank or a question, and four colours.

    Args:
        folder: made, with a JSON file for each question.
        count: number of questions.
        seed: other seeds give other questions.
    """
    random_ = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        name, colour, thing = draw_fact(random_)
        options = random_.sample(COLOURS, 4)
        question = f"the {thing} of {name} is _ ." if i % 4 else f"the {thing} of {name} is"
        made = {
            "article": f"{name} has a {colour} {thing} .",
            "questions": [question],
            "options": [options],
            "answers": ["ABCD"[options.index(colour)]],
            "id": f"toy{i}.txt",
        }
        (folder / f"{i}.txt").write_text(json.dumps(made))
    return folder


def write_squad(path: Path, count: int, seed: int) -> Path:
    """Write questions about what somebody has, beside what another one holds: the answer is its colour and the thing.

    Args:
        path: of the JSON file.
        count: number of questions.
        seed: other seeds give other questions.
    """
    random_, paragraphs = random.Random(seed), []
    for i in range(count):
        who = random_.sample(NAMES, 2)
        facts = [(name, random_.choice(COLOURS), random_.choice(THINGS)) for name in who]
        said = [
            f"{name} {verb} a {colour} {thing}" for (name, colour, thing), verb in zip(facts, ("has", "holds"), strict=True)
        ]
        context = " then ".join(random_.sample(said, 2)) + " ."
        name, colour, thing = facts[0]
        start = context.index(f"{name} has a ") + len(f"{name} has a ")
        answers = [{"text": f"{colour} {thing}", "answer_start": start}]
        paragraphs.append({"context": context, "qas": [{"id": f"q{i}", "question": f"what has {name} ?", "answers": answers}]})
    path.write_text(json.dumps({"version": "1.1", "data": [{"title": "toys", "paragraphs": paragraphs}]}))
    return path


def write_conll(path: Path, count: int, seed: int) -> Path:
    """Write sentences whose people, and the two words of what they hold, are entities.

    Args:
        path: of the file.
        count: number of sentences.
        seed: other seeds give other sentences.
    """
    random_ = random.Random(seed)
    with path.open("w") as out:
        out.write("-DOCSTART- -X- O O\n\n")
        for _ in range(count):
            name, colour, thing = draw_fact(random_)
            tags = {name: "B-PER", colour: "B-OBJ", thing: "I-OBJ"}
            words = f"{name} has a {colour} {thing} .".split()
            out.writelines(f"{word} X Y {tags.get(word, 'O')}\n" for word in words)
            out.write("\n")
    return path


def write_task_files(folder: Path, seed: int) -> dict[str, str]:
    """Write each task's file, and return the paths by the task's name. Seed 0 makes those to train on, which are larger."""
    folder.mkdir()
    few = 96 if seed else 256
    made = {
        "MNLI": write_mnli(folder / "mnli.tsv", few, seed),
        "RACE": write_race(folder / "race", few if seed else 2 * few, seed),
        "SQUAD": write_squad(folder / "squad.json", few, seed),
        "NER": write_conll(folder / "ner.txt", few, seed),
    }
    return {task: str(path) for task, path in made.items()}
