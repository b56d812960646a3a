"""Which replica gets a request: the choices as functions of counts and keys."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluidmcp_proxy.models.balancing import LeastBusy, PrefixMap, by_key, has_room, prompt_blocks

BLOCK = 512


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.data())
def test_the_least_busy_is_chosen_among_those_that_may_be(loads: list[int], data: st.DataObject) -> None:
    usable = data.draw(st.sets(st.sampled_from(range(len(loads))), min_size=1))
    choice = LeastBusy().choose(loads, usable)
    assert choice in usable
    assert loads[choice] == min(loads[index] for index in usable)


def test_equals_take_turns() -> None:
    least_busy = LeastBusy()
    assert [least_busy.choose([0, 0, 1, 0], range(4)) for _ in range(7)] == [0, 1, 3, 0, 1, 3, 0]


@given(st.binary(max_size=40), st.lists(st.integers(0, 200), min_size=1, max_size=8), st.data())
def test_a_key_s_replica_has_room(key: bytes, loads: list[int], data: st.DataObject) -> None:
    usable = data.draw(st.sets(st.sampled_from(range(len(loads))), min_size=1))
    choice = by_key(key, loads, usable)
    assert choice in usable
    assert has_room(choice, loads, usable)
    assert by_key(key, loads, usable) == choice


def test_keys_stay_where_they_were_when_a_replica_goes() -> None:
    keys = [b"session %d" % number for number in range(300)]
    before = {key: by_key(key, [0] * 4, range(4)) for key in keys}
    assert all(sum(choice == index for choice in before.values()) > 40 for index in range(4))
    after = {key: by_key(key, [0] * 4, [0, 1, 3]) for key in keys}
    assert all(after[key] == before[key] for key in keys if before[key] != 2)
    assert {after[key] for key in keys if before[key] == 2} == {0, 1, 3}


def test_a_hot_key_spills_over() -> None:
    loads = [0, 0, 0]
    for _ in range(300):
        loads[by_key(b"hot", loads, range(3))] += 1
    assert max(loads) <= 1.25 * 300 / 3 + 1
    loads = [0, 0, 0]
    for _ in range(8):
        loads[by_key(b"hot", loads, range(3))] += 1
    assert sorted(loads) == [0, 0, 8]  # a few together are no load


# Prompts


def chat(*contents: str, **parameters: Any) -> bytes:
    messages = [{"role": "user", "content": content} for content in contents]
    return json.dumps({**parameters, "messages": messages, "max_tokens": 5}).encode()


def test_a_prompt_that_goes_on_has_the_blocks_of_its_beginning() -> None:
    first = prompt_blocks(chat("a" * 1900))
    second = prompt_blocks(chat("a" * 1900, "b" * 2000))
    assert len(first) == 3
    assert len(second) == 7
    assert second[:3] == first


def test_a_difference_changes_every_block_from_there_on() -> None:
    one, other = prompt_blocks(chat("a" * 600 + "x" + "a" * 2000)), prompt_blocks(chat("a" * 600 + "y" + "a" * 2000))
    assert one[0] == other[0]
    assert not set(one[1:]) & set(other[1:])


def test_parameters_in_front_do_not_count() -> None:
    assert prompt_blocks(chat("a" * 2000)) == prompt_blocks(chat("a" * 2000, model="m", temperature=0.3, seed=12345))


def test_a_prompt_is_found_where_it_begins_and_not_in_what_somebody_said() -> None:
    said = json.dumps({"user": '"messages": [' + "x" * 2000, "prompt": "p" * BLOCK}).encode()
    assert prompt_blocks(said) == prompt_blocks(b'"prompt": "' + b"p" * BLOCK + b'"}')
    for body in (
        {"model": "m", "system": "s" * 2000, "messages": []},
        {"model": "m", "instructions": "s" * 2000, "input": "x"},
        {"model": "m", "prompt": "s" * 2000},
        {"model": "m", "input": ["s" * 2000]},
    ):
        assert len(prompt_blocks(json.dumps(body).encode())) == 3, body


@pytest.mark.parametrize("body", [b"", b"{}", b'{"file": "' + b"x" * 5000, b"\xff" * 5000, chat("short")])
def test_what_has_no_prompt_of_a_block_has_none(body: bytes) -> None:
    assert prompt_blocks(body) == []


def test_a_long_prompt_is_read_so_far_and_no_further() -> None:
    assert len(prompt_blocks(chat("a" * 10_000_000))) == 128


def test_the_longest_known_beginning_wins() -> None:
    prefixes, idle = PrefixMap(), [0, 0, 0]
    prefixes.remember([1, 2], 0)
    prefixes.remember([1, 2, 3, 4], 2)
    prefixes.remember([1, 9], 1)
    assert prefixes.find([1, 2, 3, 7], idle, range(3)) == 2
    assert prefixes.find([1, 9, 5], idle, range(3)) == 1
    assert prefixes.find([8, 2], idle, range(3)) == 2  # only the beginning as a whole has this number
    assert prefixes.find([7], idle, range(3)) is None
    assert prefixes.find([], idle, range(3)) is None


def test_one_that_is_full_or_away_is_not_waited_for() -> None:
    prefixes = PrefixMap()
    prefixes.remember([1], 0)
    assert prefixes.find([1], [7, 0, 0], range(3)) == 0
    assert prefixes.find([1], [8, 0, 0], range(3)) is None
    assert prefixes.find([1], [8, 8, 8], range(3)) == 0
    assert prefixes.find([1], [0, 0, 0], [1, 2]) is None


def test_what_a_restarted_replica_knew_is_forgotten() -> None:
    prefixes = PrefixMap()
    prefixes.remember([1, 2], 0)
    prefixes.remember([1, 3], 1)
    prefixes.forget(0)
    assert prefixes.find([1, 2], [0, 0], range(2)) == 1
    assert prefixes.find([2], [0, 0], range(2)) is None


def test_memory_is_bounded_and_what_is_used_stays() -> None:
    prefixes = PrefixMap(size=10)
    for number in range(1000):
        prefixes.remember([0, number + 1], number % 2)
        assert len(prefixes) <= 10
    assert prefixes.find([0], [0, 0], range(2)) == 1
    assert prefixes.find([1], [0, 0], range(2)) is None
