"""Windows and the detokeniser: every token counted once, with the context that it should have."""

import pytest

from megatron.tasks.wikitext import detokenize, word_count
from megatron.tasks.windows import split_windows


def cut_windows(length, seq_length, overlap, **options):
    return [(list(w.tokens), w.num_scored) for w in split_windows(range(length), seq_length, overlap, **options)]


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("overlap", [1, 2, 3, 5, 7, 8])
def test_every_token_but_the_first_is_counted_once(overlap, full):
    for length in range(40):
        found = cut_windows(length, 8, overlap, full=full)
        assert [t for tokens, counted in found for t in tokens[len(tokens) - counted :]] == list(range(1, length))
        for tokens, counted in found:
            assert 1 <= counted < len(tokens) <= 9 and tokens == list(range(tokens[0], tokens[-1] + 1))
        assert all(counted == (overlap if number else 8) for number, (_, counted) in enumerate(found[:-1]))


@pytest.mark.parametrize(("seq_length", "overlap"), [(8, 1), (8, 3), (8, 8), (5, 4), (1, 1)])
def test_windows_are_those_of_the_definition(seq_length, overlap):
    """Window i begins at i x overlap, and its last `overlap` labels are new: Megatron-LM's padded windows."""
    for length in range(2, 30):
        expected = []
        for number in range(-(-(length - 1) // overlap)):
            places = range(number * overlap, number * overlap + seq_length + 1)
            new = places[1:] if number == 0 else places[-overlap:]
            if counted := sum(place < length for place in new):
                expected.append(([place for place in places if place < length], counted))
        assert cut_windows(length, seq_length, overlap) == expected


def test_the_last_window_can_have_all_its_context():
    assert cut_windows(12, 4, 4) == [([0, 1, 2, 3, 4], 4), ([4, 5, 6, 7, 8], 4), ([8, 9, 10, 11], 3)]
    assert cut_windows(12, 4, 4, full=True) == [([0, 1, 2, 3, 4], 4), ([4, 5, 6, 7, 8], 4), ([7, 8, 9, 10, 11], 3)]
    assert cut_windows(3, 4, 4, full=True) == [([0, 1, 2], 2)]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (" \n = Robert <unk> = \n \n Robert was", "\n= Robert <unk> =\n\nRobert was"),
        (" = = = Form = = = \n", " === Form ===\n"),
        (" = = Life = = \n", " == Life ==\n"),
        ("a 1 @,@ 500 @-@ seat , 2 @.@ 5 m ( 8 ft ) hall ; so : yes !", "a 1,500-seat, 2.5 m (8 ft) hall; so: yes !"),
        ('He said : " Stop . " Then he left . ', 'He said: "Stop." Then he left. '),
        ("the dogs ' tails", "the dogs' tails"),
        ("the dog 's tail", "the dog's tail"),
        ("dogs ' tails and the dog 's tail", "dogs'tails and the dog's tail"),  # two apostrophes are taken for a pair
        ("5 ° C , at N of [ 1 ] or { x }", "5°C, at 1 of [1] or {x}"),
        ("What ? No ! Yes . ", "What? No! Yes. "),
        ("plain text, untouched.", "plain text, untouched."),
    ],
)
def test_wikitext_as_people_write_it(written, expected):
    assert detokenize(written) == expected


def test_words_are_what_single_spaces_separate():
    assert word_count(" \n = A = \n \n B c . \n ") == len(["=", "A", "=", "\n", "\n", "B", "c", "."])
    assert word_count("one") == 1
