# SPDX-License-Identifier: MIT
"""The JSON forms: their fields, in the order and with the names that scripts rely on."""

import json
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blksnap_ublk import forms

FIELDS = {
    forms.Device: "device name origin id size state data_path queues depth generation change_number tracking_block unit"
    " snapshots link",
    forms.Snapshot: "id created state error frozen gate_us images storage expires ttl while_pid partitions"
    " gate_writes_us lost_at",
    forms.Image: "image device origin size generation change_number cursor state preserved_bytes link",
    forms.Storage: "used capacity limit on_overflow areas forecast_seconds snapshots wipe copy_rate waiting growing",
    forms.Area: "path start count used",
    forms.Changes: "device since until tracking_block all reason changed_bytes ranges",
    forms.Range: "start length",
    forms.Event: "seq time type snapshot device data",
}


@pytest.mark.parametrize("form", FIELDS)
def test_the_fields_of_the_contract(form: type[msgspec.Struct]) -> None:
    assert list(form.__struct_fields__) == FIELDS[form].split()


def test_the_states_of_the_contract() -> None:
    assert [state.value for state in forms.DeviceState] == ["live", "recovering", "failed"]
    assert [state.value for state in forms.SnapshotState] == ["active", "overflown", "corrupted"]
    assert [path.value for path in forms.DataPath] == ["zero-copy", "copy"]


def test_null_fields_are_written() -> None:
    storage = forms.Storage(used=0, capacity=0, limit=None, on_overflow="break", areas=[], forecast_seconds=None)
    assert json.loads(forms.to_json(storage)) == {
        "used": 0,
        "capacity": 0,
        "limit": None,
        "on_overflow": "break",
        "areas": [],
        "forecast_seconds": None,
        "snapshots": [],
        "wipe": False,
        "copy_rate": None,
        "waiting": 0,
        "growing": False,
    }


@given(st.builds(forms.Area) | st.builds(forms.Event, data=st.dictionaries(st.text(), st.text())))
def test_forms_survive_the_way(form: msgspec.Struct) -> None:
    assert msgspec.json.decode(forms.to_json(form), type=type(form)) == form
    assert "\n" not in forms.to_json(form)


def test_unknown_fields_are_ignored() -> None:
    assert msgspec.json.decode('{"start":1,"length":2,"later":3}', type=forms.Range) == forms.Range(start=1, length=2)


@given(st.floats(0, 4e9))
def test_timestamps(seconds: float) -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", forms.timestamp(seconds))


def test_a_timestamp() -> None:
    assert forms.timestamp(1769860800.25) == "2026-01-31T12:00:00.250000Z"
