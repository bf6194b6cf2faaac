"""Templates of a stranger: those that models have are rendered as transformers renders them, all others end soon."""

import datetime
import json
import shutil
import time
from pathlib import Path

import pytest
from transformers import ProcessorMixin

import deltavlm_hf
from deltavlm_hf import DeltaVLMProcessor
from deltavlm_hf.processing.chat_template import MAX_LENGTH

CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": " What changed?\n"}]},
    {"role": "assistant", "content": "<think>look</think>A road, {{ 1 }} & a 'house'."},
    {"role": "user", "content": "Where?"},
]
PLAIN = [{**message, "content": "Ünï\n" + str(message["content"])} for message in CHAT]

# In the manner of the families of models that there are.
FAMILIES = {
    "authors": deltavlm_hf.processing.conversation.CHAT_TEMPLATE,
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama 2": "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = "
    "messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}"
    "{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('out of turn') }}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + "
    "message['content'].strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + "
    "message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
    "llama 3": "{{- bos_token }}\n{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set "
    "date_string = strftime_now('%d %b %Y') %}{%- endif %}{%- endif %}\n{%- if not tools is defined %}{%- set tools = "
    "none %}{%- endif %}\n{{- 'Today: ' + date_string + '\n' }}{%- for message in messages %}\n    {%- if not "
    "(message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}\n        {{- '<|' + "
    "message['role'] + '|>\n\n' + message['content'] | trim + '<|eot|>' }}\n    {%- endif %}\n{%- endfor %}",
    "mistral": '{%- set ns = namespace(index=0) %}{%- for message in messages if message.role == "user" or '
    'message.role == "assistant" %}{%- set ns.index = ns.index + 1 %}{{- ns.index ~ ":" ~ message.content[:9] }}'
    "{%- if loop.last and tools is not none %}{{- tools | tojson }}{%- endif %}{%- endfor %}",
    "qwen": "{%- set ns = namespace(last=messages|length - 1, found=false) %}{%- for message in messages[::-1] %}"
    "{%- set index = (messages|length - 1) - loop.index0 %}{%- if not ns.found and message.role == 'user' and not "
    "(message.content.startswith('<tool>') and message.content.endswith('</tool>')) %}{%- set ns.last = index %}"
    "{%- set ns.found = true %}{%- endif %}{%- endfor %}{{ ns.last }}{%- for message in messages %}{%- if '</think>' "
    "in message.content %}{%- set thought = message.content.split('</think>')[0].rstrip('\\n')"
    ".split('<think>')[-1].lstrip('\\n') %}{{- thought }}{%- endif %}{{ message.get('name', 'nobody') }}{%- endfor %}",
    "vision": "{% macro show(content) %}{% if content is string %}{{ content }}{% else %}{% for item in content %}"
    "{% if 'image' in item or item.type == 'image' %}<image>{% elif 'text' in item %}{{ item.text }}{% endif %}"
    "{% endfor %}{% endif %}{% endmacro %}{% for message in messages %}{{ message.role | capitalize }}: "
    "{{ show(message.content) }}{{ '\n' if not loop.last else '' }}{% endfor %}",
    "filters": "{% set seen = messages | selectattr('role', 'equalto', 'user') | list %}{{ seen | length }}"
    "{{ messages | map(attribute='role') | join(', ') }}{{ messages | tojson(indent=2) }}"
    "{{ messages | tojson | safe }}"
    "{% for name, value in messages[0].items() %}{{ name | upper }}{{ value is iterable and value is not mapping }}"
    "{% endfor %}{{ [3, 1, 2] | sort | string }}{{ 'a-b' | replace('-', '+') }}{{ ('x' * 3) ~ 7 // 2 ~ -1 ~ 7 / 2 }}"
    "{{ missing }}{{ missing | default('none') }}{{ dict(a=1) | items | list }}{{ range(2, 9, 3) | list }}"
    "{{ 'abc'[1:] }}{{ messages | first | string | title | reverse | e }}{{ loop is defined }}{{ none }}{{ 1.5 }}",
    "marks": "{% for message in messages %}{% generation %}{{ message.role }}{% set role = message.role %}"
    "{% endgeneration %}{% if loop.index > 1 %}{% break %}{% endif %}{% endfor %}"
    "{% set block %}{{ role }}!{% endset %}{{ block | trim }}{% with a = 1 %}{{ a }}{% endwith %}"
    "{# nothing #}{% raw %}{{ }}{% endraw %}",
    "gemma": "{{ bos_token }}{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' "
    "else message['role'] %}{{ '<turn>' + role + '\n' + (message['content'] | trim) + '<end>\n' }}{% endfor %}",
}


