"""Generate functions that are wrong in one way each."""

from dataclasses import replace

from miles.api import LOSS_MASK, GenerateRequest, Status
from miles.builtins.generate import dataset, single_turn
from miles.testing import GenerateFunctionContract


def after(change):
    """The built-in single turn, and then a mistake."""

    async def generate(context, sample):
        sample = await single_turn(context, sample)
        change(sample, context)
        return sample

    return lambda: generate


def trains_the_prompt(sample, context):
    sample.write(LOSS_MASK, 0, [1] * len(sample.tokens))


def shifts_log_probs(sample, context):
    column = sample.columns["rollout_log_probs"]
    sample.columns["rollout_log_probs"] = column[[*range(1, len(column)), 0]]


def drops_a_row(sample, context):
    sample.columns["rollout_log_probs"] = sample.columns["rollout_log_probs"][:-1]


def tokenises_again(sample, context):
    sample.tokens[sample.prompt_length :] = context.chat.render_text("".join(reversed(sample.text)))[
        : sample.response_length
    ]


def set_to(**values):
    def change(sample, context):
        for name, value in values.items():
            setattr(sample, name, value)

    return change


async def two_turns_by_text(context, sample):
    """Asks again with a prompt that was decoded and encoded anew."""
    sample = await single_turn(context, sample)
    again = replace(sample, tokens=context.chat.render_text(context.chat.decode(sample.tokens)))
    await context.generate(GenerateRequest("again", again.tokens, context.sampling, seed=sample.seed))
    return sample


async def invents(context, sample):
    try:
        return await single_turn(context, sample)
    except ConnectionError:
        sample.append([1, 2], {LOSS_MASK: 1})
        sample.status, sample.text = Status.COMPLETED, "?"
        return sample


async def ignores_the_context(context, sample):
    return await single_turn(replace(context, max_context_tokens=None), sample)


async def own_seed(context, sample):
    sample.seed = 0
    return await single_turn(context, sample)


class Shared:
    def __init__(self):
        self.sample = None

    async def __call__(self, context, sample):
        self.sample = sample
        await single_turn(context, sample)
        return self.sample


def of(function):
    return lambda: function


def test_right_ones_pass(passes):
    passes(GenerateFunctionContract, of(single_turn))
    passes(GenerateFunctionContract, of(dataset), trains="responses")


def test_wrong_ones_are_caught(catches):
    catches(
        GenerateFunctionContract,
        {
            "test_a_finished_sample": [
                after(set_to(text="")),
                after(set_to(turns=[])),
                after(set_to(status=Status.PENDING)),
            ],
            "test_columns_are_aligned": [after(shifts_log_probs), after(drops_a_row), after(tokenises_again)],
            "test_only_what_the_model_said_is_trained": [
                after(trains_the_prompt),
                after(lambda sample, context: sample.write(LOSS_MASK, 0, [0] * len(sample.tokens))),
            ],
            "test_tokens_are_never_tokenised_again": [of(two_turns_by_text)],
            "test_an_answer_that_was_cut_is_truncated": [after(set_to(status=Status.COMPLETED))],
            "test_an_aborted_answer_is_aborted_and_goes_on": [after(set_to(status=Status.COMPLETED))],
            "test_the_context_is_not_exceeded": [of(ignores_the_context)],
            "test_siblings_share_their_trajectory": [after(set_to(rollout_id=77)), after(set_to(group_id=77))],
            "test_the_samples_seed_decides_its_draws": [of(own_seed)],
            "test_a_broken_engine_is_no_sample": [of(invents)],
            "test_many_at_once_do_not_meet": [Shared],
        },
    )
