// Which metric is drawn where. A metric that nothing here asks for is drawn under "Other": plugins log what they like.

/** `metrics`: names, or one expression whose group 1 names the curve. `each`: a chart for every value of group 1. */
const CATALOGUE = [
  {
    title: "Reward",
    charts: [
      { title: "Reward", metrics: ["rollout/reward"], always: true, hint: "mean over the samples of a step" },
      { title: "Accuracy", metrics: ["rollout/accuracy"], hint: "share of samples with a reward of at least 1" },
      { title: "Parts of the reward", metrics: /^rollout\/reward_parts\/(.+)$/ },
      { title: "Prompts whose samples agree", metrics: ["rollout/groups_agreeing"], hint: "share of prompts all of whose samples got the same reward, from which a group-relative estimator learns nothing" },
    ],
  },
  {
    title: "Evaluation",
    charts: [
      { each: /^eval\/(.+)\/accuracy$/, title: "accuracy", metrics: (set) => [`eval/${set}/accuracy`] },
      { each: /^eval\/(.+)\/reward$/, title: "reward", metrics: (set) => [`eval/${set}/reward`] },
      { each: /^eval\/(.+)\/pass@\d+$/, title: "pass@k", metrics: (set, names) => names.filter((n) => n.startsWith(`eval/${set}/pass@`)), name: (n) => n.split("/").pop(), hint: "chance that one of k samples succeeds, estimated without bias" },
      { each: /^eval\/(.+?)\/reward_parts\/.+$/, title: "parts of the reward", metrics: (set, names) => names.filter((n) => n.startsWith(`eval/${set}/reward_parts/`)), name: (n) => n.split("/reward_parts/").pop() },
      { each: /^eval\/(.+)\/response_len\/mean$/, title: "response length", metrics: (set) => ["mean", "max", "min"].map((k) => `eval/${set}/response_len/${k}`) },
      { each: /^eval\/(.+)\/failed_ratio$/, title: "failed", metrics: (set) => [`eval/${set}/failed_ratio`], quiet: 0 },
      { each: /^eval\/(.+)\/truncated_ratio$/, title: "truncated", metrics: (set) => [`eval/${set}/truncated_ratio`] },
    ],
  },
  {
    title: "Policy",
    charts: [
      { title: "KL to the reference", metrics: ["train/kl_loss"], hint: "by the configured estimator, before its coefficient" },
      { title: "KL to the sampling policy", metrics: ["train/ppo_kl"], hint: "old minus new log-probability, averaged over tokens: how far the updates of one batch went" },
      { title: "Entropy", metrics: ["train/entropy"], hint: "of the next-token distribution, in nats" },
      { title: "Clip fraction", metrics: ["train/pg_clipfrac", "train/pg_clipfrac_low", "train/pg_clipfrac_high"], name: (n) => n.replace("train/pg_clipfrac", "").replace("_", "") || "all", hint: "share of tokens whose ratio was clipped" },
      { title: "Ratio", metrics: ["train/ratio"], hint: "new to old probability, averaged over tokens" },
      { title: "Size of the advantages", metrics: ["train/advantage_abs"], hint: "mean absolute value over trainable tokens" },
      { title: "Perplexity of what was sampled", metrics: ["train/ppl", "rollout/ppl"], name: (n) => (n.startsWith("train") ? "trainer" : "engine") },
    ],
  },
  {
    title: "Optimisation",
    charts: [
      { title: "Loss", metrics: ["train/loss"] },
      { title: "Policy loss", metrics: ["train/pg_loss"] },
      { title: "Gradient norm", metrics: ["train/grad_norm"], log: true, hint: "before clipping" },
      { title: "Learning rate", metrics: ["train/lr"] },
      { title: "Skipped and repeated", metrics: ["train/skipped_steps", "train/skipped_batches", "train/oom_retries"], quiet: 0, hint: "optimizer steps that were not finite, batches without a trainable token, steps done again in smaller pieces" },
    ],
  },
  {
    title: "Lengths and outcomes",
    charts: [
      { title: "Response length", metrics: ["mean", "max", "min"].map((k) => `rollout/response_len/${k}`), hint: "tokens" },
      { title: "Truncated", metrics: ["rollout/truncated_ratio"], hint: "share of samples that hit a length limit" },
      { title: "Failed", metrics: ["rollout/failed_ratio"], quiet: 0, hint: "share of samples that ended in an error" },
      { title: "Turns", metrics: ["rollout/turns/mean"], quiet: 1 },
      { title: "What became of the samples", hint: "trained, or why not", metrics: /^rollout\/samples\/(.+)$/ },
    ],
  },
  {
    title: "Trainer against engine",
    charts: [
      { title: "Log-probability difference", metrics: ["train/train_rollout_logprob_abs_diff"], log: true, hint: "mean absolute difference between trainer and engine on the same tokens" },
      { title: "KL between trainer and engine", metrics: ["train/train_rollout_kl"] },
      { title: "Chi-square between trainer and engine", metrics: ["train/train_rollout_chi2"] },
      { title: "After a weight sync", metrics: ["weight_sync/logprob_abs_diff"], log: true },
      { title: "Importance weights", metrics: ["is/weight_mean", "is/weight_max"], name: (n) => n.replace("is/weight_", ""), hint: "what multiplies a token's loss, 0 where a correction drops it" },
      { title: "Effective sample size", metrics: ["is/effective_sample_size"], hint: "share of the tokens that would say as much with weights of one size" },
      { title: "Tokens that a correction touches", metrics: ["low", "high", "rejected"].map((k) => `is/fraction_${k}`), name: (n) => n.replace("is/fraction_", ""), hint: "share whose ratio is beyond a bound, and share that is dropped" },
    ],
  },
  {
    title: "Throughput",
    charts: [
      { title: "Tokens per second", metrics: ["perf/tokens_per_second", "perf/generate_tokens_per_second"], name: (n) => (n.includes("generate") ? "while generating" : "whole step") },
      { title: "Seconds per step", metrics: ["perf/step_time"] },
      { title: "Tokens per step", metrics: ["rollout/generated_tokens", "rollout/trained_tokens"], name: (n) => n.split("/")[1].split("_")[0] },
      { title: "Prompt tokens from the cache", metrics: ["rollout/cached_ratio"], hint: "share that was not computed again" },
      { title: "Overhead", metrics: ["perf/overhead_share"], hint: "share of a step in which neither engine nor trainer worked" },
    ],
  },
];

