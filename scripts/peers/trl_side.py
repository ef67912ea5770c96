"""TRL's GRPOTrainer on a task folder, one rollout a turn. Run by versus_trl.py, with the Python of `.peers/trl`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
import transformers
import trl
from datasets import load_dataset
from task import Task, Turns, digits
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

transformers.logging.set_verbosity_error()


class Counted(trl.GRPOTrainer):
    """Counts the tokens that are trained on, and knows how long generation took."""

    tokens = 0
    generating = 0.0

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        self.tokens = int(output["completion_mask"].sum())
        return output

    def _generate_single_turn(self, *args, **kwargs):
        started = time.perf_counter()
        output = super()._generate_single_turn(*args, **kwargs)
        self.generating = time.perf_counter() - started
        return output


class TakesTurns(TrainerCallback):
    def __init__(self, turns: Turns, rewards: list[float]):
        self.turns, self.rewards, self.trainer = turns, rewards, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.turns.give(
            ready=f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
        )
        self.wait()

    def on_step_end(self, args, state, control, **kwargs):
        seconds, trainer = time.perf_counter() - self.started, self.trainer
        self.turns.give(seconds=seconds, tokens=trainer.tokens, generating=trainer.generating, reward=self.rewards[-1])
        self.wait()

    def wait(self):
        self.turns.take()
        self.started = time.perf_counter()


def main(folder: Path, task: Task, steps: int, seed: int) -> None:
    turns, rewards = Turns(), []

    def reward(completions, **columns):
        scores = [digits(text) for text in completions]
        rewards.append(sum(scores) / len(scores))
        return scores

    batch = task.prompts * task.samples
    options = trl.GRPOConfig(
        output_dir=str(folder / "trl"),
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        seed=seed,
        learning_rate=task.learning_rate,
        lr_scheduler_type="constant",
        adam_beta2=0.999,
        max_grad_norm=1.0,
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        num_generations=task.samples,
        max_completion_length=task.response_len,
        temperature=1.0,
        beta=0.0,
        loss_type="dapo",
        gradient_checkpointing=False,
    )
    rows = load_dataset("json", data_files=str(folder / "prompts.jsonl"), split="train")
    callback = TakesTurns(turns, rewards)
    trainer = Counted(
        model=AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32),
        reward_funcs=reward,
        args=options,
        train_dataset=rows.rename_column("input", "prompt"),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[callback],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    callback.trainer = trainer
    trainer.train()


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    main(Path(given["folder"]), Task(**given["task"]), given["steps"], given["seed"])
