"""Prints what a quickstart run learned.

python show.py RUN_DIRECTORY
"""

import json
import sys
from pathlib import Path

LABELS = {"heldout": "greedy", "heldout_sampled": "sampled"}


def show(run: Path) -> str:
    summary = json.loads((run / "summary.json").read_text())
    lines = [f"\n{'held-out accuracy':<20}{'before RL':>12}{'after RL':>12}"]
    for name, said in summary["evaluation"].items():  # none, in a run that was told to leave it out
        first, last = (said[when]["accuracy"] for when in ("first", "last"))
        lines.append(f"{LABELS.get(name, name):<20}{first:>12.3f}{last:>12.3f}")
    lines.append(f"\n{summary['steps']} steps in {summary['seconds']:.0f} seconds; everything is in {run.resolve()}")
    lines.append("\nsome answers of the last step:")
    newest = max((run / "rollouts").glob("*.jsonl"), default=None)
    samples = [json.loads(line) for line in newest.read_text().splitlines()] if newest else []
    for sample in samples[:: max(len(samples) // 5, 1)][:5]:
        verdict = "right" if sample["reward"] == 1 else f"wrong, {sample['label']} is right"
        lines.append(f"    {sample['prompt']}{sample['response']:<8} {verdict}")
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python show.py RUN_DIRECTORY")
    if not (Path(sys.argv[1]) / "summary.json").exists():
        sys.exit(f"show.py: no finished run in {sys.argv[1]}: there is no summary.json")
    print(show(Path(sys.argv[1])))