/** Drawn under "Where the time went", and not again under "Other". */
const PHASES = [
  { name: "rollouts", metric: "perf/rollout_time", hint: "generation, rewards, evaluation" },
  { name: "training", metric: "perf/train_time", hint: "log-probabilities, optimizer steps, checkpoints" },
  { name: "weight sync", metric: "perf/sync_time" },
  { name: "moving", metric: "perf/move_time", hint: "models on and off the accelerator" },
];
const ELSEWHERE = new Set(["step", "perf/step_time", "perf/generate_time", "perf/workers_time", ...PHASES.map((p) => p.metric)]);

/** Charts of all sections for metrics of these names: `[{title, charts: [{title, hint, log, curves: [{metric, name}]}]}]`. */
function arrange(names) {
  const used = new Set(ELSEWHERE);
  const last = (metric) => metric.split("/").pop();
  const chart = (spec, title, metrics, name, named = false) => {
    const curves = metrics.filter((metric) => names.includes(metric)).map((metric) => ({ metric, name: name(metric) }));
    curves.forEach(({ metric }) => used.add(metric));
    return { title, hint: spec.hint, log: spec.log, quiet: spec.quiet, always: spec.always, named, curves };
  };
  const sections = CATALOGUE.map(({ title, charts }) => ({
    title,
    charts: charts.flatMap((spec) => {
      if (spec.each) {
        const sets = [...new Set(names.map((n) => spec.each.exec(n)?.[1]).filter(Boolean))];
        return sets.map((set) => chart(spec, `${set}: ${spec.title}`, spec.metrics(set, names), spec.name ?? last));
      }
      if (spec.metrics instanceof RegExp) {
        return chart(spec, spec.title, names.filter((n) => spec.metrics.test(n)), (n) => spec.metrics.exec(n)[1], true);
      }
      return chart(spec, spec.title, spec.metrics, spec.name ?? last);
    }),
  }));
  const evaluation = sections[1].charts; // the charts of a set beside each other
  evaluation.sort((a, b) => a.title.split(": ")[0].localeCompare(b.title.split(": ")[0]));
  const others = names.filter((n) => !used.has(n)).map((n) => chart({}, n, [n], last));
  return [...sections, { title: "Other", charts: others }];
}
