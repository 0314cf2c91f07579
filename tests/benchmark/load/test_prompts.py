"""What the requests of a schedule say."""

from __future__ import annotations

from nanopd.benchmark.load.prompts import prompts
from nanopd.simulator.workload import PIECE, Arrival

ARRIVALS = [Arrival(0.0, 2 * PIECE + 10, 5, prefix=(3, 1, 4)), Arrival(0.1, 2 * PIECE + 300, 5, prefix=(3, 1, 5)),
            Arrival(0.2, PIECE // 2, 5, prefix=(3,)), Arrival(0.3, 40, 5), Arrival(0.4, PIECE + 7, 5, prefix=(0,)), Arrival(0.5, 3, 1)]


def test_lengths_and_vocabulary():
    drawn = prompts(ARRIVALS, vocab_size=50)
    assert [len(one) for one in drawn] == [one.prompt_len for one in ARRIVALS]
    assert {int(token) for one in drawn for token in one} == set(range(50))


def test_the_same_names_begin_alike_and_go_on_each_in_its_way():
    first, second, third, *_ = (one.tolist() for one in prompts(ARRIVALS, vocab_size=1000))
    assert first[: 2 * PIECE] == second[: 2 * PIECE]
    assert third == first[: PIECE // 2]
    assert first[2 * PIECE:] != second[2 * PIECE: 2 * PIECE + 10]
    assert first[:PIECE] != first[PIECE: 2 * PIECE]


def test_who_shares_no_name_shares_nothing():
    """Also where a request's number is the name of a piece."""
    begins = [tuple(one[:3].tolist()) for one in prompts([*ARRIVALS[3:], *ARRIVALS[:1]], vocab_size=1000)]
    assert len(set(begins)) == len(begins)


def test_what_a_prefix_does_not_cover_is_the_request_s_own():
    arrival = Arrival(0.0, PIECE + 7, 5, prefix=(0,))
    one, other = (number.tolist() for number in prompts([arrival, arrival], 1000))
    assert one[:PIECE] == other[:PIECE] and one[PIECE:] != other[PIECE:]


def test_a_seed_gives_the_same_prompts_and_another_one_others():
    first, again, other = ([one.tolist() for one in prompts(ARRIVALS, 1000, seed)] for seed in (1, 1, 2))
    assert first == again
    assert not [one for one in first if one in other]
