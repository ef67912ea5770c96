"""Values that are fine alone and contradict each other, or lack what they need.

Most are rows of a table: a key, when it is at fault, what is wrong and how to fix it; the others are small generators
of faults. `check` goes through all of them. What needs a model, a file or a device to be known is checked where those
are opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from miles.component import TEACHER_NEEDS, Component
from miles.config.base import AUTO, NONE
from miles.config.components import WITHOUT_REWARDS, Use, learns_without_rewards
from miles.config.data import Sampling, TaskSet
from miles.config.derived import Misfit, Numbers
from miles.config.faults import Fault, Origin
from miles.config.leaves import Path, pattern
from miles.config.leaves import leaves as schema_leaves
from miles.config.placement import Placement, generates
from miles.config.schema import Config
from miles.config.teacher import POLICY
from miles.errors import MilesError
from miles.kinds import KINDS
from miles.registry import Registry
from miles.targets import import_target

UNMET = {
    "routed_experts": "the expert choices of the rollout",
}
"""Needs of components that the core of this version cannot meet."""
_ESTIMATE = "--advantage-estimator grpo (`miles plugins --kind advantage_estimators` lists them), or leave it out"
IN_WORKERS = (
    "bridges", "model_transforms", "precision_schemes", "routing_replays", "train_backends", "policy_losses",
    "loss_masks",
)  # fmt: skip
"""Kinds that train workers build; engines besides, where they are not the driver's."""
GENERATED = {"rollout_log_probs": "rollout log-probs", "greedy_rollout": "a greedy rollout of each prompt"}
"""Needs that an engine meets which generates."""


def check(
    config: Config, uses: Sequence[Use], registry: Registry, origin: Callable[[Path], Origin], purpose: str
) -> list[Fault]:
    """What is contradictory in a configuration whose parts are valid.

    Args:
        uses: the components it names.
        origin: of a path.
        purpose: `train`, `rollout`, `eval` or `show`: what must be there.
    """
    checked = _Checked(config, uses, registry, origin)
    return [fault for one in (*_CHECKS, *_NEEDED.get(purpose, ())) for fault in one(checked)]


@dataclass(frozen=True)
class _Checked:
    config: Config
    uses: Sequence[Use]
    registry: Registry
    origin: Callable[[Path], Origin]

    def fault(self, key: str | Path, problem: str, remedy: str) -> Fault:
        """A fault at a path, with its value and origin looked up."""
        path = tuple(key.split(".")) if isinstance(key, str) else key
        return Fault(".".join(path), problem, remedy, self.value(path), self.origin(path))

    def value(self, path: Path) -> Any:
        at: Any = self.config
        for part in path:
            if isinstance(at, tuple):
                at = next(item for item in at if item.name == part)
            else:
                at = getattr(at, part)
        return at

    def at_default(self, path: Path) -> bool:
        return self.value(path) == schema_leaves()[pattern(path)].default

    def component(self, kind: str, name: str) -> Component:
        """Or one that needs and provides nothing: of `auto` and `none`, and of a name at fault, which is reported
        already."""
        try:
            return self.registry.component(kind, name)
        except MilesError:
            return Component("nothing:nothing")

    @cached_property
    def needs(self) -> set[str]:
        """What all chosen components need together."""
        return {need for use in self.uses for need in self.component(use.kind, use.name).needs}

    @property
    def generates(self) -> bool:
        """As the engine says; not, where its name is at fault."""
        try:
            return generates(self.config, self.registry)
        except MilesError:
            return False

    @cached_property
    def task_sets(self) -> dict[Path, TaskSet]:
        """Those of training and of evaluation, by their paths."""
        sections = {"data": self.config.data.sets, "eval": self.config.eval.sets}
        return {(section, "sets", one.name): one for section, sets in sections.items() for one in sets}


def _supervised(config: Config) -> bool:
    """Nothing estimates advantages."""
    return config.algorithm.advantage_estimator.name == NONE


