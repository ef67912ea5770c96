"""What to use here instead of flags of slime and Miles that are spelt or done otherwise.

Data only. A flag is `renamed` (another spelling, same meaning), `replaced` (done in another way), `elsewhere` (declared
by a plugin that is not installed) or `absent` (not supported, with the reason). Flags that are accepted as they are do
not stand here; a test holds this table against upstream's list.
"""

from __future__ import annotations

from functools import cache

RENAMED: dict[str, str] = {
    "offload": "--offload-train --offload-rollout",
    "skip-eval-before-train": "--no-eval-before-train",
    "calculate-per-token-loss": "--loss-aggregation token_mean",
    "fully-async": "--rollout-mode fully_async",
    "use-rollout-logprobs": "--old-logprobs rollout",
    "skip-actor-forward-only": "--old-logprobs rollout",
    "use-routing-replay": "--routing-replay r2",
    "use-rollout-routing-replay": "--routing-replay r3",
    "use-tis": "--is-correction tis",
    "custom-tis-function-path": "--is-correction my_module:my_function",
    "custom-loss-function-path": "--policy-loss my_module:my_function",
    "custom-advantage-function-path": "--advantage-estimator my_module:my_function",
    "custom-rm-path": "--rm-type my_module:my_function",
    "custom-generate-function-path": "--generate my_module:my_function",
    "dynamic-sampling-filter-path": "--rollout-filters agreeing_rewards, or my_module:my_filter",
    "data-source-path": "--data-source my_module:MySource",
    "eval-function-path": "--evaluator my_module:MyEvaluator",
    "multimodal-keys": "--image-key",
    "use-tensorboard": "--tracking jsonl,tensorboard",
    "use-wandb": "--tracking jsonl,wandb",
    "dump-details": "--run-dir: every run writes metrics.jsonl and rollouts/ there",
    "num-gpus-per-node": "--actor-num-gpus-per-node",
    "reward-key": "a reward returns named parts, among which `reward` is the scalar",
    "eval-reward-key": "a reward returns named parts, among which `reward` is the scalar",
    "custom-config-path": "miles train CONFIG.yaml [MORE.yaml ...]",
    "eval-config": "the section eval.sets of a config file",
    "ref-ckpt-step": "--ref-load, with the checkpoint itself",
    "start-rollout-id": "--resume: a run goes on from its newest checkpoint; --resume never starts anew",
    "disable-rollout-global-dataset": "--data-source my_module:MySource",
    "max-seq-len": "--rollout-max-context-len",
    "eval-max-context-len": "--rollout-max-context-len",
    "eval-max-prompt-len": "--rollout-max-prompt-len",
    "optimizer": "nothing: the optimizer is AdamW",
}
"""Flag -> what to write instead."""

