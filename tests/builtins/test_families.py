"""The format by template on templates written as those of other families are, by the contract of chat formats."""

from miles.testing import ChatFormatContract, tiny

LLAMA = (
    "{{ '<|begin_of_text|>' }}{% set ns = namespace(tools=tools) %}"
    "{% for m in messages %}"
    "{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' }}"
    "{% if m.role == 'user' and ns.tools %}{{ 'Say {\"name\": ..., \"parameters\": ...} to call one of these.\n' }}"
    "{% for t in ns.tools %}{{ t | tojson }}\n{% endfor %}{% set ns.tools = none %}{% endif %}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ '; ' if not loop.first else '' }}"
    "{{ '{\"name\": \"' + c.function.name + '\", \"parameters\": ' + c.function.arguments | tojson + '}' }}{% endfor %}"
    "{% elif m.role == 'tool' %}{{ m.content | tojson }}"
    "{% else %}{{ m.content | trim }}{% endif %}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""Starts with a token of its own, strips what is said, says what a tool said as JSON, has no tags around calls."""
MISTRAL = (
    "{{ '<s>' }}{% set ns = namespace(tools=tools, system='') %}"
    "{% if messages and messages[0].role == 'system' %}{% set ns.system = messages[0].content + '\n\n' %}{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}"
    "{% if ns.tools %}{{ '[AVAILABLE_TOOLS] ' + ns.tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + ns.system + m.content + '[/INST]' }}{% set ns.system = '' %}{% set ns.tools = none %}"
    "{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}{{ raise_exception('nine') }}{% endif %}"
    "{{ '[TOOL_RESULTS] {\"content\": ' + m.content | tojson }}"
    "{{ ', \"call_id\": \"' + m.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}{{ ', ' if not loop.first else '' }}"
    '{{ \'{"name": "\' + c.function.name + \'", "arguments": \' + c.function.arguments | tojson }}'
    "{{ ', \"id\": \"' + ('call%05d' | format(loop.index0)) + '\"}' }}{% endfor %}{{ ']</s>' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + '</s>' }}{% endif %}{% endfor %}"
)
"""Marks where the user ends, and not where the assistant begins, who says a space first; wants ids of nine letters."""
FORGETFUL = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '<A>' + m.content.split('</think>')[-1].lstrip('\n') + '<end>' }}"
    "{% else %}{{ '<' + m.role + '>' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<A><think>\n' }}{% endif %}"
)
"""Opens the thoughts of every turn, and takes them all back."""


def tokenizer_of(template, *special):
    fast = tiny.tokenizer(template)
    fast.add_tokens(list(special), special_tokens=True)
    return fast


class TestLlama(ChatFormatContract):
    name = "template"

    def tokenizer(self):
        headers = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        return tokenizer_of(LLAMA, *headers)


class TestMistral(ChatFormatContract):
    name = "template"

    def tokenizer(self):
        return tokenizer_of(MISTRAL, "<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]")


def test_a_template_that_opens_thoughts_and_takes_them_all_back():
    """The stream keeps them. (Data of whole conversations it refuses: the template shows no thoughts to learn from.)"""

    class TestForgetful(ChatFormatContract):
        name = "template"
        takes_tools = False
        takes_reasoning = True
        forgets = r"(?<=<A>)<think>\n.*?\n</think>\n\n"

        def tokenizer(self):
            return tokenizer_of(FORGETFUL, "<A>", "<end>")

        def said(self, chat, message):
            thoughts = message.get("reasoning_content", "hm")
            return [*chat.render_text(f"{thoughts}\n</think>\n\n{message['content']}"), chat.end_of_turn_id]

    TestForgetful().test_a_conversation_of_any_kind_is_token_in_token_out()
    TestForgetful().test_a_conversation_in_good_form_is_the_templates()