_RULES: tuple[tuple[str, Callable[[Config], Any], str, str], ...] = (
    ("algorithm.kl_coef", lambda c: c.algorithm.kl_coef and c.algorithm.kl_loss_coef,
     "the KL penalty is in the reward, and in the loss too (kl_loss_coef={algorithm.kl_loss_coef}): it counts twice",
     "set one of algorithm.kl_coef and algorithm.kl_loss_coef to 0"),
    ("train.context_parallel_size",
     lambda c: c.train.context_parallel_size > 1 and c.train.reproducible_ranks is not None,
     "ranks that share the tokens of a sample add up in another order than one alone, which no float64 mends",
     "leave --reproducible-ranks out, or --context-parallel-size"),
    ("train.fsdp_reshard", lambda c: c.train.fsdp_reshard == "step" and c.train.reproducible_ranks is not None,
     "reduces gradients once a step, and --reproducible-ranks each micro-batch's by itself",
     "--fsdp-reshard layer or auto, or leave --reproducible-ranks out"),
    ("algorithm.unbiased_kl", lambda c: c.algorithm.unbiased_kl and not c.algorithm.kl_loss_coef,
     "corrects the KL of the loss, but algorithm.kl_loss_coef is 0",
     "set --kl-loss-coef, or leave --use-unbiased-kl out"),
    *((f"algorithm.{name}", lambda c, name=name: _supervised(c) and getattr(c.algorithm, name),
       "is about advantages, and there are none", _ESTIMATE)
      for name in ("advantage_terms", "normalize_advantages", "kl_coef")),
    ("algorithm.aggregation_constant",
     lambda c: c.algorithm.aggregation_constant is not None and c.algorithm.loss_aggregation != "constant",
     "is for loss aggregation 'constant', not {algorithm.loss_aggregation!r}",
     "add --loss-aggregation constant, or leave the constant out"),
    ("algorithm.is_correction",
     lambda c: c.algorithm.old_logprobs == "rollout" and c.algorithm.is_correction.name != NONE,
     "compares old with rollout log-probs, but old_logprobs is 'rollout': the two are the same numbers",
     "--old-logprobs recompute, or leave the correction out"),
    ("rollout.mode", lambda c: c.rollout.mode != "sync" and c.rollout.engine.name == NONE,
     "nothing is generated, so there is nothing to be ahead of", "--rollout-mode sync"),
    ("rollout.partial_rollout", lambda c: c.rollout.partial_rollout and c.rollout.mode != "sync",
     "is for rollout mode sync: in {rollout.mode} no rollout is interrupted at the end of a step",
     "leave --partial-rollout out, or --rollout-mode sync"),
    ("rollout.mask_offpolicy_in_partial_rollout",
     lambda c: c.rollout.mask_offpolicy_in_partial_rollout and not c.rollout.partial_rollout,
     "there are no partial rollouts", "add --partial-rollout"),
    ("rollout.max_weight_staleness", lambda c: c.rollout.max_weight_staleness is not None
     and c.rollout.mode != "fully_async" and not c.rollout.partial_rollout,
     "nothing grows old in rollout mode {rollout.mode}: batches are one weight version old at most",
     "--rollout-mode fully_async, or leave --max-weight-staleness out"),
    ("weight_sync.interval",
     lambda c: c.rollout.most_staleness is not None and c.weight_sync.interval > c.rollout.most_staleness + 1,
     "engines would have weights that are older than --max-weight-staleness allows ({rollout.most_staleness}), and "
     "nothing that they draw could be trained on",
     "raise --max-weight-staleness to the interval less 1, or lower --update-weights-interval"),
    ("run.deterministic", lambda c: c.run.deterministic and c.rollout.partial_rollout,
     "cannot be promised with partial rollouts: which of them end first depends on time",
     "leave --partial-rollout out, or --no-deterministic-mode"),
    ("resources.colocate", lambda c: c.resources.colocate and c.rollout.mode != "sync",
     "trainer and engines take turns, but rollout mode {rollout.mode!r} needs both at once",
     "--rollout-mode sync, or --no-colocate"),
    ("run.deterministic", lambda c: c.run.deterministic and c.rollout.mode != "sync",
     "cannot be promised in rollout mode {rollout.mode!r}", "--rollout-mode sync, or --no-deterministic-mode"),
    ("run.deterministic", lambda c: c.run.deterministic and c.weight_sync.interval > 1,
     "cannot be promised with weight_sync.interval={weight_sync.interval}: a run that is interrupted between two syncs "
     "resumes with newer weights in the engines than it had",
     "--update-weights-interval 1, or --no-deterministic-mode"),
    ("optimizer.lr_decay_steps", lambda c: c.optimizer.lr_decay_steps is not None
     and c.optimizer.lr_decay_steps <= c.optimizer.lr_warmup_steps,
     "ends before the warm-up of {optimizer.lr_warmup_steps} steps does",
     "raise --lr-decay-iters or lower --lr-warmup-iters"),
    ("eval.interval", lambda c: c.eval.interval is not None and not c.eval.sets,
     "there is nothing to evaluate on", "give --eval-prompt-data NAME PATH, or --eval-interval none"),
    ("moe.routing_replay", lambda c: c.moe.routing_replay.name != NONE,
     "replaying expert choices is not in this version", "--routing-replay none"),
)  # fmt: skip
"""(key, when it is at fault, problem with values of the configuration in braces, remedy)"""

