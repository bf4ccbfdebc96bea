"""Zero-shot scores: those of transformers on the export, on every layout; bad input refused before any work."""

import gzip
import json
import math

import numpy as np
import pytest
import torch
from ranks import on_ranks
from trained_gpt import LLAMA, POSITIONS, VOCABULARY, Reference, open_on_ranks, sentences, train_and_export

from megatron.config.errors import ConfigError
from megatron.data.errors import DataError
from megatron.data.indexed import IndexedWriter
from megatron.data.tokenizer import ByteTokenizer
from megatron.mesh.mesh import Axis
from megatron.parallel.cross_entropy import label_scores
from megatron.parallel.embedding import VocabShard
from megatron.tasks.scoring import batch_windows
from megatron.tasks.windows import Window
from megatron.tasks.zeroshot import zero_shot

pytest.importorskip("transformers")
LAYOUTS = {"alone": (1, 1, 1), "tp 2": (2, 2, 1), "pp 2": (2, 1, 2), "dp 2": (2, 1, 1), "tp 2 x pp 2": (4, 2, 2)}
SEQ, OVERLAP = 32, 12
WIKI = (
    " \n = Cats = \n \n The cat sat on the red sofa , 1 @,@ 000 times ( N ) . The toads log \n = = Moon = = \n The dog 's mat "
)
TEXTS = [". ".join(sentences(4, 3)), "Ü", "", "The cat sat. " * 5, sentences(1, 4)[0]]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return train_and_export(tmp_path_factory.mktemp("model"), steps=50)


@pytest.fixture(scope="module")
def reference(model):
    return Reference(model)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "wiki.test.tokens").write_text(WIKI, encoding="utf-8")
    (folder / "plain.txt").write_text(WIKI, encoding="utf-8")
    lines = [json.dumps({"text": text}) + "\n" for text in (*sentences(9, 5), "x " * 30 + sentences(1, 6)[0])]
    (folder / "lambada.jsonl").write_text("".join(lines), encoding="utf-8")
    with gzip.open(folder / "texts.jsonl.gz", "wt", encoding="utf-8") as packed:
        packed.write("\n".join(json.dumps({"text": text}) for text in TEXTS))
    with IndexedWriter(str(folder / "tokens"), np.dtype("<u2")) as writer:
        for text in TEXTS[::-2]:
            ids = [*ByteTokenizer().tokenize(text), 256]
            writer.add_document(np.array(ids, "<u2"), [len(ids)])
        writer.finish()
    return folder


TASKS = [
    ("WIKITEXT103", "wiki.test.tokens", {}),
    ("WIKITEXT103", "plain.txt", {}),
    ("LAMBADA", "lambada.jsonl", {}),
    ("LAMBADA", "lambada.jsonl", {"strict": True}),
    ("PERPLEXITY", "texts.jsonl.gz", {}),
    ("PERPLEXITY", "tokens", {}),
]


def all_scores(root, folder, tp, pp):
    """Each token's score in three windows, each task's figures, and the lines that it said."""
    opened, mesh = open_on_ranks(root, tp, pp)
    batch = batch_windows(example_windows(), opened.model.device)
    values, hits = opened.model.scores(batch)
    figures, said = [], []
    for task, file, options in TASKS:
        sizes = dict(seq_length=SEQ, overlap=OVERLAP, micro_batch_size=3, log=said.append)
        figures.append(zero_shot(task, opened, mesh, [f"{folder}/{file}"], **sizes, **options))
    json.dumps(figures, allow_nan=False)
    return values.tolist(), hits.tolist(), figures, said


def example_windows():
    tokens = ByteTokenizer().tokenize(". ".join(sentences(4, 7)))
    return [Window(tokens[:SEQ], 5), Window(tokens[9 : 9 + POSITIONS + 1], 8), Window(tokens[-2:], 1)]


@pytest.fixture(scope="module")
def alone(model, files):
    return all_scores(str(model / "run"), str(files), 1, 1)


