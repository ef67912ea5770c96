"""The loop. Read this first.

Every step: collect a batch of rollouts, train on it, hand the new weights to the engines, measure. Synchronous,
one-step-off and fully asynchronous training differ in the producer; colocated and disaggregated placement in the
residency; what is generated, judged and learned, in the components that the run was built from. This file names none
of them.

A step ends at a boundary: a consistent picture of everything that changes (weights, optimizer, data position, random
states, the metrics of the step). Checkpoints are pictures of boundaries, so a run that was killed goes on from one as
if nothing had happened: weights to the engines, the evaluation that was due, the next batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles.types import Group, Metrics

if TYPE_CHECKING:
    from miles.run import Run


async def train(run: Run) -> None:
    """Run from `run.step`, where a checkpoint (or the beginning) left it, to the end."""
    await finish_step(run, {**run.metrics, **await sync_weights(run)})
    while run.step < run.derived.num_rollout:
        groups, metrics = await collect(run)
        async with run.residency.training():
            metrics |= await run.learn(groups)
            run.hook.miles_on_train_step_end(run=run, step=run.step, metrics=metrics)
            run.advance(metrics)  # the boundary
            saved = await run.save_if_due()
        if saved or run.sync_due():
            metrics |= await sync_weights(run)
        await finish_step(run, metrics)


async def collect(run: Run) -> tuple[list[Group], Metrics]:
    """A batch of rollouts and its metrics. A request to stop is honoured here: nothing is lost but this batch."""
    async with run.residency.rollout():
        groups, metrics = await run.collect()
    run.hook.miles_on_rollout_end(run=run, step=run.step, groups=groups, metrics=metrics)
    run.hook.miles_modify_samples(run=run, step=run.step, groups=groups)
    return groups, metrics


async def sync_weights(run: Run) -> Metrics:
    """Bring every engine to the trainer's weights; the version is the number of steps they were trained for."""
    metrics = await run.push_weights()
    run.hook.miles_on_weight_sync_end(run=run, version=run.step, metrics=metrics)
    return metrics


async def finish_step(run: Run, metrics: Metrics) -> None:
    """Evaluate if it is due, and write down what this step was like. Step 0 is the untrained policy."""
    if run.eval_due():
        if run.weights_behind():
            metrics |= await sync_weights(run)
        async with run.residency.rollout():
            results = await run.interruptible(run.evaluator.evaluate(run, run.step))
        metrics |= run.note_evaluation(results)
        run.hook.miles_on_eval_end(run=run, step=run.step, metrics=results)
    run.track(metrics)
