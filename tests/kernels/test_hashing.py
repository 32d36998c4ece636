"""SHA-256 side by side, against hashlib."""

from __future__ import annotations

import hashlib
import random

import pytest

from mediator_peft.kernels import dispatch
from mediator_peft.kernels.hashing import Sha256, update_all


@pytest.fixture(params=["native", "numpy"])
def kernels(request, monkeypatch):
    if request.param == "native" and dispatch.native() is None:
        pytest.skip("no native kernels")
    monkeypatch.setenv("MEDIATOR_PEFT_KERNELS", request.param)


@pytest.mark.parametrize("length", [0, 1, 55, 56, 63, 64, 65, 119, 120, 128, 1000])
def test_one_stream_equals_hashlib(length, kernels):
    data = random.Random(length).randbytes(length)
    digest = Sha256()
    digest.update(data)
    assert digest.hexdigest() == hashlib.sha256(data).hexdigest()
    digest.update(b"more")  # what was asked for in between changes nothing
    assert digest.hexdigest() == hashlib.sha256(data + b"more").hexdigest()


@pytest.mark.parametrize("num_streams", [2, 3, 4, 5, 7])
def test_streams_of_any_lengths_are_hashed_side_by_side(num_streams, kernels):
    chance = random.Random(num_streams)
    digests, twins = [Sha256() for _ in range(num_streams)], [hashlib.sha256() for _ in range(num_streams)]
    for _ in range(40):
        pieces = [chance.randbytes(chance.choice([0, 1, 31, 64, 200, 1000, 5000])) for _ in digests]
        update_all([(digest, memoryview(piece)) for digest, piece in zip(digests, pieces, strict=True)])
        for twin, piece in zip(twins, pieces, strict=True):
            twin.update(piece)
    assert [digest.hexdigest() for digest in digests] == [twin.hexdigest() for twin in twins]