_NEED_RULES: tuple[tuple[str, Callable[[Config, set[str]], Any], str, str], ...] = (
    ("critic.only_steps",
     lambda c, needs: "critic" in needs and 0 < (c.rollout.num_rollout or 0) <= c.critic.only_steps,
     "leaves the policy nothing to learn from: the run has {rollout.num_rollout} rollout batches",
     "lower --num-critic-only-steps or raise --num-rollout"),
    ("teacher.load", lambda c, needs: needs & TEACHER_NEEDS and not c.teacher.load and not c.teacher.urls
     and all(s.generate.name == AUTO for s in c.data.sets),  # others may teach
     "who teaches? a chosen component learns from a teacher, and none is named",
     "--opd-teacher-load CHECKPOINT, or --opd-teacher-urls URL of a server"),
    ("teacher.urls", lambda c, needs: "teacher_logits" in needs and c.teacher.urls,
     "the policy loss {algorithm.policy_loss.name!r} compares all logits, which no server sends",
     "--opd-teacher-load CHECKPOINT, or another --policy-loss"),
    ("teacher.urls", lambda c, needs: "teacher_top_k" in needs and c.teacher.load and c.teacher.urls,
     "teachers in the trainer say whole distributions and servers say a few tokens of them: one loss cannot compare "
     "with both", "have all teachers in teacher.load, or all in teacher.urls"),
    ("teacher.load", lambda c, needs: needs & TEACHER_NEEDS and c.teacher.load and c.teacher.prompt_key is None
     and {*c.teacher.load.values(), *c.teacher.urls} == {POLICY},
     "the policy agrees with itself: it must be told more than it was asked",
     "--opd-teacher-prompt-key KEY, or the checkpoint of another model"),
    ("train.context_parallel_size", lambda c, needs: "logits" in needs and c.train.context_parallel_size > 1,
     "the policy loss {algorithm.policy_loss.name!r} needs the logits of whole samples, of which each rank has a part",
     "--context-parallel-size 1, or another --policy-loss"),
    ("teacher.engine", lambda c, needs: needs & TEACHER_NEEDS and c.teacher.engine is not None and not c.teacher.urls,
     "there is no server to speak to", "give --opd-teacher-urls, or leave it out"),
)  # fmt: skip
"""The same of what is at fault with what the chosen components need."""

_OTHER_POLICY = "so that the policy that acted is not the one that is trained: importance ratios would be wrong"
_CUTS = f"cuts tokens off, {_OTHER_POLICY}"
_SAMPLING: tuple[tuple[str, Callable[[Sampling], Any], str, str], ...] = (
    ("top_p", lambda s: s.top_p != 1, _CUTS, "use top_p=1.0 in training; evaluation sets may truncate"),
    ("top_k", lambda s: s.top_k > 0, _CUTS, "use top_k=-1 in training; evaluation sets may truncate"),
    ("min_p", lambda s: s.min_p != 0, _CUTS, "use min_p=0.0 in training; evaluation sets may truncate"),
    ("min_new_tokens", lambda s: s.min_new_tokens, f"forbids stop tokens at first, {_OTHER_POLICY}",
     "use min_new_tokens=0 in training, and a reward for length if need be; evaluation sets may set it"),
    ("temperature", lambda s: s.temperature == 0,
     "greedy sampling gives every sample of a group the same response, and so nothing to learn from",
     "use a temperature above 0 in training; evaluation sets may be greedy"),
)  # fmt: skip
"""The same for what training samples may not be drawn with."""