REPLACED: tuple[tuple[str, str], ...] = (
    ("the loss has a name of its own: --policy-loss sft, or another name", "loss-type"),
    ("--kl-loss-coef above 0 is enough", "use-kl-loss"),
    ("--advantage-estimator dr_grpo does not divide by the standard deviation", "disable-grpo-std-normalization"),
    ("normalisation belongs to the estimator: name one without it", "disable-rewards-normalization"),
    ("--policy-loss sft needs no advantages", "disable-compute-advantages-and-returns"),
    ("--loss-aggregation names the reducer", "custom-pg-loss-reducer-function-path"),
    ("a reward with the method `score_group(group)` judges a group at once", "group-rm"),
    ("a reward is any async function or class, and may call a server: --rm-type my_module:MyReward", "rm-url"),
    (
        "implement the hook miles_modify_samples in a plugin",
        "custom-reward-post-process-path rollout-sample-filter-path rollout-sample-hook-path "
        "rollout-data-postprocess-path custom-convert-samples-to-train-data-path",
    ),
    (
        "implement the hook miles_on_rollout_end or miles_on_eval_end in a plugin",
        "custom-rollout-log-function-path custom-eval-rollout-log-function-path rollout-all-samples-process-path",
    ),
    ("implement the hook miles_on_worker_start in a plugin", "custom-megatron-init-path"),
    ("implement the hook miles_on_checkpoint_saved in a plugin", "custom-megatron-post-save-hook-path"),
    (
        "implement the hook miles_on_train_step_end in a plugin, or a train backend of your own",
        "custom-megatron-before-log-prob-hook-path custom-megatron-before-train-step-hook-path",
    ),
    (
        "write a generate function or an environment: --generate my_module:f, --environment my_module:MyWorld",
        "rollout-function-path custom-agent-function-path generate-tool-specs-path generate-tool-call-parser "
        "generate-execute-tool-function-path",
    ),
    ("chat formats are components: --chat-format NAME", "chat-template-path loss-mask-type tito-model"),
    (
        "tokens of the model are never tokenised again, in any generate function: there is nothing to turn on",
        "use-session-server session-server-ip session-server-port session-message-matcher "
        "session-sample-picker-path session-sample-postprocessor-path",
    ),
    (
        "mismatch between rollout and trainer is measured in every run, from a real recomputation",
        "get-mismatch-metrics use-rollout-entropy observe-training-entropy",
    ),
    ("weights are compared through log-probs after a sync: --weight-sync-verify", "check-weight-update-equal"),
    (
        "--weight-sync-verify and --weight-sync-tolerance say how weights are compared",
        "check-weight-update-selector check-weight-update-skip-list check-weight-update-allow-quant-error "
        "check-lora-weight-equal save-local-weight-checksum",
    ),
    ("micro-batches are always balanced by tokens over ranks", "balance-data balance-by-flops"),
    ("sizes need not divide: --incomplete-groups and --max-failed-fraction", "allow-partial-train-step"),
    ("--incomplete-groups says what becomes of them", "disable-rollout-trim-samples use-dynamic-global-batch-size"),
    ("--num-rollout 1", "debug-exit-after-rollout"),
    ("--lr 0 trains nothing", "debug-disable-optimizer"),
    ("a run with --rollout-engine none trains on data alone", "debug-train-only load-debug-rollout-data"),
    ("miles eval generates and judges without training", "debug-rollout-only"),
    (
        "samples of every step are in rollouts/ of the run directory: --dump-samples",
        "save-debug-rollout-data save-debug-trajectory-data save-debug-train-data log-multi-turn log-correct-samples",
    ),
    ("metrics of every step are in metrics.jsonl of the run directory", "save-debug-event-data log-reward-category"),
    ("pass@k is always reported where several samples are drawn: --eval-pass-k", "log-passrate"),
    ("versions of everything are in summary.json of the run directory", "env-report"),
    (
        "--model-transforms my_module:MyTransform says what is trainable",
        "only-train-params-name-list freeze-params-name-list freeze-indexer",
    ),
    ("a bridge names a model family in every world: --bridge", "megatron-to-hf-mode model-name"),
    ("a bridge or a train backend of your own", "custom-model-provider-path"),
    (
        "engines belong to a rollout engine's options: --rollout.engine.OPTION=VALUE",
        "rollout-num-gpus rollout-num-gpus-per-engine rollout-external rollout-external-engine-addrs "
        "prefill-num-servers use-miles-router miles-router-timeout miles-router-max-connections "
        "miles-router-health-check-failure-threshold rollout-health-check-interval rollout-health-check-timeout "
        "rollout-health-check-first-wait no-sglang-lora-use-virtual-experts",
    ),
    (
        "transports are components with options: --weight-sync NAME, --weight_sync.transport.OPTION=VALUE",
        "update-weight-mode update-weight-transport update-weight-disk-dir update-weight-local-checkpoint-dir "
        "update-weight-delta-encoding update-weight-delta-checksum update-weight-disk-keep-files "
        "custom-update-weight-post-write-path p2p-transfer-num-workers p2p-transfer-timeout",
    ),
    ("executors have options: --resources.executor.OPTION=VALUE", "train-env-vars pin-rollout-manager-to-head"),
    ("a checkpoint is always complete: model, optimizer, data position, random states", "no-save-optim"),
    ("send SIGTERM: the run saves and stops", "save-trigger-sentinel"),
    ("set HTTP_PROXY in the environment", "http-proxy"),
    ("special tokens stay in the token stream; text is decoded without them", "rollout-skip-special-tokens"),
)
"""(how it is done here, flags)."""

