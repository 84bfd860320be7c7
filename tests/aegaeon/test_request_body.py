"""Bodies of requests: what is refused before a model sees them, and that it takes little time."""

import json
from typing import Any

import pytest
from starlette.responses import Response

from aegaeon.server.request_body import MAX_ANSWERS, MAX_TEXTS, parsed, too_many_answers

MAX_BODY_BYTES = 16 << 20
DEEP = b"[" * 65


def refused(answer: Any) -> tuple[str, str, str | None]:
    """Code, message, param of a refusal."""
    assert isinstance(answer, Response)
    assert answer.status_code == 400
    error = json.loads(bytes(answer.body))["error"]
    return error["code"], error["message"], error["param"]


def filled(pattern: bytes, end: bytes = b"") -> bytes:
    head = b'{"model":"a","x":"'
    return head + pattern * ((MAX_BODY_BYTES - len(head) - len(end)) // len(pattern)) + end


@pytest.mark.timeout(30)  # far from enough for time that is quadratic in the size
@pytest.mark.parametrize(
    "pattern", [b'\\"', b"\\\\", b"\\", b'y\\"', b"\\u0022"], ids=lambda pattern: pattern.decode()
)
def test_a_long_string_of_escapes_that_does_not_end_is_refused_at_once(pattern):
    assert refused(parsed(filled(pattern)))[0] == "invalid_json"


@pytest.mark.timeout(30)
@pytest.mark.parametrize("pattern", [b"y", b"[", b'\\"', b"\\\\"], ids=lambda it: it.decode())
def test_one_string_as_long_as_the_body_may_be_is_read_at_once(pattern):
    body = filled(pattern, b'"}')
    request = parsed(body)
    assert not isinstance(request, Response)
    assert request == json.loads(body)


@pytest.mark.parametrize(
    "text",
    [
        *[b'"%s"' % DEEP, b'"\\"%s"' % DEEP, b'"\\\\\\"%s"' % DEEP],
        *[b'["\\\\", "%s"]' % DEEP, b'["", "%s", "\\""]' % DEEP],
    ],
)
def test_brackets_in_strings_nest_nothing(text):
    assert not isinstance(parsed(b'{"model":"a","x":%s}' % text), Response)


@pytest.mark.parametrize(
    "text",
    [
        *[DEEP + b"]" * 65, b'["\\\\",%s' % DEEP, b'["\\"",%s' % DEEP, b'["\\\\\\"\\\\",%s' % DEEP],
        *[b'["","a",%s' % DEEP, DEEP + b'"', DEEP + b'"\\', DEEP + b'"\\"'],
    ],
)
def test_brackets_outside_of_strings_nest_whatever_strings_are_around(text):
    assert "nested deeper" in refused(parsed(b'{"model":"a","x":' + text))[1]


@pytest.mark.parametrize("text", [b'"[', b'"\\', b'"\\"', b'"a\\\\\\', b'["a", "'])
def test_a_string_that_does_not_end_is_not_json(text):
    assert "not valid JSON" in refused(parsed(b'{"model":"a","x":' + text))[1]


@pytest.mark.parametrize("key", ["n", "best_of"])
@pytest.mark.parametrize("value", ["1000", "1", 1000.0, 1.0, True, False, [1], {"a": 1}])
def test_a_number_of_answers_that_is_not_an_integer_is_refused(key, value):
    code, message, param = refused(too_many_answers(8, {"model": "a", key: value}))
    assert (code, param) == ("not_an_integer", key)
    assert "expected an integer" in message


@pytest.mark.parametrize("value", [None, 1, 8, 0, -1])
def test_a_number_of_answers_within_the_limit_is_for_the_model(value):
    assert too_many_answers(8, {"model": "a", "n": value, "best_of": value}) is None


@pytest.mark.parametrize("key", ["n", "best_of"])
def test_more_answers_than_the_limit_are_refused(key):
    code, _, param = refused(too_many_answers(8, {"model": "a", key: 9}))
    assert (code, param) == ("too_many_answers", key)


@pytest.mark.parametrize("prompt", ["hi", [1, 2]], ids=["text", "token ids"])
@pytest.mark.parametrize(
    ("count", "options", "max_n", "good"),
    [
        *[(MAX_ANSWERS, {}, 8, True), (MAX_ANSWERS + 1, {}, 8, False)],
        *[(MAX_ANSWERS // 8, {"n": 8}, 8, True), (MAX_ANSWERS // 8 + 1, {"n": 8}, 8, False)],
        (MAX_ANSWERS // 8 + 1, {"n": 1, "best_of": 8}, 8, False),
        *[(2, {"n": MAX_ANSWERS}, 2 * MAX_ANSWERS, True), (1, {"n": 1000}, 1000, True)],
    ],
)
def test_prompts_times_answers_are_limited(prompt, count, options, max_n, good):
    answer = too_many_answers(max_n, {"model": "a", "prompt": [prompt] * count, **options})
    if good:
        assert answer is None
    else:
        code, message, param = refused(answer)
        assert (code, param) == ("too_many_prompts", "prompt")
        assert f"got {count} prompts" in message


@pytest.mark.parametrize("key", ["prompt", "input"])
def test_a_list_of_token_ids_is_one_prompt(key):
    assert too_many_answers(8, {"model": "a", key: [1] * 100_000, "n": 8}) is None


@pytest.mark.parametrize("key", ["input", "messages"])
def test_a_long_conversation_is_one_prompt(key):
    message = {"role": "user", "content": "hi"}
    assert too_many_answers(8, {"model": "a", key: [message] * 5000}) is None


@pytest.mark.parametrize(
    ("key", "text"),
    [
        *[("input", "hi"), ("input", [1, 2]), ("texts", "hi"), ("documents", "hi")],
        *[("documents", {"content": []}), ("text_2", "hi"), ("messages", [{"role": "user"}])],
    ],
)
def test_a_batch_to_embed_or_score_may_be_as_long_as_openais(key, text):
    assert too_many_answers(8, {"model": "a", key: [text] * MAX_TEXTS}) is None
    code, message, param = refused(
        too_many_answers(8, {"model": "a", key: [text] * (MAX_TEXTS + 1)})
    )
    assert (code, param) == ("too_many_prompts", key)
    assert f"at most {MAX_TEXTS}" in message


@pytest.mark.parametrize("value", [None, [], "", {}, 7])
def test_what_is_no_list_of_prompts_is_for_the_model(value):
    assert too_many_answers(8, {"model": "a", "prompt": value, "documents": value}) is None
