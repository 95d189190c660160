"""The training that is compared with open_clip's: both runs see the same and learn the same."""

import pytest

from benchmarks import end_to_end, peers

pytestmark = pytest.mark.skipif(
    peers.why_not("open_clip") is not None, reason="open_clip is what is compared"
)


@pytest.mark.slow
def test_both_runs_of_a_seed_learn_the_same():
    run = end_to_end.train_seed(0, {"max_steps": 3, "batch_size": 16})
    ours, plain = end_to_end.OURS, end_to_end.PLAIN
    assert run["steps"] == 3
    assert set(run["seconds"]) == {ours, plain}
    assert run["last_loss"][ours] == pytest.approx(run["last_loss"][plain], rel=1e-4)
    recalls = [end_to_end.mean_recall(run["evaluation"][name]) for name in (ours, plain)]
    assert recalls[0] == pytest.approx(recalls[1], abs=0.01)
    text = end_to_end.summary([run])
    assert "time of a run:" in text
    assert f"one step of {plain}: " in text


def test_models_that_differ_at_the_start_are_refused(monkeypatch):
    class Other(end_to_end.PlainClip):
        def __init__(self, ours):
            super().__init__(ours)
            self.model.visual.proj.data[0] += 1

    monkeypatch.setattr(end_to_end, "PlainClip", Other)
    with pytest.raises(ArithmeticError, match="image_features of the two models differ"):
        end_to_end.train_seed(0, {"max_steps": 1, "batch_size": 4})