@pytest.mark.parametrize("chat", [CHAT, PLAIN, CHAT[:1], PLAIN[:2]], ids=["blocks", "texts", "question", "answered"])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_have_their_prompts(family, chat, processor):
    template = FAMILIES[family]
    options = {"chat_template": template, "add_generation_prompt": len(chat) % 2 == 1, "date_string": "today"}
    try:
        expected = ProcessorMixin.apply_chat_template(processor, chat, **options)
    except Exception:  # blocks, where a template wants texts
        with pytest.raises(ValueError, match="The chat template failed on"):
            processor.apply_chat_template(chat, **options)
    else:
        assert processor.apply_chat_template(chat, **options) == expected
        assert processor.apply_chat_template([chat, chat], **options) == [expected] * 2


@pytest.mark.parametrize("family", ["authors", "vision", "gemma"])
@pytest.mark.parametrize("last", ["A road ", [{"type": "text", "text": "A road"}]], ids=["text", "blocks"])
def test_an_answer_goes_on(family, last, processor):
    chat = [CHAT[2], {"role": "assistant", "content": last}]
    options = {"chat_template": FAMILIES[family], "continue_final_message": True}
    try:
        expected = ProcessorMixin.apply_chat_template(processor, chat, **options)
    except Exception:
        with pytest.raises(ValueError, match="The chat template failed on"):
            processor.apply_chat_template(chat, **options)
    else:
        assert processor.apply_chat_template(chat, **options) == expected
    with pytest.raises(ValueError, match="leaves the final message out"):
        processor.apply_chat_template(chat, chat_template="{{ messages[0].content }}", continue_final_message=True)


def test_one_of_several_by_name(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "short.jinja").write_text("{{ messages | length }}")
    loaded = DeltaVLMProcessor.from_pretrained(tmp_path)
    assert loaded.apply_chat_template(CHAT[2:], chat_template="short") == "1"
    assert loaded.apply_chat_template(CHAT[2:]) == processor.apply_chat_template(CHAT[2:])
    assert loaded(text="Where?", history=[])["input_ids"] == processor(text="Where?", history=[])["input_ids"]
    (tmp_path / "additional_chat_templates" / "short.jinja").write_text("{% for")
    with pytest.raises(ValueError, match="The chat template 'short' cannot be used"):
        DeltaVLMProcessor.from_pretrained(tmp_path)


def grown(step: str, start: str = "'ab'") -> str:
    loop = f"{{% for i in range(99) %}}{{% set ns.x = {step} %}}{{% endfor %}}"
    return f"{{% set ns = namespace(x={start}) %}}{loop}{{{{ ns.x }}}}"


def looped(body: str, before: str = "") -> str:
    return f"{before}{{% for i in range(99999) %}}{{% for j in range(99999) %}}{body}{{% endfor %}}{{% endfor %}}"


