"""Chat templates by name: the turn formats that model cards document, for tokenizers that come without one."""

from lineament._base.errors import InputError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LLAMA3 = (
    "{{ bos_token | default('') }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}"
    "<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

# there is no turn for a system message: it stands before the words of the user that follow it
MISTRAL = (
    "{{ bos_token | default('') }}{% set told = namespace(system='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{% set told.system = message['content'] ~ '\n\n' %}"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] | trim }}{{ eos_token | default('') }}"
    "{% else %}[INST] {{ told.system }}{{ message['content'] }} [/INST]{% set told.system = '' %}{% endif %}"
    "{% endfor %}"
)

ALPACA = (
    "{% if messages[0]['role'] != 'system' %}Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request.\n\n{% endif %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% elif message['role'] == 'assistant' %}### Response:\n{{ message['content'] }}{{ eos_token | default('') }}\n\n"
    "{% else %}### Instruction:\n{{ message['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)

# only what the system and the assistant say ends with a token; a conversation starts with a system turn, empty or not
EXAONE = (
    "{% if messages[0]['role'] != 'system' %}[|system|][|endofturn|]\n{% endif %}{% for message in messages %}"
    "[|{{ message['role'] }}|]{{ message['content'] }}{% if message['role'] != 'user' %}[|endofturn|]{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}[|assistant|]{% endif %}"
)

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "alpaca": ALPACA, "exaone": EXAONE}


def chosen_template(wanted: str | None, known: tuple[str, ...]) -> str:
    """Return a template's text: "" where none is wanted, the one most models have for "auto".

    Args:
        wanted: None, "auto", a key of `TEMPLATES`, or Jinja text. known: the models' own templates.

    Raises:
        InputError: a name that is none of these.
    """
    if not wanted:
        return ""
    if wanted == "auto":
        known = tuple(text for text in known if text)
        return max(known, key=known.count) if known else ""
    if wanted in TEMPLATES:
        return TEMPLATES[wanted]
    if "{" not in wanted:
        raise InputError(
            f"chat_template {wanted!r} is not known by name; expected auto, {', '.join(TEMPLATES)} or the Jinja text"
        )
    return wanted
