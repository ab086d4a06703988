from __future__ import annotations

import json
from pathlib import Path

from paci_rt.trace import Event, perfetto, write_perfetto

EVENTS = [
    Event(stage=1, action="1F0", start_s=10.5, end_s=10.75, version=0),
    Event(stage=0, action="0F0", start_s=10.0, end_s=10.5, version=2),
]


def test_a_track_a_stage_in_microseconds_from_the_first_event() -> None:
    records = perfetto(EVENTS)["traceEvents"]
    spans = [record for record in records if record["ph"] == "X"]
    assert [(span["name"], span["tid"], span["ts"], span["dur"]) for span in spans] == [
        ("0F0", 0, 0.0, 5e5),
        ("1F0", 1, 5e5, 2.5e5),
    ]
    assert spans[0]["cat"] == "F" and spans[0]["args"] == {"version": 2, "index": 0}
    names = {record["args"]["name"] for record in records if record["name"] == "thread_name"}
    assert names == {"stage 0", "stage 1"}


def test_the_file_is_json_and_may_be_empty(tmp_path: Path) -> None:
    for events in (EVENTS, []):
        write_perfetto(tmp_path / "trace.json", events)
        assert json.loads((tmp_path / "trace.json").read_text()) == perfetto(events)
