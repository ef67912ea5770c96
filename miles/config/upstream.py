"""What becomes here of the flags of slime and Miles that are not accepted as they are.

Data, and the one place for it: the command line answers with it, and scripts/migrating.py prints it into
docs/migrating.md. A flag that stands here may still be declared by a plugin that is installed; it is then accepted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

FateOfFlag = Literal["renamed", "replaced", "not in this version", "not supported"]
VALUE = "VALUE"
"""In the new spelling of a flag: its value, as it was."""


@dataclass(frozen=True)
class Answer:
    """What to do instead of a flag."""

    fate: FateOfFlag
    text: str
    """What to write (renamed), how it is done (replaced), what it belongs to, or why not."""

    @property
    def problem(self) -> str:
        """Why the flag is refused."""
        if self.fate == "renamed":
            return "is called otherwise here than in slime and Miles"
        if self.fate == "replaced":
            return "is done otherwise here than in slime and Miles"
        return f"is {self.fate}: {self.text}"

    @property
    def remedy(self) -> str:
        """What to do instead."""
        if self.fate == "renamed":
            return f"write {self.text}"
        return self.text if self.fate == "replaced" else "leave it out"


RENAMED: dict[str, str] = {
    "offload": "--offload-train --offload-rollout",
    "skip-eval-before-train": "--no-eval-before-train",
    "calculate-per-token-loss": "--loss-aggregation token_mean",
    "use-rollout-logprobs": "--old-logprobs rollout",
    "disable-grpo-std-normalization": "--no-grpo-std-normalization",
    "use-tensorboard": "--tracking tensorboard",
    "use-wandb": "--tracking wandb",
    "wandb-run-name": "--run-name VALUE",
    "max-seq-len": "--rollout-max-context-len VALUE",
    "bf16": "--train-dtype bf16",
}
"""Flag -> the words that mean the same."""

SWITCHES: dict[str, tuple[str, str]] = {
    "balance-data": ("--balance", "tokens"),
    "balance-by-flops": ("--balance", "flops"),
    "fully-async": ("--rollout-mode", "fully_async"),
}
"""Switch that is taken as it is -> the flag and the value that it stands for."""

REPLACED: tuple[tuple[str, str], ...] = (
    # ------------------------------------------------------------------------------------------- functions of one's own
    ("pip install miles-compat, which takes such a function as it is; or --rm-type my_module:my_reward, and "
     "docs/migrating.md for what that gets and returns", "custom-rm-path"),
    ("pip install miles-compat, which takes such a function as it is; or --generate my_module:my_generate",
     "custom-generate-function-path"),
    ("--policy-loss my_module:my_loss: a loss for each token; the core averages", "custom-loss-function-path"),
    ("--is-correction my_module:my_correction", "custom-tis-function-path"),
    ("--advantage-estimator my_module:my_estimator", "custom-advantage-function-path"),
    ("--rollout-filters agreeing_rewards, or my_module:my_filter; with miles-compat such a function as it is",
     "dynamic-sampling-filter-path"),
    ("--data-source my_module:MySource", "data-source-path disable-rollout-global-dataset"),
    ("--evaluator my_module:MyEvaluator", "eval-function-path"),
    ("--loss-aggregation names the reducer", "custom-pg-loss-reducer-function-path"),
    ("a reward with the method `score_group(group)` judges a group at once; miles-compat takes the flag for "
     "--custom-rm-path", "group-rm"),
    ("a reward may be an async function that asks a server: --rm-type my_module:my_reward", "rm-url"),
    ("a reward returns named parts, among which `reward` is the scalar; miles-compat takes the flag for "
     "--custom-rm-path", "reward-key"),
    ("a reward returns named parts, among which `reward` is the scalar; with miles-compat, `reward_key` of the reward "
     "of an evaluation set", "eval-reward-key"),
    (
        "implement the hook miles_modify_samples in a plugin",
        "custom-reward-post-process-path rollout-sample-filter-path "
        "rollout-data-postprocess-path custom-convert-samples-to-train-data-path",
    ),
    ("pip install miles-compat, which takes such functions as they are", "rollout-sample-hook-path"),
    ("pip install miles-gateway, which takes such an agent as it is and gives it a session by itself",
     "custom-agent-function-path use-session-server session-server-ip session-server-port"),
    (
        "implement the hook miles_on_rollout_end or miles_on_eval_end in a plugin",
        "custom-rollout-log-function-path custom-eval-rollout-log-function-path rollout-all-samples-process-path",
    ),
    ("implement the hook miles_on_worker_start in a plugin", "custom-megatron-init-path"),
    (
        "the router is SGLang's own (sglang-router)",
        "use-miles-router miles-router-timeout miles-router-max-connections "
        "miles-router-health-check-failure-threshold",
    ),
    (
        "a server that ends or answers no more is found by the requests that it has",
        "rollout-health-check-interval rollout-health-check-timeout rollout-health-check-first-wait",
    ),
    ("implement the hook miles_on_checkpoint_saved in a plugin", "custom-megatron-post-save-hook-path"),
    (
        "implement the hook miles_on_train_step_end in a plugin, or a train backend of your own",
        "custom-megatron-before-log-prob-hook-path custom-megatron-before-train-step-hook-path",
    ),
    (
        "write a generate function (--generate my_module:f) or an environment (--environment my_module:MyWorld)",
        "rollout-function-path",
    ),
    (
        "name the functions: --environment tools with its option `functions` (docs/environments.md)",
        "generate-tool-specs-path generate-execute-tool-function-path",
    ),
    ("the chat format reads calls (--chat-format)", "generate-tool-call-parser"),
    ("a bridge (--bridge) or a train backend (--train-backend) of your own", "custom-model-provider-path spec"),
    ("--model-transforms my_module:MyTransform says what is trainable", "only-train-params-name-list "
     "freeze-params-name-list freeze-indexer"),
    # ---------------------------------------------------------------------------------------------------- the algorithm
    ("--preset sft for `sft_loss`, --policy-loss NAME for another loss; leave `policy_loss` out", "loss-type"),
    ("leave it out: --kl-loss-coef above 0 is enough", "use-kl-loss"),
    ("--preset sft needs no advantages", "disable-compute-advantages-and-returns"),
    ("an estimator that takes rewards as they are: --advantage-estimator my_module:f", "disable-rewards-normalization"),
    ("leave it out: --old-logprobs auto, the default, saves the pass where one optimizer step follows each rollout",
     "skip-actor-forward-only"),
    ("leave it out: rollout and trainer are compared in every run, by a real recomputation",
     "get-mismatch-metrics"),
    ("leave it out: a worker is put wherever a node has a GPU for it (--executor ray)", "num-gpus-per-node"),
    ("leave it out: it is NCCL on GPUs and gloo on CPUs", "distributed-backend"),
    ("in seconds, for calls of workers: --worker-timeout", "distributed-timeout-minutes"),
    ("leave it out: the critic shares the policy's ranks", "critic-num-nodes critic-num-gpus-per-node"),
    ("leave it out: the critic is in every checkpoint, beside the policy", "critic-save"),
    ("leave it out: --opd-teacher-load gives a local teacher, --opd-teacher-urls one that is a server", "opd-type"),
    ("--policy-loss distill_topk, whose option `divergence` is `reverse` (weighs by the student) or `forward` (by the "
     "teacher)", "opd-reward-weight-mode"),
    ("leave it out: a server reports its own likeliest tokens of each position, and nothing else is asked of it",
     "opd-topk-per-position"),
    ("leave it out: train/entropy is a metric of every run", "use-rollout-entropy observe-training-entropy"),
    # ------------------------------------------------------------------------------------------------------ model, data
    ("leave it out: the model's shape is read from the config of --hf-checkpoint",
     "swiglu num-layers hidden-size ffn-hidden-size num-attention-heads group-query-attention num-query-groups "
     "kv-channels qk-layernorm normalization norm-epsilon apply-layernorm-1p use-rotary-position-embeddings "
     "position-embedding-type no-position-embedding rotary-base rotary-percent rotary-interleaved "
     "rotary-scaling-factor use-rope-scaling mscale mscale-all-dim max-position-embeddings seq-length "
     "disable-bias-linear add-qkv-bias untie-embeddings-and-output-weights vocab-size make-vocab-size-divisible-by "
     "padded-vocab-size attention-output-gate use-gated-attention post-self-attn-layernorm post-mlp-layernorm "
     "multi-latent-attention q-lora-rank kv-lora-rank qk-head-dim qk-pos-emb-head-dim v-head-dim num-experts "
     "moe-layer-freq moe-ffn-hidden-size moe-shared-expert-intermediate-size moe-shared-expert-gate moe-router-topk "
     "moe-router-topk-scaling-factor moe-router-num-groups moe-router-group-topk moe-router-score-function "
     "moe-router-dtype moe-router-pre-softmax moe-router-enable-expert-bias"),
    ("leave it out: the config of --hf-checkpoint says how a router is balanced (router_aux_loss_coef)",
     "moe-aux-loss-coeff moe-router-load-balancing-type moe-router-bias-update-rate"),
    ("leave it out: --bridge, or the checkpoint's own model type, names the family", "megatron-to-hf-mode model-name"),
    ("--ref-load, with the checkpoint itself", "ref-ckpt-step"),
    ("--opd-teacher-load, with the checkpoint itself", "opd-teacher-ckpt-step"),
    ("--load, with the checkpoint itself", "ckpt-step"),
    ("leave it out: --load takes weights alone; the run directory's own checkpoints, everything",
     "finetune no-load-optim no-load-rng use-checkpoint-lr-scheduler override-lr-scheduler"),
    ("leave it out: a run goes on from its newest checkpoint; --resume never starts anew", "start-rollout-id"),
    ("chat formats are components: --chat-format NAME", "chat-template-path loss-mask-type tito-model"),
    ("--rollout-max-context-len and --rollout-max-prompt-len hold for evaluation too",
     "eval-max-context-len eval-max-prompt-len"),
    ("the section eval.sets of a config file: miles train CONFIG.yaml", "eval-config"),
    ("config files come first on the command line: miles train CONFIG.yaml [MORE.yaml ...]",
     "config"),
    ("config files come first on the command line: miles train CONFIG.yaml [MORE.yaml ...]. With miles-compat it names "
     "what `args` of such functions holds besides the settings of the run", "custom-config-path"),
    ("leave it out: special tokens stay in the token stream; text is decoded without them",
     "rollout-skip-special-tokens"),
    # --------------------------------------------------------------------------------------------- optimizer and memory
    ("leave it out: the optimizer is AdamW", "optimizer"),
    ("--lr-warmup-iters, in optimizer steps", "lr-warmup-fraction warmup-ratio"),
    ("leave it out: the number of steps follows from --num-rollout or --num-epoch", "train-iters"),
    ("leave it out: dropout is off", "attention-dropout hidden-dropout"),
    ("--gradient-checkpointing", "recompute-granularity recompute-method recompute-num-layers"),
    ("--attention auto, sdpa, varlen, flex or flash", "attention-backend attn-implementation"),
    ("--log-probs-chunk-size bounds the logits that exist at once", "recompute-loss-function"),
    ("leave it out: Megatron's kernels are not used",
     "accumulate-allreduce-grads-in-fp32 attention-softmax-in-fp32 transformer-impl no-rope-fusion "
     "no-masked-softmax-fusion no-gradient-accumulation-fusion moe-token-dispatcher-type moe-enable-deepep "
     "moe-grouped-gemm moe-permute-fusion moe-token-drop-policy enable-experimental"),
    ("leave it out: samples are packed end to end, without padding", "qkv-format data-pad-size-multiplier"),
    ("--max-nonfinite-steps says how many steps with NaN are skipped before the run stops",
     "no-check-for-nan-in-loss-and-grad"),
    # ------------------------------------------------------------------------------------------------- rollout, batches
    ("--num-steps-per-rollout instead of --global-batch-size: that many steps, whatever the batch came to",
     "allow-partial-train-step use-dynamic-global-batch-size"),
    ("leave it out: nothing is trimmed; --incomplete-groups says what becomes of groups with failed samples",
     "disable-rollout-trim-samples"),
    ("leave it out: tokens of the model are never tokenised again, in any generate function",
     "session-message-matcher session-sample-picker-path session-sample-postprocessor-path"),
    ("leave it out: log-probs of engine and trainer are compared after the first sync (--weight-sync-verify, "
     "--weight-sync-tolerance)",
     "check-weight-update-equal check-weight-update-selector check-weight-update-skip-list "
     "check-weight-update-allow-quant-error check-lora-weight-equal save-local-weight-checksum"),
    # ------------------------------------------------------------------------------------- checkpoints, logs, debugging
    ("send SIGTERM: the run saves and stops; the same command goes on", "save-trigger-sentinel"),
    ("--num-rollout 1", "debug-exit-after-rollout"),
    ("--lr 0 trains nothing", "debug-disable-optimizer"),
    ("--replay FOLDER trains on rollouts that were kept, and --preset sft on texts; no engine is started",
     "debug-train-only"),
    ("miles rollout --dump FOLDER generates and judges without training", "debug-rollout-only"),
    ("--dump-rollouts FOLDER keeps every batch, for --replay", "save-debug-rollout-data"),
    ("--replay FOLDER, of what --dump-rollouts or `miles rollout` wrote; files of slime and Miles are not read",
     "load-debug-rollout-data"),
    ("leave it out: samples of every step are in rollouts/ of the run directory (--dump-samples)",
     "save-debug-trajectory-data save-debug-train-data log-multi-turn log-correct-samples"),
    ("leave it out: metrics and samples of every step are in the run directory (--run-dir)",
     "dump-details save-debug-event-data"),
    ("miles report RUN: curves and samples in one HTML file", "use-miles-dashboard"),
    ("leave it out: every named part of a reward is a metric", "log-reward-category"),
    ("leave it out: pass@k is reported where several samples are drawn; --eval-pass-k names other k", "log-passrate"),
    ("leave it out: versions of everything are in plugins.json and summary.json of the run directory", "env-report"),
    ("leave it out: event files stand in the run directory (--run-dir)",
     "tb-project-name tb-experiment-name tensorboard-dir"),
    ("install the plugin miles-ppo or miles-reinforce-plus-plus, which declare it", "gamma"),
    ("install the plugin miles-ppo, which declares it", "lambd"),
    ("install the plugin miles-distillation, which declares it",
     "use-opd opd-kl-coef opd-log-prob-top-k opd-top-k-strategy"),
    ("install the plugin miles-wandb, which declares it",
     "wandb-project wandb-team wandb-group wandb-mode wandb-host wandb-dir wandb-run-id"),
    ("WANDB_API_KEY in the environment, or `wandb login`", "wandb-key"),
    ("leave it out: a run is called --run-name, and its steps are rollout steps",
     "disable-wandb-random-suffix wandb-always-use-train-step"),
    ("a tracker of your own: --tracking my_module:MyTracker",
     "use-mlflow mlflow-tracking-uri mlflow-experiment-name mlflow-run-name mlflow-run-id use-prometheus "
     "prometheus-port prometheus-run-name"),
    ("the profilers of torch, started in the hook miles_on_worker_start of a plugin",
     "memory-snapshot-dir memory-snapshot-num-steps memory-snapshot-path profile-target memory-recorder "
     "record-memory-history use-pytorch-profiler profile-step-start profile-step-end"),
    ("--weight-sync broadcast or disk", "update-weight-transport"),
    ("leave it out: the two newest folders stay", "update-weight-disk-keep-files"),
    ("leave it out: engines read --update-weight-disk-dir themselves", "update-weight-local-checkpoint-dir"),
    ("leave it out: xxh3-128 where xxhash is installed, else blake2b", "update-weight-delta-checksum"),
    ("a weight sync of your own: --weight-sync my_module:MySync", "custom-update-weight-post-write-path"),
    ("environment variables are set in the shell: workers inherit them", "train-env-vars"),
    ("HTTP_PROXY in the environment", "http-proxy"),
)  # fmt: skip
"""(how it is done here, flags)."""

LATER: tuple[tuple[str, str], ...] = (
    (
        "images in prompts (a row that has any is an error)",
        "multimodal-keys",
    ),
    (
        "LoRA (miles-lora)",
        "lora-rank lora-alpha lora-dropout lora-type target-modules exclude-modules lora-adapter-path "
        "lora-sync-from-tensor lora-base-cpu-backup lora-train-only experts-shared-outer-loras",
    ),
    (
        "training several adapters at once",
        "multi-lora-n-adapters multi-lora-adapter multi-lora-idle-poll-s multi-lora-http-server-path "
        "multi-lora-backend-path multi-lora-api-port multi-lora-disable-service-mode "
        "multi-lora-max-adapter-global-batch-size multi-lora-max-coalesce-wait-s multi-lora-max-empty-wait-s",
    ),
    (
        "replay of expert choices (miles-routing-replay)",
        "use-routing-replay use-rollout-routing-replay use-indexer-replay use-rollout-indexer-replay",
    ),
    (
        "training that equals the rollout bit for bit (miles-true-on-policy)",
        "true-on-policy-mode recompute-logprobs-via-prefill debug-deterministic-collective",
    ),
    ("8-bit training (miles-fp8)", "fp8-format fp8-recipe fp8-param-gather first-last-layers-bf16 "
     "extra-high-precision-layers-hf extra-high-precision-layers-megatron"),
    (
        "the train backend Megatron and what it divides a model by (miles-megatron)",
        "tensor-model-parallel-size pipeline-model-parallel-size expert-model-parallel-size "
        "expert-tensor-parallel-size sequence-parallel decoder-first-pipeline-num-layers "
        "decoder-last-pipeline-num-layers use-distributed-optimizer optimizer-cpu-offload "
        "overlap-cpu-optimizer-d2h-h2d use-precision-aware-optimizer linear-attention-backend "
        "miles-dsa-topk-backend dsa-attention-backend allgather-cp megatron-config-path "
        "megatron-deepgemm-forward-layers megatron-deepgemm-forward-modules megatron-deepgemm-moe-forward-layers "
        "megatron-deepgemm-moe-forward-modules qwen-gdn-backend stream-optimizer-state-to-disk "
        "stream-optimizer-state-moment-dtype use-stateless-adam rematerialize-param-from-master-weight "
        "check-rematerialize-param-from-master-weight enable-mtp-training mtp-num-layers mtp-loss-scaling-factor",
    ),
    (
        "how data travels between processes and is split among ranks",
        "object-store-backend mooncake-store-init-kwargs mooncake-replica-num rollout-data-transport "
        "use-distributed-post release-train "
        "pin-rollout-manager-to-head delay-split-train-data-by-dp dp-replicate-size",
    ),
    ("servers of their own for prefill and decode", "prefill-num-servers"),
    ("several models in one fleet of servers", "sglang-config"),
    ("adapters in SGLang", "no-sglang-lora-use-virtual-experts"),
    ("weights by RDMA; `broadcast` sends them over NCCL", "p2p-transfer-num-workers p2p-transfer-timeout"),
    (
        "asynchronous rollouts: --max-weight-staleness bounds what is under way and what is kept",
        "rollout-submission-granularity async-max-concurrent-samples async-data-buffer-capacity-factor "
        "custom-async-data-buffer-path buffer-filter-path keep-old-actor",
    ),
    (
        "a separate fleet of engines for evaluation; the live engine evaluates",
        "eval-num-gpus eval-num-gpus-per-engine eval-hf-dir eval-max-in-flight eval-overflow-policy "
        "eval-keep-snapshots",
    ),
    (
        "training on a part of kept rollouts, or on those of other programs",
        "load-debug-rollout-data-subsample load-forge-rollout-data",
    ),
    (
        "replacing workers that died one by one; with --max-restarts a run starts again from its last checkpoint",
        "use-fault-tolerance ft-components control-server-port mini-ft-controller-enable "
        "mini-ft-controller-poll-interval mini-ft-controller-resume-delay indep-dp",
    ),
)  # fmt: skip
"""(what it belongs to, flags). `(miles-x)` is the package it is planned for, which does not exist yet."""

UNSUPPORTED: tuple[tuple[str, str], ...] = (
    (
        "offloading goes to the CPU's memory, whole, and only between phases (--offload-train, --offload-rollout)",
        "offload-rollout-level offload-train-target offload-train-disk-dir offload-train-disk-chunk-mb "
        "train-memory-margin-bytes low-memory-resume fsdp-cpu-offload fsdp-cpu-backend fsdp-state-dict-cpu-offload",
    ),
    ("bf16 always keeps fp32 masters, and there is no fp16 (--train-dtype)", "fp16 disable-fp32-master"),
    ("schedules are constant, linear or cosine, with a warm-up from 0 (--lr-decay-style)", "lr-warmup-init "
     "lr-wsd-decay-iters lr-wsd-decay-style"),
    ("a checkpoint is always complete: model, optimizer, data position, random states", "no-save-optim no-save-rng"),
    ("checkpoints are written before the next step begins, in one format", "async-save ckpt-format"),
    ("the reference model stays as it is", "ref-update-interval"),
    ("the optimizer keeps its state over the whole run", "reset-optimizer-states"),
    (
        "an outside rollout service is a data source or a generate function of your own",
        "rollout-buffer-url fetch-trajectory-retry-times min-batch-collection-ratio rollout-task-type",
    ),
    (
        "an aid of upstream's own tests and debugging",
        "debug-skip-weight-update enable-event-analyzer enable-witness witness-buffer-size ci-ft-test-actions "
        "ci-inject-rollout-data-path ci-inject-rollout-data-start-rollout-id "
        "ci-inject-rollout-data-min-match-ratio ci-test ci-disable-kl-checker ci-disable-logprobs-checker "
        "ci-disable-weight-update-checker ci-metric-checker-key ci-metric-checker-threshold ci-save-grad-norm "
        "ci-load-grad-norm ci-save-model-hash ci-check-model-hash ci-train-rollout-logprob-abs-diff-threshold "
        "dumper-enable dumper-dir dumper-inference dumper-fwd-only dumper-fwd-bwd "
        "dumper-source-patcher-config-inference dumper-source-patcher-config-train",
    ),
    ("throughput is measured in tokens a second; the peak of a device is not known", "mfu-peak-tflops"),
)  # fmt: skip
"""(why not, and what is nearest; flags)."""

PREFIXES: dict[str, Answer] = {
    "sglang-": Answer("replaced", "pip install miles-sglang, and --rollout-engine sglang"),
    "router-": Answer("renamed", "--sglang-router-... VALUE"),
}
"""Beginnings of flags that upstream hands through, when no installed engine takes them."""

ACCEPTED: dict[str, str] = {
    "actor-num-nodes": "several need the executor `ray` (miles-ray)",
    "actor-num-gpus-per-node": "1 when not given: so many train ranks on a node, also where it has no GPU",
    "rollout-num-gpus": "without it engines share the trainer's devices, one a rank. With --colocate it must be the "
    "trainer's number, or be left out",
    "rollout-num-gpus-per-engine": "1 with the engine `torch`",
    "colocate": "engines that share the trainer's devices take turns in its memory with it, and do without it as well",
    "update-weight-transfer-mode": "where it is not given: `inprocess` to engines beside the trainer, `broadcast` to "
    "those in workers of their own",
    "apply-chat-template": "for prompts that are text; a list of messages is rendered with or without it",
    "custom-generate-function-path": "with miles-compat, and most functions as they are",
    "custom-rm-path": "with miles-compat. It stands beside --rm-type: give one of the two, or both are added",
    "custom-config-path": "with miles-compat: what `args` of functions holds besides the settings of the run",
    "dynamic-sampling-filter-path": "with miles-compat; `keep_when_insufficient` is not asked for",
    "rollout-sample-hook-path": "with miles-compat: after its generate function alone",
    "group-rm": "with miles-compat, for --custom-rm-path",
    "reward-key": "with miles-compat, for --custom-rm-path",
    "custom-agent-function-path": "with miles-gateway; a `reward` in what the agent returns is the reward",
    "use-session-server": "with miles-gateway, and without a value: there is one kind. --custom-agent-function-path "
    "says it, too",
    "session-server-ip": "with miles-gateway",
    "session-server-port": "with miles-gateway",
    "rm-type": "names differ, see below; `math` takes answers that are not boxed too, and instead of upstream's prefix "
    "`boxed_` there is `{name: math, require_boxed: true}`; also a mapping of weights, or `my_module:my_reward`",
    "rollout-top-p": "1 in training: importance ratios would be wrong otherwise. Evaluation may cut",
    "rollout-top-k": "-1 in training: importance ratios would be wrong otherwise. Evaluation may cut",
    "log-probs-chunk-size": "-1 (one chunk) is written as a large number",
    "global-batch-size": "must divide the samples of a rollout batch",
    "kl-coef": "taken off the reward under every estimator, `grpo` included, which ignores it upstream",
    "eval-interval": "without it the sets are evaluated before and after training; upstream then never does",
    "save": "`checkpoints/` of the run directory when not given",
    "save-interval": "a tenth of the run when not given, and always one at the end",
    "save-hf": "`{step}` instead of `{rollout_id}`; relative to the run directory",
    "load": "weights of a checkpoint of miles; a run finds its own without it. Megatron's `torch_dist` is not read",
    "ref-load": "a Hugging Face folder or hub name; the policy's own start when not given",
    "critic-load": "a Hugging Face folder or hub name, also of a classifier; the policy's start when not given",
    "value-clip": "the loss is half of upstream's, as in the paper",
    "lr-decay-style": "`constant`, `linear` or `cosine`",
    "weight-decay": "on matrices only",
    "sglang-server-concurrency": "another name of `--rollout-concurrency`, whatever the engine",
    "deterministic-mode": "a killed and resumed run then ends bit for bit where an unbroken one does",
}
"""Flag -> what to know of a flag that is accepted: for the page alone."""

VALUES: dict[tuple[str, str], Answer] = {
    ("rewards", "deepscaler"): Answer("replaced", "`math` judges the last formula of a response"),
    ("rewards", "dapo"): Answer(
        "replaced", "`math` (1 or 0 instead of 1 or -1), or `exact_match` with a pattern of your own"
    ),
    ("rewards", "gemma_math"): Answer("replaced", "`math` judges the last formula of a response"),
    ("rewards", "remote_rm"): Answer("replaced", "an async function of your own: --rm-type my_module:my_reward"),
    ("rewards", "random"): Answer("replaced", "a function of your own: --rm-type my_module:my_reward"),
    ("rewards", "deterministic_random"): Answer("replaced", "a function of your own: --rm-type my_module:my_reward"),
    ("rewards", "f1"): Answer("not in this version", "token F1; write it as --rm-type my_module:my_reward"),
    ("rewards", "gpqa"): Answer("not in this version", "letters of choices; write it as --rm-type my_module:my_reward"),
    ("rewards", "ifbench"): Answer("not in this version", "the checks of IFBench"),
    ("train_backends", "megatron"): Answer("not in this version", "Megatron (miles-megatron); `fsdp` is the backend"),
    ("weight_syncs", "p2p"): Answer("not in this version", "weights by RDMA; `broadcast` sends them over NCCL"),
    ("weight_syncs", "disk-delta"): Answer("replaced", "--weight-sync disk --update-weight-mode delta"),
}
"""(kind of component, upstream's name) -> what to use instead, while no plugin offers the name."""


@cache
def answers() -> dict[str, Answer]:
    """Flag without dashes -> what to do instead."""
    table = {flag: Answer("renamed", text) for flag, text in RENAMED.items()}
    for text, flags in REPLACED:
        table |= dict.fromkeys(flags.split(), Answer("replaced", text))
    for text, flags in LATER:
        table |= dict.fromkeys(flags.split(), Answer("not in this version", text))
    for text, flags in UNSUPPORTED:
        table |= dict.fromkeys(flags.split(), Answer("not supported", text))
    return table


def answer_to(flag: str) -> Answer | None:
    """What to do instead of an upstream flag (with its dashes); None when it is not one."""
    name = flag.removeprefix("--")
    found = answers().get(name)
    return found or next((answer for prefix, answer in PREFIXES.items() if name.startswith(prefix)), None)


def known_name(kind: str, name: str) -> Answer | None:
    """What to use instead of upstream's name of a component; None when it is not one."""
    return VALUES.get((kind, name))
