"""The short form of ``fuzz_outputs.py``."""

import warnings

import pytest
from transformers.utils import logging

from .fuzz_outputs import run


@pytest.mark.slow
def test_a_mutated_output_is_refused_or_gives_the_same(tmp_path):
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, faults = run(200, 0, tmp_path)
    assert not faults, "\n".join(faults)


@pytest.mark.slow
def test_a_mutated_output_without_checksums_gives_no_foreign_exception(tmp_path):
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, faults = run(100, 0, tmp_path, forget=True)
    assert not faults, "\n".join(faults)