def _rules(c: _Checked) -> Iterator[Fault]:
    alone = [row for row in _RULES if row[1](c.config)]
    of_needs = [row for row in _NEED_RULES if row[1](c.config, c.needs)]
    for key, _, problem, remedy in (*alone, *of_needs):
        yield c.fault(key, problem.format(**dict(c.config)), remedy)


def _estimator(c: _Checked) -> Iterator[Fault]:
    a = c.config.algorithm
    if not _supervised(c.config) and WITHOUT_REWARDS in c.component("policy_losses", a.policy_loss.name).provides:
        problem = f"policy loss {a.policy_loss.name!r} looks at no advantages: nothing would be learnt from them"
        yield c.fault("algorithm.advantage_estimator", problem, "--advantage-estimator none, or another --policy-loss")
    estimator, *terms = [spec.name.rpartition("/")[2] for spec in (a.advantage_estimator, *a.advantage_terms)]
    if estimator in terms:
        problem = f"{estimator!r} is the estimator and a term beside it too: it counts twice"
        yield c.fault("algorithm.advantage_terms", problem, "leave it out, or name another --advantage-estimator")


def _idle(c: _Checked) -> Iterator[Fault]:
    """Settings of a model that no chosen component needs."""
    for section, needs in (("critic", {"critic"}), ("teacher", TEACHER_NEEDS)):
        if c.needs & needs:
            continue
        names = sorted({offer.name for offer in c.registry.components() if offer.value.needs & needs})
        remedy = f"choose one that does ({', '.join(names) or 'none is installed'}), or leave it out"
        for name in type(getattr(c.config, section)).model_fields:
            if not c.at_default((section, name)):
                yield c.fault(f"{section}.{name}", f"no chosen component needs a {section}", remedy)


def _teachers(c: _Checked) -> Iterator[Fault]:
    section = c.config.teacher
    for name in sorted(set(section.load) & set(section.urls)) if c.needs & TEACHER_NEEDS else ():
        yield c.fault("teacher.urls", f"{name!r} is also in teacher.load", "give each teacher a name of its own")


def _sampling(c: _Checked) -> Iterator[Fault]:
    temperatures = {s.name: s.sampling.temperature for s in c.config.data.sets}
    if len(set(temperatures.values())) > 1:
        yield c.fault(
            "data.sets",
            f"temperatures differ ({temperatures}): the trainer scores a batch at one temperature",
            "give all training sets the same sampling.temperature",
        )
    for task_set in c.config.data.sets:
        for name, at_fault, problem, remedy in _SAMPLING:
            if at_fault(task_set.sampling):
                yield c.fault(("data", "sets", task_set.name, "sampling", name), problem, remedy)


def _lengths(c: _Checked) -> Iterator[Fault]:
    limit = c.config.rollout.max_context_len
    for at, task_set in c.task_sets.items():
        sampling = task_set.sampling
        if sampling.min_new_tokens > sampling.max_new_tokens:
            yield c.fault(
                (*at, "sampling", "min_new_tokens"),
                f"is more than max_new_tokens={sampling.max_new_tokens}",
                "lower min_new_tokens or raise max_new_tokens",
            )
        if limit is not None and sampling.max_new_tokens >= limit:
            yield c.fault(
                (*at, "sampling", "max_new_tokens"),
                f"leaves no room for a prompt within rollout.max_context_len={limit}",
                "raise --rollout-max-context-len or lower --rollout-max-response-len",
            )


def _placement(c: _Checked) -> Iterator[Fault]:
    try:
        placement = Placement.of(c.config, c.registry)
    except Misfit as error:
        yield c.fault(error.key, error.problem, error.remedy)
    except MilesError:
        return  # a name at fault, which is reported already
    else:
        yield from _objects(c, placement)


