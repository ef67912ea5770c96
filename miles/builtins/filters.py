"""Sample filters: which groups are worth training on."""

from __future__ import annotations

from miles.api import Group, Verdict


def agreeing_rewards(group: Group) -> Verdict:
    """Drop a group whose rewards all agree: relative to each other its samples say nothing (DAPO, arXiv:2503.14476).

    The rewards are those of the task alone, without `data.reward_terms`, as DAPO's authors filter by accuracy: a group
    that is all right or all wrong would teach only what was added. The reason names the value, so that the metrics tell
    prompts that are too easy from prompts that are too hard.
    """
    rewards_G = group.task_rewards_G
    if not rewards_G:
        return Verdict(False, "no_rewards")
    if min(rewards_G) == max(rewards_G):
        return Verdict(False, f"agree_{rewards_G[0]:g}")
    return Verdict(True)
