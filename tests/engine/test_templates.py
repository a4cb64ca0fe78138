"""Chat templates: the same text as transformers makes, in a sandbox."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from engine.checkpoint import BUNDLED
from engine.errors import RequestError
from engine.tokenizer import load_tokenizer
from tests.engine.checkpoints import write_tokenizer

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "<b> & ü", "parameters": {}}}]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Häß <|end|> 漢字 😀\n\n  x"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": ""},
    ],
    [
        {"role": "developer", "content": "d"},
        {"role": "user", "content": "What is the weather?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"at": "Ulm"}}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ],
]


@pytest.fixture(scope="module")
def reference() -> Any:
    return transformers.AutoTokenizer.from_pretrained(str(BUNDLED))


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_bundled_template_renders_as_in_transformers(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, reference: Any
) -> None:
    tokenizer = load_tokenizer(BUNDLED)
    text = reference.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
    assert tokenizer.render(messages, tools) == text
    ids = reference.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode_chat(messages, tools) == ids


def with_template(directory: Path, template: str) -> Path:
    write_tokenizer(directory, template=template)
    return directory


def test_helpers_of_published_templates(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson(indent=1) }}{% endgeneration %}{% endfor %}{{ strftime_now('%Y') | length }}"
    )
    rendered = load_tokenizer(with_template(tmp_path, template)).render([{"role": "user", "content": "<é>"}] * 2, None)
    assert rendered == '{\n "role": "user",\n "content": "<é>"\n}4'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only users here') }}", "only users here"),
        ("{{ messages[0].content.nothing.more }}", "has no attribute"),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined"),
    ],
)
def test_a_template_that_refuses_or_misbehaves_is_a_request_error(template: str, message: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(with_template(tmp_path, template))
    with pytest.raises(RequestError, match=message):
        tokenizer.encode_chat([{"role": "user", "content": "x"}], None)


def test_a_model_without_template_says_so(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, template=None)
    with pytest.raises(RequestError, match="no chat template"):
        load_tokenizer(tmp_path).encode_chat([{"role": "user", "content": "x"}], None)


def test_a_list_of_templates_and_the_separate_file(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings["chat_template"] = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    path.write_text(json.dumps(settings))
    assert load_tokenizer(tmp_path).render([], None) == "d"
    assert load_tokenizer(tmp_path).render([], TOOLS) == "t"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_tokenizer(tmp_path).render([], None) == "file"


def test_an_empty_prompt_becomes_the_begin_token(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path).encode_text("") == [256]