def _objects(c: _Checked, placement: Placement) -> Iterator[Fault]:
    """Workers build their parts by name: an object given in Python is lost unless its name leads to it."""
    kinds = (*IN_WORKERS, *(("rollout_engines",) if placement.engines != "driver" else ()))
    for use in () if placement.one_process else c.uses:
        if use.kind in kinds and use.path[0] != "teacher" and not _found_by_name(use, c.registry):
            problem = f"workers are other processes, and know {KINDS[use.kind].singular} {use.name!r} by its name alone"
            remedy = "give a function or a class of a module that can be imported (not the script), options beside it"
            yield Fault(use.key, problem, remedy, use.name, c.origin(use.path))


def _found_by_name(use: Use, registry: Registry) -> bool:
    """Whether another process gets the same from a component's name."""
    try:
        entry = registry.entry(use.kind, use.name)
    except MilesError:
        return True  # `auto`, or a name at fault, which is reported already
    if entry.live is None:
        return True
    try:
        return not use.name.startswith("__main__:") and import_target(entry.component.target) is entry.live
    except MilesError:
        return False


def _learning_rates(c: _Checked) -> Iterator[Fault]:
    o = c.config.optimizer
    for section, its, prefix in (("optimizer", o, "--"), ("critic", c.config.critic.optimizer(o), "--critic-")):
        if its.lr_schedule != "constant" and its.min_lr > its.lr:
            remedy = f"lower {prefix}min-lr or raise {prefix}lr"
            yield c.fault(f"{section}.min_lr", f"is above the peak lr={its.lr}", remedy)


def _pass_k(c: _Checked) -> Iterator[Fault]:
    most = max((s.n_samples_per_prompt or 1 for s in c.config.eval.sets), default=None)
    if most is not None and any(k > most for k in c.config.eval.pass_k):
        problem = f"pass@k needs k samples of each prompt; the sets draw {most} at most"
        yield c.fault("eval.pass_k", problem, "raise --n-samples-per-eval-prompt or lower --eval-pass-k")


def _export(c: _Checked) -> Iterator[Fault]:
    try:
        (c.config.checkpoint.save_hf or "").format(step=0)
    except (LookupError, ValueError) as error:
        problem = f"cannot be filled in ({type(error).__name__}: {error}): only {{step}} is replaced"
        yield c.fault("checkpoint.save_hf", problem, "such as --save-hf hf/{step}")


def _needs(c: _Checked) -> Iterator[Fault]:
    """What components need of the core is there. Components that need an environment stand in sets that have one."""
    for use in c.uses:
        task_set = c.task_sets.get(use.path[:3])
        judged = [task_set] if task_set is not None else c.config.data.sets if use.kind == "rewards" else ()
        worldless = [one.name for one in judged if one.environment is None]
        who = f"{KINDS[use.kind].singular} {use.name!r} needs"
        for need in sorted(c.component(use.kind, use.name).needs):
            problem, remedy = "", ""
            if need in UNMET:
                problem, remedy = f"{who} {UNMET[need]}, which is not in this version", "name another component"
            elif need in GENERATED and not c.generates and c.config.rollout.replay is None:
                engine = c.config.rollout.engine.name
                problem = f"{who} {GENERATED[need]}, but the engine {engine!r} generates nothing"
                remedy = "name another component, or another --rollout-engine"
            elif need == "advantages" and _supervised(c.config):
                problem, remedy = f"{who} advantages, and there are none", _ESTIMATE
            elif need == "environment" and worldless:
                where = ".".join(use.path[:3]) if task_set is not None else f"data.sets.{worldless[0]}"
                problem, remedy = f"{who} an environment", f"set {where}.environment"
            if problem:
                key = ".".join(use.path[:4]) if task_set is not None else use.key
                yield Fault(key, problem, remedy, use.name, c.origin(use.path))


