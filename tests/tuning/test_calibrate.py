"""Store measured ratios as corrections, apply them to their own device only, and let them change a decision."""

import pytest
import torch

from attnfx.cost import Question, select
from attnfx.ir import algebra as A
from attnfx.options import Options
from attnfx.report.records import Candidate, Decision
from attnfx.spec import AttentionSpec, I, J
from attnfx.tuning import calibrate as calibration

CPU = torch.device("cpu")
CAUSAL = AttentionSpec(score=A.where(A.ge(I, J), A.mul(A.const(0.125), A.DOT), A.const(float("-inf"))))
ASK = Question(CAUSAL, dict(B=1, H=8, G=8, T=2048, S=2048, D=64, Dv=64), "float32", refused={"flash": "", "decode": ""})


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNFX_CACHE_DIR", str(tmp_path))


def measured(tier, predicted, ms, *others):
    return Decision(tier, "", predicted, measured_ms=ms, alternatives=others)


def test_a_correction_is_the_geometric_mean_by_tier_and_direction():
    untimed = Candidate("chunked", "", 5.0)
    found = calibration.fit(
        [
            (measured("library", 1.0, 2.0, Candidate("kept", "", 4.0, measured_ms=2.0), untimed), False),
            (measured("library", 1.0, 8.0), False),
            (measured("library", 2.0, 2.0), True),
        ]
    )
    assert found == pytest.approx({"kept/forward": 0.5, "library/forward": 4.0, "library/training": 1.0})


def test_corrections_change_the_prediction_and_the_reason_says_so():
    plain = select(ASK, Options())
    corrected = select(ASK, Options(), corrections={"library/forward": 20.0, "library/training": 0.1})
    assert plain.tier == "library" and "calibrated" not in plain.reason
    assert corrected.tier != "library" and "calibrated on this device" in corrected.reason
    of = {c.tier: c.predicted_ms for c in (corrected, *corrected.alternatives)}
    assert of["library"] == pytest.approx(20 * plain.predicted_ms)


def test_what_is_stored_is_found_for_this_device_and_these_versions_alone(monkeypatch):
    assert calibration.corrections(CPU) == {}
    calibration.store(CPU, {"library/forward": 1.5})
    assert calibration.corrections(CPU) == {"library/forward": 1.5}
    found = calibration.fingerprint(CPU)
    for changed in ({**found, "device": "another"}, {**found, "versions": {}}, {**found, "threads": 99}):
        monkeypatch.setattr(calibration, "fingerprint", lambda _, changed=changed: changed)
        assert calibration.corrections(CPU) == {}


@pytest.mark.parametrize("value", [[], "x", {"library/forward": "x"}, {"library/forward": -1.0}, {"kept/forward": 1e9}])
def test_corrections_that_make_no_sense_are_not_used(value):
    calibration.CORRECTIONS.put(calibration._key(CPU), value)
    assert calibration.corrections(CPU) == {}
