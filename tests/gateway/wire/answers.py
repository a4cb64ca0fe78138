"""Generated answers, as a backend would have given them without streaming."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from gateway.wire.sse import SseParser

# Everything that UTF-8 can say: no lone surrogates.
texts = st.text(alphabet=st.characters(codec="utf-8"), max_size=30)
said = texts.filter(bool)
long_texts = st.builds(lambda text, times: text * times, said, st.integers(200, 600))
names = st.text(alphabet="abc_", min_size=1, max_size=8)
usages = st.fixed_dictionaries(
    {"prompt_tokens": st.integers(0, 99), "completion_tokens": st.integers(0, 99), "total_tokens": st.integers(0, 198)},
    optional={"completion_tokens_details": st.fixed_dictionaries({"reasoning_tokens": st.integers(0, 9)})},
)
token_logprobs = st.fixed_dictionaries(
    {
        "token": texts,
        "logprob": st.floats(-20, 0),
        "bytes": st.none() | st.lists(st.integers(0, 255), max_size=4),
        "top_logprobs": st.lists(st.fixed_dictionaries({"token": texts, "logprob": st.floats(-20, 0)}), max_size=2),
    }
)
logprobs = st.fixed_dictionaries(
    {"content": st.none() | st.lists(token_logprobs, max_size=40), "refusal": st.none()},
)
function_calls = st.fixed_dictionaries({"name": names, "arguments": texts | long_texts})
function_tools = st.fixed_dictionaries({"id": names, "type": st.just("function"), "function": function_calls})
custom_tools = st.fixed_dictionaries(
    {"id": names, "type": st.just("custom"), "custom": st.fixed_dictionaries({"name": names, "input": texts})}
)
citations = st.fixed_dictionaries(
    {
        "type": st.just("url_citation"),
        "url_citation": st.fixed_dictionaries({"title": texts, "start_index": st.just(3)}),
    }
)
finish_reasons = st.sampled_from(["stop", "tool_calls", "length", "content_filter"])


def _numbered(choices: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**choice, "index": index} for index, choice in enumerate(choices)]


def messages(tools: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": st.none() | texts | long_texts, "refusal": st.none() | texts},
        optional={
            "reasoning_content": st.none() | texts | long_texts,
            "reasoning": st.none() | texts,
            "tool_calls": st.none() | st.lists(tools, max_size=3),
            "function_call": st.none() | function_calls,
            "annotations": st.lists(citations, max_size=2),
            "audio": st.fixed_dictionaries({"id": names, "data": texts, "transcript": texts, "expires_at": st.just(5)}),
            "vendor": st.dictionaries(names, texts, max_size=2) | texts | st.integers(-(2**53), 2**53) | st.booleans(),
        },
    )


def chats_with(tools: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "id": names,
            "object": st.just("chat.completion"),
            "created": st.integers(1, 2**40),
            "model": names,
            "choices": st.lists(
                st.fixed_dictionaries(
                    {"message": messages(tools), "finish_reason": finish_reasons},
                    optional={
                        "logprobs": st.none() | logprobs,
                        "stop_reason": st.none() | names | st.integers(0, 9),
                        "matched_stop": st.none() | st.integers(0, 9),
                        "token_ids": st.lists(st.integers(0, 9), max_size=3),
                        "content_filter_results": st.fixed_dictionaries({"hate": st.just({"severity": "safe"})}),
                    },
                ),
                min_size=1,
                max_size=3,
            ).map(_numbered),
            "usage": usages,
        },
        optional={
            "system_fingerprint": st.none() | names,
            "service_tier": st.sampled_from([None, "default", "priority"]),
            "prompt_token_ids": st.none() | st.lists(st.integers(0, 9), max_size=3),
            "citations": st.lists(texts, max_size=2),
            "x_vendor": st.dictionaries(names, texts, max_size=2),
        },
    )


chats = chats_with(function_tools | custom_tools)
standard_chats = chats_with(function_tools)
"""Without what the official client's types of a stream lack."""

completion_logprobs = st.lists(st.tuples(texts, st.none() | st.floats(-20, 0), st.integers(0, 99)), max_size=40).map(
    lambda tokens: {
        "tokens": [token for token, _, _ in tokens],
        "token_logprobs": [logprob for _, logprob, _ in tokens],
        "top_logprobs": [{token: logprob} for token, logprob, _ in tokens],
        "text_offset": [offset for _, _, offset in tokens],
    }
)
completions = st.fixed_dictionaries(
    {
        "id": names,
        "object": st.just("text_completion"),
        "created": st.integers(1, 2**40),
        "model": names,
        "choices": st.lists(
            st.fixed_dictionaries(
                {
                    "text": texts | long_texts,
                    "logprobs": st.none() | completion_logprobs,
                    "finish_reason": finish_reasons,
                },
                optional={"stop_reason": st.none() | names, "prompt_logprobs": st.none() | st.just([None, {"1": {}}])},
            ),
            min_size=1,
            max_size=3,
        ).map(_numbered),
        "usage": usages,
    },
    optional={"system_fingerprint": st.none() | names},
)


def payloads(stream: bytes) -> list[bytes]:
    """Give the payloads of a stream, which must be whole."""
    parser = SseParser()
    events = parser.feed(stream)
    assert parser.finish()
    return [event.data for event in events]
