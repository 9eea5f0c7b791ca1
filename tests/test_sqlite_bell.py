"""The bell wakes its owner, and a dead owner's bell cannot be rung."""

import os
import select

import pytest

from filao.engines.sqlite.bell import Bell, is_alive, ring


@pytest.fixture
def bell(tmp_path):
    bell = Bell(tmp_path)
    yield bell
    bell.close()


def test_a_ring_wakes_the_owner_and_names_the_queue(bell, tmp_path) -> None:
    assert bell.heard() == set()
    for queue in (7, 8, 7):
        ring(tmp_path, bell.name, queue)
    assert select.select([bell.reader], [], [], 10)[0] == [bell.reader]
    assert bell.heard() == {7, 8}
    assert bell.heard() == set()


def test_more_rings_than_fit_are_rings_enough(bell, tmp_path) -> None:
    for _ in range(20_000):
        ring(tmp_path, bell.name, 7)
    while bell.heard():
        pass
    ring(tmp_path, bell.name, 8)
    assert bell.heard() == {8}


def test_an_owner_that_died_is_found_dead(bell, tmp_path) -> None:
    assert is_alive(tmp_path, bell.name)
    os.close(bell.reader)  # as the kernel does when a process ends, however it ends
    os.close(bell._writer)
    bell.reader = bell._writer = -1
    assert not is_alive(tmp_path, bell.name)
    ring(tmp_path, bell.name, 7)  # for nobody, and no error


def test_a_bell_that_was_taken_down_belongs_to_nobody(tmp_path) -> None:
    bell = Bell(tmp_path)
    bell.close()
    assert not is_alive(tmp_path, bell.name)
    ring(tmp_path, bell.name, 7)
