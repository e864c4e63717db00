"""Packed objects and the order of use against a dict and a list, over many random changes."""

import random
import struct

import numpy as np
import pytest

from kvfs.objects.packed_objects import PackedObjects
from kvfs.objects.use_order import NO_SLOT, UseOrder

BLOCK = 4096


def packed(*extents) -> bytes:
    return b"".join(struct.pack("<QQ", *extent) for extent in extents)


def check(objects: PackedObjects, model: dict) -> None:
    assert len(objects) == len(model)
    assert {objects.row(slot) for slot in objects.slots()} == set(model.values())
    for (identity, key), row in model.items():
        assert objects.row(objects.find(identity, key)) == row


@pytest.mark.parametrize("same_hashes", [False, True])
def test_as_a_dict(monkeypatch, same_hashes):
    """Keys of all lengths, zero bytes at their ends, in several pieces or none; searches that go far."""
    if same_hashes:  # few places to begin at, at the end of the table
        monkeypatch.setattr(
            "kvfs.objects.packed_objects._hash", lambda identity, key: (1 << 62) - 1 - key[0] % 3
        )
    rng = random.Random(3)
    objects, model = PackedObjects(BLOCK), {}
    for number in range(2000):
        length = rng.choice((1, 2, 16, 17, 33)) if number < 1500 else 64
        identity, key = rng.randrange(3), rng.randbytes(1) + bytes(length - 1)
        slot = objects.find(identity, key)
        assert (slot != NO_SLOT) == ((identity, key) in model)
        if slot != NO_SLOT:
            assert objects.row(slot) == model.pop((identity, key))
            objects.remove(slot)
        else:
            extents = rng.choice([(), ((number, 2),), ((number, 1), (7, 1))])
            row = number, identity, key, 2 * BLOCK if extents else 0, extents
            model[identity, key] = row
            assert objects.row(objects.add(*row)) == row
        if number % 100 == 0:
            check(objects, model)
    check(objects, model)
    assert objects.identities() == {each: sum(found == each for found, _ in model) for each in range(3)}
    assert {objects.key(slot) for slot in objects.slots(1)} == {key for identity, key in model if identity == 1}


def test_loaded():
    """From rows, whole, split and such as no check would let pass; then changed."""
    rows = [(n, n % 2, b"%d" % (n // 2), BLOCK, 9 - n, packed((n, 1))) for n in range(10)]
    rows += [
        (20, 0, b"split" * 10, 2 * BLOCK, 30, packed((30, 1), (40, 1))),
        (21, 0, b"empty", 0, 31, b""),
        (22, 0, b"short", 2 * BLOCK, 32, packed((50, 1))),
        (23, 0, b"torn", BLOCK, 33, packed((60, 1))[:-1]),
    ]
    objects = PackedObjects(BLOCK)
    last_uses, num_lbas = objects.load([rows[:4], rows[4:]])
    assert last_uses.tolist() == [row[4] for row in rows]
    assert num_lbas.tolist() == [1] * 10 + [2, 0, 1, 0]
    extents = [((n, 1),) for n in range(10)] + [((30, 1), (40, 1)), (), ((50, 1),), ()]
    model = {(row[1], row[2]): (*row[:4], where) for row, where in zip(rows, extents, strict=True)}
    check(objects, model)
    objects.remove(objects.find(0, b"split" * 10))
    objects.add(99, 5, b"new", BLOCK, ((70, 1),))
    del model[0, b"split" * 10]
    check(objects, {**model, (5, b"new"): (99, 5, b"new", BLOCK, ((70, 1),))})


def test_nothing_loaded():
    objects = PackedObjects(BLOCK)
    assert [each.tolist() for each in objects.load([])] == [[], []]
    assert objects.find(1, b"key") == NO_SLOT and objects.slots() == [] and objects.identities() == {}


def test_order_of_use():
    """Exact, whatever is taken out and put back."""
    rng = random.Random(5)
    order, model = UseOrder(), list(range(50))
    rng.shuffle(model)
    order.add_slots(50)
    order.fill(np.array(model))
    order.add_slots(14)
    for _ in range(3000):
        slot = rng.randrange(64)
        assert (slot in order) == (slot in model)
        if slot in model:
            order.remove(slot)
            model.remove(slot)
        else:
            order.append(slot)
            model.append(slot)
        assert order.oldest == (model[0] if model else NO_SLOT)
    while model:
        assert order.oldest == model.pop(0)
        order.remove(order.oldest)
    assert order.oldest == NO_SLOT and order.num_slots == 64
