"""Chat templates render as transformers renders them, in a sandbox."""

from __future__ import annotations

import pytest
from transformers.utils.chat_template_utils import _compile_jinja_template

from headrace.gateway.chat_template import ChatTemplate, TemplateRefused
from headrace.gateway.errors import BadRequest

MESSAGES = [{"role": "system", "content": "Be <b>brief</b>."}, {"role": "user", "content": "Hi"}]
RICH = """{%- for message in messages %}
    {%- if loop.index > 5 %}{% break %}{% endif %}
    {{ bos_token }}{{ message.role }}: {{ message.content | tojson }}
    {% generation %}{{ message['content'].upper() }}{% endgeneration %}
{%- endfor %}
{% if add_generation_prompt and not (quiet | default(false)) %}assistant:{% endif %}"""


def test_a_template_renders_as_transformers_renders_it() -> None:
    """Trimming, loop controls, JSON without HTML escapes and the generation tag."""
    expected = _compile_jinja_template(RICH).render(messages=MESSAGES, add_generation_prompt=True, bos_token="<s>")
    assert ChatTemplate(RICH, {"bos_token": "<s>"}).render(MESSAGES, {}) == expected


def test_the_developer_role_is_the_system_role() -> None:
    """Templates know only the older name."""
    template = ChatTemplate("{{ messages[0].role }}", {})
    assert template.render([{"role": "developer", "content": "x"}], {}) == "system"


def test_a_template_s_refusal_reaches_the_client() -> None:
    """`raise_exception` becomes a 400 that names the messages."""
    template = ChatTemplate("{{ raise_exception('Roles must alternate') }}", {})
    with pytest.raises(BadRequest, match="Roles must alternate") as caught:
        template.render(MESSAGES, {})
    assert caught.value.param == "messages"


def test_options_reach_the_template_and_unknown_ones_are_refused() -> None:
    """An option that the template would ignore is an error."""
    template = ChatTemplate(RICH, {"bos_token": "<s>"})
    assert template.options == {"quiet"}
    assert "assistant:" not in template.render(MESSAGES, {"quiet": True})
    for name in ("messages", "bos_token", "nothing"):
        with pytest.raises(BadRequest, match=name):
            template.render(MESSAGES, {name: 1})


def test_a_name_is_used_or_refused() -> None:
    """Never dropped without a word."""
    named = [{"role": "user", "content": "Hi", "name": "Ann"}]
    assert ChatTemplate("{{ messages[0].name }}", {}).render(named, {}) == "Ann"
    with pytest.raises(BadRequest, match="name"):
        ChatTemplate("{{ messages[0].content }}", {}).render(named, {})


@pytest.mark.parametrize(
    "attack", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ 1 / 0 }}", "{{ x.y.z }}"]
)
def test_a_template_cannot_leave_the_sandbox(attack: str) -> None:
    """Unsafe or failing expressions are a 400, not a crash."""
    with pytest.raises(BadRequest):
        ChatTemplate(attack, {}).render(MESSAGES, {})


def test_a_broken_template_is_refused_at_the_start() -> None:
    """Not at the first request."""
    with pytest.raises(TemplateRefused):
        ChatTemplate("{% if %}", {})
