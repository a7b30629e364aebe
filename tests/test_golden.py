"""What was computed once is computed still: seeds, splits, masks, controls, maps and selections, by golden/values.json.

A red section means that runs made before mean something else than runs made now. If that is on purpose: raise the
schema number, say so in CHANGELOG.md, and ``python -m tests.golden.record SECTION``.
"""

import pytest
from golden.fixed import differences
from golden.record import SECTIONS, read


@pytest.mark.parametrize("section", SECTIONS)
def test_values_are_as_recorded(section):
    kept = read()
    assert section in kept, f"python -m tests.golden.record {section}"
    found = differences(kept[section], SECTIONS[section](), section)
    assert not found, f"{len(found)} values differ:\n" + "\n".join(found[:20])


def test_every_recorded_section_is_compared():
    assert read().keys() == SECTIONS.keys()


def test_what_counts_as_a_difference():
    kept = {"hash": "ab", "count": 3, "floats": [0.5, 0.0]}
    assert not differences(kept, {"hash": "ab", "count": 3, "floats": [0.50004, 0.00009]})
    for change in ({"hash": "ac"}, {"count": 4}, {"floats": [0.501, 0.0]}, {"floats": [0.5]}, {"new": 1}):
        assert len(differences(kept, kept | change)) == 1
    assert differences({"right": 90}, {"right": 92}) and not differences({"right": 90}, {"right": 89})
    assert differences([0.5], [float("nan")])
