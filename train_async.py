"""`python train_async.py ...` is `miles train ... --rollout-mode one_step_off`, unless the arguments name a mode."""

import sys

from miles.cli import main

if __name__ == "__main__":
    asked = any(word.partition("=")[0] in ("--rollout-mode", "--fully-async") for word in sys.argv[1:])
    sys.exit(main(["train", *sys.argv[1:], *([] if asked else ["--rollout-mode", "one_step_off"])]))
