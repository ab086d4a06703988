"""Profiles in files, and malformed ones."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest

from paci_rt.planner import load_profile, parse_profile
from support.profiles import model


def test_a_profile_survives_its_file(tmp_path):
    profile = replace(model(3, hop_s=1e-3), profiled={"model": "gpt-tiny"}, has_masters=True)
    for one in (profile, replace(profile, bandwidth_bytes_per_s=2e9)):
        (tmp_path / "profile.json").write_text(json.dumps(one.to_json(), allow_nan=False))
        assert load_profile(tmp_path / "profile.json") == one


GOOD = {**model(2).to_json(), "profiled": {"model": "gpt-tiny"}}


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("version", 2, "version is 2, and this program reads version 1"),
        ("version", None, "version is missing: give a number"),
        ("format", "profile", "format is 'profile': give a file that paci-rt plan --profile wrote"),
        ("blocks", [], r"blocks is \[\]: give a list with one entry per block"),
        ("blocks", None, "blocks is missing"),
        ("blocks.1.forward_s", -1.0, r"blocks\[1\].forward_s is -1.0: give a number of at least 0"),
        ("blocks.1.forward_s", math.nan, r"blocks\[1\].forward_s is nan"),
        ("blocks.1.forward_s", "fast", r"blocks\[1\].forward_s is 'fast'"),
        ("blocks.1.forward_s", True, r"blocks\[1\].forward_s is True"),
        ("blocks.0.stash_bytes", None, r"blocks\[0\].stash_bytes is missing"),
        ("blocks.0.stash_bytes", 1.5, r"blocks\[0\].stash_bytes is 1.5: give a whole number"),
        ("blocks.0.role", "center", r"blocks\[0\].role is 'center': give one of first, middle, last"),
        ("blocks.0.role", "last", "the roles of the blocks are last, middle, middle, last"),
        ("blocks.0.colour", "red", r"blocks\[0\] has 'colour', which is unknown"),
        ("blocks.0.name", "", r"blocks\[0\].name is ''"),
        ("blocks.1", 7, r"blocks\[1\] is 7: give a JSON object"),
        ("bandwidth_bytes_per_s", 0, "bandwidth_bytes_per_s is 0: give a number of at least"),
        ("hop_s", 10**400, "hop_s is .*: give"),
        ("has_masters", 1, "has_masters is 1: give true or false"),
        ("profiled", [], r"profiled is \[\]: give an object"),
    ],
)
def test_malformed_profiles(tmp_path, path, value, words):
    """One line that says which key, and what was found."""
    data = copy.deepcopy(GOOD)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    target = data
    for part in parents:
        target = target[part]
    if value is None:
        del target[last]
    else:
        target[last] = value
    with pytest.raises(ValueError, match=words) as caught:
        parse_profile(data)
    assert "\n" not in str(caught.value)


def test_files_that_are_no_profile(tmp_path):
    for text, words in (
        ("{", "is not JSON"),
        ("[1]", "the file is"),
        ("{}", "format is missing"),
        ("\xff", "is not JSON"),
    ):
        (tmp_path / "odd.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=words) as caught:
            load_profile(tmp_path / "odd.json")
        assert "odd.json" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot be read"):
        load_profile(tmp_path / "nowhere.json")