def test_each_token_has_the_score_of_transformers(alone, reference):
    """All positions, the last target as well, and whether the token is the most probable one."""
    values, hits, seen = alone[0], alone[1], 0
    for row, window in enumerate(example_windows()):
        for at in range(1, len(window.tokens)):
            expected, best = reference.log_prob(list(window.tokens[:at]), window.tokens[at])
            assert values[at - 1][row] == pytest.approx(expected, abs=1e-4)
            assert hits[at - 1][row] == best
            seen += best
    assert 10 < seen < 70  # some are guessed, some not


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "alone"])
def test_every_layout_gives_the_same(layout, alone, model, files):
    """On every rank; data-parallel ranks share windows that do not divide by them."""
    world, tp, pp = LAYOUTS[layout]
    for values, hits, figures, said in on_ranks(world, all_scores, str(model / "run"), str(files), tp, pp):
        assert torch.allclose(torch.tensor(values), torch.tensor(alone[0]), rtol=0, atol=1e-5)
        assert hits == alone[1]
        for got, expected in zip(figures, alone[2], strict=True):
            assert got.keys() == expected.keys()
            for name, value in expected.items():
                assert got[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name
        assert [line[:40] for line in said] == [line[:40] for line in alone[3]]


@pytest.mark.parametrize(("number", "file"), [(0, "wiki.test.tokens"), (1, "plain.txt")])
def test_wikitext_is_that_of_transformers(number, file, alone, reference):
    """Detokenised only where the path says wiki; normalised to the words of the file as it is."""
    figures = alone[2][number]
    text = WIKI
    if number == 0:
        text = "\n= Cats =\n\nThe cat sat on the red sofa, 1,000 times (N). The toads log\n== Moon ==\nThe dog's mat "
    tokens = reference.tokens(text)
    scores = reference.all_after_first(tokens, SEQ, OVERLAP)
    words = len(WIKI.strip().split(" "))
    loss, ratio = -sum(scores) / len(scores), (len(tokens) - 1) / (words - 1)
    assert figures["loss"] == pytest.approx(loss, abs=1e-4)
    assert figures["token_ratio"] == ratio and figures["tokens"] == len(tokens) and figures["words"] == words
    assert figures["ppl"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert figures["adjusted_ppl"] == pytest.approx(math.exp(loss * ratio), rel=1e-3)
    assert figures["adjusted_ppl_clipped"] == pytest.approx(math.exp(min(20, loss * ratio)), rel=1e-3)
    assert figures["targets"] == len(tokens) - 1


@pytest.mark.parametrize(("number", "strict"), [(2, False), (3, True)])
def test_lambada_is_that_of_transformers(number, strict, alone, reference, files):
    correct = total = targets = 0
    for line in (files / "lambada.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        context, _, word = text.rpartition(" ")
        context, word = (context, " " + word) if strict else (text[:-1], text[-1])
        guess, hit = reference.tokens(word), True
        tokens = [*reference.tokens(context), *guess][-SEQ - 1 :]
        for at in range(len(tokens) - len(guess), len(tokens)):
            value, best = reference.log_prob(tokens[:at], tokens[at])
            hit, total, targets = hit and best, total - value, targets + 1
        correct += hit
    figures = alone[2][number]
    assert (figures["correct"], figures["examples"], figures["targets"]) == (correct, 10, targets)
    assert figures["accuracy"] == correct / 10 and 0 < correct < (10 if strict else 11)
    assert figures["loss"] == pytest.approx(total / targets, abs=1e-4)
    assert figures["shortened"] == 1


def test_perplexity_is_that_of_transformers(alone, reference):
    """Perplexity of packed JSON lines, one text without any token and one longer than a window, and of an indexed dataset."""
    figures, of_tokens = alone[2][4:]
    documents = [reference.tokens(text) for text in TEXTS]
    scores = [s for tokens in documents for s in reference.all_after_first(tokens, SEQ, OVERLAP)]
    loss = -sum(scores) / len(scores)
    tokens, size = sum(map(len, documents)), sum(len(text.encode()) for text in TEXTS)
    assert figures["loss"] == pytest.approx(loss, abs=1e-4) and figures["targets"] == len(scores)
    assert (figures["documents"], figures["documents_without_targets"], figures["tokens"]) == (5, 1, tokens)
    assert figures["bytes"] == size and figures["words"] == sum(len(text.split()) for text in TEXTS)
    assert figures["bits_per_byte"] == pytest.approx(loss / math.log(2) * tokens / size, abs=1e-4)
    assert figures["byte_ppl"] == pytest.approx(2 ** figures["bits_per_byte"])
    scores = [s for text in TEXTS[::-2] for s in reference.all_after_first([*reference.tokens(text), 256], SEQ, OVERLAP)]
    assert of_tokens["loss"] == pytest.approx(-sum(scores) / len(scores), abs=1e-4)
    assert of_tokens["words"] is None and "bits_per_byte" not in of_tokens and of_tokens["targets"] == len(scores)


def test_the_lines_are_those_of_megatron_lm(alone):
    figures, said = alone[2], alone[3]
    wiki, cloze = figures[0], figures[2]
    assert said[1] == (
        f" validation results on WIKITEXT103 | avg loss: {wiki['loss']:.4E} | ppl: {wiki['ppl_clipped']:.4E} | "
        f"adjusted ppl: {wiki['adjusted_ppl_clipped']:.4E} | token ratio: {wiki['token_ratio']} |"
    )
    assert said[0] == said[2] == "-" * (len(said[1]) + 1)
    assert said[7] == (
        f" validation results on LAMBADA | number correct: {cloze['correct']:.4E} | total examples: 1.0000E+01 | "
        f"avg accuracy: {cloze['accuracy']:.4E}"
    )


def test_another_family_and_windows_of_every_size(tmp_path):
    """Rotary positions, grouped queries, untied; windows from one token on, the cheapest and the dearest overlap."""
    root = train_and_export(tmp_path, steps=10, **LLAMA)
    reference, (opened, mesh) = Reference(root), open_on_ranks(str(root / "run"), 1, 1)
    text = sentences(1, 8)[0]
    (tmp_path / "a.txt").write_text(text)
    tokens = reference.tokens(text)
    for seq_length, overlap in ((1, 1), (7, 1), (7, 7), (len(tokens) - 1, 3), (len(tokens) + 9, 2)):
        sizes = dict(seq_length=seq_length, overlap=overlap, micro_batch_size=5, log=lambda line: None)
        figures = zero_shot("PERPLEXITY", opened, mesh, [str(tmp_path / "a.txt")], **sizes)
        scores = reference.all_after_first(tokens, seq_length, overlap)
        assert figures["loss"] == pytest.approx(-sum(scores) / len(scores), abs=1e-4)
    usual = zero_shot("PERPLEXITY", opened, mesh, [str(tmp_path / "a.txt")], seq_length=9, log=lambda line: None)
    assert usual["overlap"] == 9
    twice = zero_shot("PERPLEXITY", opened, mesh, [str(tmp_path / "a.txt")] * 2, **sizes)
    assert twice["loss"] == pytest.approx(figures["loss"]) and twice["documents"] == 2


def cut_scores(rows):
    """A vocabulary of 11 over the ranks, the last of them only padding, with equal logits on two of them."""
    import torch.distributed as dist

    size, rank = dist.get_world_size(), dist.get_rank()
    tp = Axis("tp", size, rank, tuple(range(size)), dist.group.WORLD)
    x, weight, labels = score_case()
    shard = VocabShard.for_rank(11, tp, 4)
    held = torch.full((shard.padded_size, weight.shape[1]), 9.0)  # padding that would win
    held[: shard.size] = weight[shard.start : shard.start + shard.size]
    return [part.tolist() for part in label_scores(x, held, labels, shard, tp, rows)]


def score_case():
    """Make a model of whole numbers, so that equal logits are equal in whatever order they are added up."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-3, 4, (11, 6), generator=generator).float()
    weight[9] = weight[2]
    x = torch.cat([torch.randint(-3, 4, (20, 6), generator=generator).float(), 3 * weight[2].expand(2, -1)])
    return x, weight, torch.cat([torch.arange(20) % 11, torch.tensor([2, 9])])


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_scores_over_a_cut_vocabulary(rows):
    """In chunks of any size; of equal logits the lower token is the most probable one; padding never is."""
    x, weight, labels = score_case()
    expected = (x @ weight.t()).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    best = (x @ weight.t()).argmax(-1) == labels
    assert best[-2:].tolist() == [True, False] and best.sum() > 1
    alone = label_scores(x, weight, labels, VocabShard(11, 0, 11, 11), Axis.alone("tp"), rows)
    for scores, hits in (alone, *on_ranks(4, cut_scores, rows)):
        torch.testing.assert_close(torch.as_tensor(scores), expected)
        assert torch.as_tensor(hits).tolist() == best.tolist()


# What cannot be scored.


@pytest.fixture(scope="module")
def whole(model):
    return open_on_ranks(str(model / "run"), 1, 1)


def refused(whole, task, files, error=DataError, **options):
    opened, mesh = whole
    with pytest.raises(error) as caught:
        zero_shot(task, opened, mesh, [str(f) for f in files], **{"seq_length": SEQ, "overlap": OVERLAP, **options})
    return str(caught.value)


@pytest.mark.parametrize(
    ("task", "content", "message"),
    [
        ("WIKITEXT103", b"", "there is no text in it"),
        ("WIKITEXT103", b" \n ", "there is no text in it"),
        ("WIKITEXT103", b"abc", "3 tokens and 1 words"),
        ("WIKITEXT103", b"caf\xe9 au lait", "not UTF-8 (invalid continuation byte at byte 3)"),
        ("LAMBADA", b"", "there is no text in it"),
        ("LAMBADA", b'{"text": "a b"}\nhello', ":2: not JSON"),
        ("LAMBADA", b'{"txt": "a b"}', ":1: no key 'text' (the keys are: 'txt')"),
        ("LAMBADA", b'{"text": 5}', ":1: the value of 'text' is not text but a number"),
        ("LAMBADA", b'{"text": "a b"}\n{"text": "a"}', ":2: the text has 1 tokens"),
        ("LAMBADA", b'{"text": "a b"}\n{"text": ""}', ":2: the text has 0 tokens"),
    ],
)
def test_files_that_are_not_what_the_task_reads(whole, tmp_path, task, content, message):
    (tmp_path / "f").write_bytes(content)
    said = refused(whole, task, [tmp_path / "f"])
    assert said.startswith(str(tmp_path / "f")) and message in said and "json-keys" not in said


def test_words_that_have_nothing_before_them(whole, tmp_path):
    (tmp_path / "f").write_text('{"text": "a b"}\n{"text": " word "}\n')
    assert "f:2: the text has 1 words" in refused(whole, "LAMBADA", [tmp_path / "f"], strict=True)
    (tmp_path / "f").write_text(json.dumps({"text": "a " + "b" * SEQ}))
    assert "the last word has 33 tokens" in refused(whole, "LAMBADA", [tmp_path / "f"], strict=True)


def test_documents_without_targets_and_damaged_files(whole, tmp_path):
    (tmp_path / "f.jsonl").write_text('{"text": "a"}\n{"text": ""}\n')
    assert "no document has two tokens" in refused(whole, "PERPLEXITY", [tmp_path / "f.jsonl"])
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(b'{"text": "abc"}' * 999)[:-20])
    assert "damaged after line" in refused(whole, "PERPLEXITY", [tmp_path / "f.jsonl.gz"])
    (tmp_path / "f.txt.gz").write_bytes(gzip.compress(b"abc" * 999)[:-20])
    assert "f.txt.gz: damaged after line 0 (" in refused(whole, "PERPLEXITY", [tmp_path / "f.txt.gz"])
    assert "No such file" in refused(whole, "PERPLEXITY", [tmp_path / "nothing"])
    assert "a directory" in refused(whole, "WIKITEXT103", [tmp_path])
    with IndexedWriter(str(tmp_path / "d"), np.dtype("<u2")) as writer:
        writer.add_document(np.array([1, VOCABULARY], "<u2"), [2])
        writer.finish()
    assert "d.bin, document 0, token 1: id 257 is outside" in refused(whole, "PERPLEXITY", [tmp_path / "d"])
    with IndexedWriter(str(tmp_path / "e"), np.dtype("<u2")) as writer:
        writer.add_document(np.array([1, 2], "<u2"), [2])
        writer.finish({"tokenizer_digest": "another"})
    assert "was made with" in refused(whole, "PERPLEXITY", [tmp_path / "e.bin"])


def test_sizes_and_tasks_that_make_no_sense(whole, files):
    text = files / "plain.txt"
    said = refused(whole, "PERPLEXITY", [text], ConfigError, seq_length=POSITIONS + 1, overlap=0, micro_batch_size=0)
    assert "--seq-length 41" in said and "has 40 positions" in said and "--overlapping-eval 0" in said
    assert "--micro-batch-size 0" in said
    assert "--overlapping-eval 33" in refused(whole, "PERPLEXITY", [text], ConfigError, overlap=SEQ + 1)
    assert "--seq-length 0" in refused(whole, "PERPLEXITY", [text], ConfigError, seq_length=0)
    assert "names 2 files" in refused(whole, "WIKITEXT103", [text, text], ConfigError)
    assert "is missing" in refused(whole, "PERPLEXITY", [], ConfigError)
    assert "`--task RACE` is not a zero-shot task" in refused(whole, "RACE", [text], ConfigError)


def test_checkpoints_that_cannot_be_scored(whole, files, tmp_path):
    from dataclasses import replace

    text, (opened, mesh) = files / "plain.txt", whole
    for task in ("WIKITEXT103", "PERPLEXITY"):
        assert "no tokenizer" in refused((replace(opened, tokenizer=None), mesh), task, [text])
    bert = train_and_export(tmp_path, steps=0, architecture="bert")
    assert "is a BERT, which predicts masked words" in refused(open_on_ranks(str(bert / "run"), 1, 1), "PERPLEXITY", [text])


def test_a_damaged_model_is_refused(model, files):
    damaged = open_on_ranks(str(model / "run"), 1, 1)
    with torch.no_grad():
        damaged[0].model.stages[0].embedding.word.weight[ord("s")] = torch.nan
    assert "not finite" in refused(damaged, "PERPLEXITY", [files / "plain.txt"])
