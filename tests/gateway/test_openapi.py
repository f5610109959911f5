"""The description of the API: of all that is there, and true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
from jsonschema import Draft202012Validator

from headrace.gateway.openapi import BODIES
from tests.gateway.conftest import OpenGateway

MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
BODY_OF: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "m", "messages": MESSAGES, "store": False},
    "/v1/completions": {"model": "m", "prompt": [1, 2]},
    "/v1/responses": {"model": "m", "input": [{"role": "user", "content": "Hi"}], "store": False},
    "/v1/messages": {"model": "m", "messages": MESSAGES, "max_tokens": 5},
    "/v1/messages/count_tokens": {"model": "m", "messages": MESSAGES},
    "/tokenize": {"messages": MESSAGES},
    "/detokenize": {"tokens": [1]},
}


def test_the_docs_have_each_endpoint() -> None:
    """And its line says what it is."""
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    assert [path for path in BODIES if f"| `POST {path}` |" not in page] == []


async def test_every_route_is_described_with_the_body_that_it_takes(open_gateway: OpenGateway) -> None:
    """What is honoured passes the schema, what is refused does not, and says why."""
    async with open_gateway(prefill=False, decode=0) as gateway:
        async with gateway.http.get(f"{gateway.url}/openapi.json") as response:
            described = await response.json()
        _, unknown = await gateway.post("/nowhere", {})
    paths = described["paths"]
    known = unknown["error"]["message"].partition(" has ")[2].rstrip(".").split(", ")
    assert set(paths) == {path for path in known if path != "/" and not path.startswith("/page/")}
    assert {path for path, methods in paths.items() if "post" in methods} == set(BODIES) == set(BODY_OF)
    for path, body in BODY_OF.items():
        operation = paths[path]["post"]
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        validator = Draft202012Validator({**schema, "components": described["components"]})
        validator.check_schema(validator.schema)
        validator.validate(body)
        for wrong in ({"nothing": 1}, {**body, "nothing": 1}):
            with pytest.raises(jsonschema.ValidationError):
                validator.validate(wrong)
        assert {"400", "401", "404", "429", "500", "503", "504"} <= set(operation["responses"])
    chat = described["components"]["schemas"]["ChatRequest"]["properties"]
    assert chat["store"]["enum"] == [None, False]
    assert chat["store"]["description"] == "Refused: answers are not stored."
    assert chat["temperature"]["anyOf"][0] == {"type": "number", "minimum": 0, "maximum": 2}
    assert paths["/v1/models/{model}"]["get"]["parameters"][0]["name"] == "model"
    assert paths["/health"]["get"]["security"] == []
