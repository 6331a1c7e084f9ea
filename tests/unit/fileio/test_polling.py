"""When it pays to look for input once more, and when that is given up."""

from __future__ import annotations

from ploopd.fileio.polling import MOST_SKIPPED, AdaptivePoll


def waits_until_wanted(poll: AdaptivePoll) -> int:
    waits = 0
    while not poll.wanted():
        waits += 1
        assert waits <= MOST_SKIPPED
    return waits


def test_it_goes_on_while_it_pays() -> None:
    poll = AdaptivePoll()
    for _ in range(100):
        assert poll.wanted()
        poll.ended(True)


def test_tries_in_vain_become_rare() -> None:
    poll = AdaptivePoll()
    skipped = []
    for _ in range(13):
        skipped.append(waits_until_wanted(poll))
        poll.ended(False)
    assert skipped == [0, *(2**n for n in range(11)), MOST_SKIPPED]


def test_one_success_is_enough_to_begin_again() -> None:
    poll = AdaptivePoll()
    for _ in range(8):
        waits_until_wanted(poll)
        poll.ended(False)
    waits_until_wanted(poll)
    poll.ended(True)
    assert poll.wanted()
    poll.ended(False)
    assert waits_until_wanted(poll) == 1