ELSEWHERE: tuple[tuple[str, str], ...] = (
    (
        "miles-lora (model transform `lora`)",
        "lora-rank lora-alpha lora-dropout lora-type target-modules exclude-modules lora-adapter-path "
        "lora-sync-from-tensor lora-base-cpu-backup lora-train-only experts-shared-outer-loras",
    ),
    (
        "miles-distillation (advantage term `distillation`)",
        "use-opd opd-type opd-kl-coef opd-log-prob-top-k opd-top-k-strategy opd-reward-weight-mode "
        "opd-topk-per-position opd-teacher-urls opd-teacher-key opd-teacher-load opd-teacher-ckpt-step",
    ),
    (
        "miles-ppo (advantage estimator `gae`, a critic)",
        "critic-num-nodes critic-num-gpus-per-node critic-load critic-save critic-lr critic-lr-warmup-iters "
        "num-critic-only-steps value-clip gamma lambd",
    ),
    ("miles-is-correction (`tis`, `mis`, `icepop`, `m2po`)", "tis-clip tis-clip-low use-opsm opsm-delta"),
    ("miles-true-on-policy", "true-on-policy-mode recompute-logprobs-via-prefill debug-deterministic-collective"),
    (
        "miles-wandb (tracker `wandb`)",
        "wandb-mode wandb-dir wandb-key wandb-host wandb-team wandb-group wandb-project disable-wandb-random-suffix "
        "wandb-always-use-train-step wandb-run-id",
    ),
    (
        "miles-megatron (train backend `megatron`)",
        "tensor-model-parallel-size pipeline-model-parallel-size context-parallel-size expert-model-parallel-size "
        "expert-tensor-parallel-size sequence-parallel recompute-granularity recompute-method recompute-num-layers "
        "attention-backend attention-softmax-in-fp32 accumulate-allreduce-grads-in-fp32 optimizer-cpu-offload "
        "overlap-cpu-optimizer-d2h-h2d use-precision-aware-optimizer attention-dropout hidden-dropout "
        "qkv-format linear-attention-backend miles-dsa-topk-backend dsa-attention-backend allgather-cp "
        "extra-high-precision-layers-hf extra-high-precision-layers-megatron padded-vocab-size megatron-config-path "
        "megatron-deepgemm-forward-layers megatron-deepgemm-moe-forward-layers qwen-gdn-backend "
        "stream-optimizer-state-to-disk stream-optimizer-state-moment-dtype use-stateless-adam "
        "rematerialize-param-from-master-weight check-rematerialize-param-from-master-weight "
        "data-pad-size-multiplier recompute-loss-function enable-mtp-training mtp-num-layers "
        "mtp-loss-scaling-factor use-indexer-replay use-rollout-indexer-replay",
    ),
    (
        "miles-ray (executor `ray`)",
        "object-store-backend mooncake-store-init-kwargs mooncake-replica-num rollout-data-transport "
        "distributed-backend distributed-timeout-minutes use-distributed-post release-train",
    ),
)
"""(plugin of ours that declares it, flags). Only reached while that plugin is not installed."""

