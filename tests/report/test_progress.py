"""The line a step says what matters."""

import io

from miles.report.progress import Progress


def test_the_progress_line():
    out = io.StringIO()
    progress = Progress(4, out)
    progress.line(0, {"eval/heldout/accuracy": 0.25, "eval/heldout/reward": 0.5})
    progress.line(
        1, {"rollout/reward": 0.5, "rollout/accuracy": 0.25, "train/loss": -0.01, "perf/tokens_per_second": 12345}
    )
    first, second = out.getvalue().splitlines()
    assert first == "step 0/4  heldout/accuracy 0.250"
    assert second.startswith("step 1/4  reward 0.500  acc 0.250  loss -0.0100  tok/s 12,345  left 0m0")