LONG = "{% set long = 'a' * 400000 %}{% set other = 'b' * 100000 %}{% set many = range(9999) | list %}"
ENDLESS = {
    "loops": looped(""),
    "loops that write": looped("a" * 1000),
    "loops that filter": looped("{% for k in range(99999) if k == 'a' %}{% endfor %}"),
    "loops over iterators": looped("{% for k in messages | map('upper') %}{% endfor %}"),
    "a long range": "{% for i in range(10000000000) %}{% endfor %}",
    "a long text": "{{ 'a' * 10000000000 }}",
    "a long list": "{{ 10000000000 * [1] }}",
    "padding": "{{ 'a'.center(10000000000) }}",
    "a filter that pads": "{{ 'a' | center(10000000000) }}",
    "indents": "{{ 'a\nb' | indent(10000000000) }}",
    "JSON indents": "{{ [[1]] | tojson(indent=10000000000) }}",
    "JSON with long separators": LONG + "{{ many | tojson(separators=(long, long)) }}",
    "formats": "{{ '%10000000000d' % 1 }}",
    "other formats": "{{ '{:10000000000d}'.format(1) }}",
    "powers": "{{ 10 ** 10 ** 10 }}",
    "powers that are never reached": "{% if false %}{{ 10 ** 10 ** 10 }}{% endif %}",
    "large numbers": grown("ns.x * ns.x", "10"),
    "texts that double": grown("ns.x ~ ns.x"),
    "texts that are added": grown("ns.x + ns.x"),
    "lists that double": grown("ns.x + ns.x", "[1]"),
    "lists in lists": grown("[ns.x, ns.x]", "[1]"),
    "dicts in dicts": grown("{'a': ns.x, 'b': ns.x}", "{}"),
    "tuples as keys": grown("(ns.x,) + (ns.x,)", "(1,)") + "{{ {ns.x: 1} }}",
    "replacing": grown("ns.x.replace('', ns.x)"),
    "replacing by a filter": grown("ns.x | replace('a', 'aba')"),
    "joining": grown("ns.x.join(ns.x)"),
    "escaping": grown("(ns.x | e | string) ~ ns.x"),
    "slices": looped("{% set y = long[1:] %}", LONG),
    "comparing": looped("{% if long == other ~ 'a' %}{% endif %}", LONG),
    "searching": LONG + "{{ long.rfind('b' ~ long) }}",
    "stripping": LONG + "{{ long | trim(other ~ 'a') }}",
    "sorting": looped("{{ many | sort | first }}", LONG),
    "unique": looped("{{ many | unique | first }}", LONG),
    "looking up": LONG + "{{ range(99999) | map(attribute='a.' * 40000, default='x') | list }}",
    "macros": "{% macro f(x) %}{% if x %}{{ f(x - 1) }}{{ f(x - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "macros without end": "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "macros with long defaults": looped(
        "{{ f() }}", "{% macro f(a='a' * 400000) %}{% set b %}{{ a }}{% endset %}{% endmacro %}"
    ),
    "iterators in iterators": grown("ns.x | map('string')", "range(10)").replace("range(99)", "range(9999)"),
    "loops that call themselves": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "words without end": "{{ lipsum(n=100000000) }}",
    "numbers as bytes": "{{ (1).to_bytes(10000000000, 'big') }}",
    "rounding": "{{ 1.5 | round(10000000000, 'floor') }}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "conditions": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "sums": "{{ 1" + " + 1" * 20000 + " }}",
    "filters": "{{ 'a'" + " | upper" * 9000 + " }}",
    "parts": "{{a.b}}" * 14000,
    "length": "a" * (MAX_LENGTH + 1),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_computing_without_end(kind, processor):
    started = time.monotonic()
    with pytest.raises(ValueError, match="The chat template (failed on 1 messages|cannot be used)"):
        processor.apply_chat_template(CHAT[2:], chat_template=ENDLESS[kind])
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "template",
    [
        "{{ namespace({'__class__': 1}) }}",
        "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
        "{{ ''.__class__.__mro__ }}",
        "{% for a in [1] %}{{ loop._iterable.x }}{% endfor %}",
        "{{ range(*[1]) }}",
        "{% include 'chat_template.jinja' %}",
        "{{ raise_exception }}",
        "{{ '\\ud800' }}",
    ],
)
def test_what_no_template_needs(template, processor):
    with pytest.raises(ValueError, match="The chat template"):
        processor.apply_chat_template(CHAT[2:], chat_template=template)


def test_a_long_dialogue_is_no_bomb(processor):
    chat = [{"role": ("user", "assistant")[index % 2], "content": "word " * 100} for index in range(2001)]
    for family in ("authors", "chatml", "mistral", "qwen", "gemma"):
        assert len(processor.apply_chat_template(chat, chat_template=FAMILIES[family])) > 2001


class TestLoading:
    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        return Path(shutil.copytree(deltavlm_hf.tiny(), tmp_path / "model"))

    @pytest.mark.parametrize("place", ["chat_template.jinja", "processor_config.json", "chat_template.json"])
    def test_nothing_is_rendered(self, place, folder):
        template = "{{ raise_exception('rendered') }}" + ENDLESS["loops"]
        if place == "processor_config.json":
            (folder / "chat_template.jinja").unlink()
            settings = json.loads((folder / place).read_text())
            (folder / place).write_text(json.dumps({**settings, "chat_template": template}))
        elif place == "chat_template.json":
            (folder / "chat_template.jinja").unlink()
            (folder / place).write_text(json.dumps({"chat_template": template}))
        else:
            (folder / place).write_text(template)
        processor = DeltaVLMProcessor.from_pretrained(folder)
        assert processor(text="What?")["input_ids"]
        with pytest.raises(ValueError, match="The chat template failed on 1 messages: TemplateError: rendered"):
            processor(text="What?", history=[])

    @pytest.mark.parametrize("template", ["{% for", "{{ 10 ** 10 }}", 3, [1], {"default": 3}], ids=str)
    def test_what_is_none_is_told(self, template, folder):
        (folder / "chat_template.jinja").unlink()
        settings = json.loads((folder / "processor_config.json").read_text())
        (folder / "processor_config.json").write_text(json.dumps({**settings, "chat_template": template}))
        with pytest.raises(ValueError, match=f"{folder} cannot be loaded.*The chat template.*cannot be used"):
            DeltaVLMProcessor.from_pretrained(folder)


def test_the_date_is_that_of_today(processor):
    prompt = processor.apply_chat_template(CHAT[2:], chat_template="{{ strftime_now('%Y-%m-%d') }}")
    assert abs(datetime.date.fromisoformat(prompt) - datetime.date.today()) <= datetime.timedelta(days=1)