ABSENT: tuple[tuple[str, str], ...] = (
    (
        "asynchronous rollouts (--rollout-mode) are not in this version",
        "rollout-submission-granularity partial-rollout mask-offpolicy-in-partial-rollout max-weight-staleness "
        "async-max-concurrent-samples async-data-buffer-capacity-factor async-unused-samples-handler "
        "custom-async-data-buffer-path buffer-filter-path pause-generation-mode keep-old-actor",
    ),
    (
        "a separate fleet for evaluation is not in this version: live engines evaluate",
        "eval-num-gpus eval-num-gpus-per-engine eval-hf-dir eval-max-in-flight eval-overflow-policy "
        "eval-keep-snapshots",
    ),
    (
        "fault tolerance of workers is not in this version: a run that died goes on with the same command",
        "use-fault-tolerance ft-components control-server-port mini-ft-controller-enable "
        "mini-ft-controller-poll-interval mini-ft-controller-resume-delay indep-dp ci-ft-test-actions",
    ),
    (
        "training several adapters at once is not in this version",
        "multi-lora-n-adapters multi-lora-adapter multi-lora-idle-poll-s multi-lora-http-server-path "
        "multi-lora-backend-path multi-lora-api-port multi-lora-disable-service-mode "
        "multi-lora-max-adapter-global-batch-size multi-lora-max-coalesce-wait-s "
        "multi-lora-max-empty-wait-s",
    ),
    (
        "write a tracker: --tracking my_module:MyTracker",
        "use-mlflow mlflow-tracking-uri mlflow-experiment-name mlflow-run-name mlflow-run-id use-prometheus "
        "prometheus-port prometheus-run-name",
    ),
    ("event files stand in the run directory, under its name: --run-dir", "tb-project-name tb-experiment-name"),
    (
        "offloading goes to the CPU's memory only",
        "offload-rollout-level offload-train-target offload-train-disk-dir offload-train-disk-chunk-mb "
        "train-memory-margin-bytes low-memory-resume",
    ),
    (
        "use the profilers of torch, in the hook miles_on_worker_start",
        "dumper-enable dumper-dir dumper-inference dumper-fwd-only dumper-fwd-bwd "
        "dumper-source-patcher-config-inference dumper-source-patcher-config-train memory-snapshot-dir "
        "memory-snapshot-num-steps profile-target memory-recorder record-memory-history mfu-peak-tflops",
    ),
    (
        "debugging aids of upstream's own tests; the tests of miles do without",
        "debug-skip-weight-update enable-event-analyzer enable-witness witness-buffer-size "
        "ci-inject-rollout-data-path ci-inject-rollout-data-start-rollout-id "
        "ci-inject-rollout-data-min-match-ratio ci-test ci-disable-kl-checker ci-disable-logprobs-checker "
        "ci-disable-weight-update-checker ci-metric-checker-key ci-metric-checker-threshold ci-save-grad-norm "
        "ci-load-grad-norm ci-save-model-hash ci-check-model-hash ci-train-rollout-logprob-abs-diff-threshold "
        "load-debug-rollout-data-subsample load-forge-rollout-data",
    ),
    (
        "an outside rollout service is a data source or a generate function of your own",
        "rollout-buffer-url fetch-trajectory-retry-times min-batch-collection-ratio rollout-task-type",
    ),
    ("trainer and ranks split a batch in one place", "delay-split-train-data-by-dp"),
    ("checkpoints are written before the next step begins", "async-save"),
    ("the reference model stays as it is", "ref-update-interval"),
    ("the optimizer keeps its state over the whole run", "reset-optimizer-states"),
)
"""(why not, and what is nearest; flags)."""


@cache
def replies() -> dict[str, str]:
    """Flag without dashes -> what to use instead."""
    table = {flag: f"write {text}" for flag, text in RENAMED.items()}
    for text, flags in REPLACED:
        table |= dict.fromkeys(flags.split(), text)
    for plugin, flags in ELSEWHERE:
        table |= dict.fromkeys(flags.split(), f"it belongs to {plugin}, which is not installed")
    for text, flags in ABSENT:
        table |= dict.fromkeys(flags.split(), f"not supported: {text}")
    return table


def reply_to(flag: str) -> str | None:
    """What to use instead of an upstream flag; None when it is none, or is accepted here as it is."""
    return replies().get(flag.removeprefix("--"))