def _plugins(c: _Checked) -> Iterator[Fault]:
    """Plugins are loaded before the configuration is complete; nothing said later may differ."""
    loaded = c.registry.plugins
    for key, known in (("block", loaded.blocked), ("require", loaded.required)):
        late = set(getattr(c.config.plugins, key)) - set(known)
        if late:
            yield c.fault(
                f"plugins.{key}",
                f"{', '.join(sorted(late))}: plugins were loaded without knowing this",
                f"say it in a config file, with --plugins-{key}, or to load_plugins({key}=...)",
            )


_CHECKS = (
    _plugins, _rules, _estimator, _idle, _teachers, _sampling, _lengths, _placement, _learning_rates, _pass_k, _export,
    _needs,
)  # fmt: skip


# ---------------------------------------------------------------------------------------- what must be there, and when


def _checkpoint(c: _Checked) -> Iterator[Fault]:
    if c.config.model.hf_checkpoint is None:
        yield c.fault("model.hf_checkpoint", "which model?", "--hf-checkpoint FOLDER_OR_HUB_NAME")


def _training_data(c: _Checked) -> Iterator[Fault]:
    if not c.at_default(("data", "source")):
        return  # a source of somebody else's may need no files
    if not c.config.data.sets:
        yield c.fault("data.sets", "there is nothing to train on", "--prompt-data FILE")
    if c.config.rollout.replay is None:
        yield from _paths(c, "data", "--prompt-data FILE")


def _evaluation_data(c: _Checked) -> Iterator[Fault]:
    if not c.config.eval.sets:
        yield c.fault("eval.sets", "there is nothing to evaluate on", "--eval-prompt-data NAME PATH")
    if c.at_default(("data", "source")):
        yield from _paths(c, "eval", "--eval-prompt-data NAME PATH")


def _paths(c: _Checked, section: str, remedy: str) -> Iterator[Fault]:
    for at, task_set in c.task_sets.items():
        if at[0] == section and task_set.path is None:
            yield c.fault((*at, "path"), "which file?", remedy)


def _rewards(c: _Checked) -> Iterator[Fault]:
    """Responses that nobody judges teach nothing, unless the algorithm looks at no reward. Generate functions other
    than `auto` may reward by themselves."""
    if not c.generates:
        return
    unjudged = learns_without_rewards(c.config, c.registry)
    for at, task_set in c.task_sets.items():
        if unjudged and at[0] == "data":
            continue
        if c.at_default((*at, "generate")) and not task_set.reward and task_set.environment is None:
            yield c.fault(
                (*at, "reward"),
                "nothing judges the responses",
                "give a reward by name (`miles plugins --kind rewards` lists them), or my_module:my_function",
            )


def _numbers(c: _Checked) -> Iterator[Fault]:
    rollout = c.config.rollout
    if rollout.num_rollout is None and rollout.num_epoch is None:
        yield c.fault("rollout.num_rollout", "how many steps?", "--num-rollout STEPS, or --num-epoch EPOCHS")
    try:
        Numbers.of(c.config)
    except Misfit as error:
        yield c.fault(error.key, error.problem, error.remedy)


def _replayed(c: _Checked) -> Iterator[Fault]:
    if c.config.rollout.replay is not None and c.config.rollout.dump is not None:
        yield c.fault("rollout.dump", "the batches are in rollout.replay already", "leave it out")
    if c.config.rollout.replay is not None and c.config.eval.sets:
        problem = "a run that replays starts no engine, and evaluation needs one"
        remedy = "--eval.sets=[] --eval-interval none, and `miles eval` with --checkpoint afterwards"
        yield Fault("eval.sets", problem, remedy, [s.name for s in c.config.eval.sets], c.origin(("eval", "sets")))


def _dumped(c: _Checked) -> Iterator[Fault]:
    if c.config.rollout.replay is not None:
        yield c.fault("rollout.replay", "is for training: nothing is generated", "miles train, or leave it out")
    if c.config.rollout.dump is None:
        yield c.fault("rollout.dump", "where shall the batches go?", "--dump FOLDER")


_NEEDED: dict[str, tuple[Callable[[_Checked], Iterator[Fault]], ...]] = {
    "train": (_checkpoint, _training_data, _rewards, _numbers, _replayed),
    "rollout": (_checkpoint, _training_data, _rewards, _numbers, _dumped),
    "eval": (_checkpoint, _evaluation_data, _rewards),
}
