"""The bodies of POST /tokenize and POST /detokenize: vLLM's fields, answered without a worker."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from headrace.gateway.chat_request import ChatRequest, Messages, chat_job
from headrace.gateway.errors import BadRequest
from headrace.gateway.request_fields import Token, check_tokens, parse
from headrace.gateway.strict import Refused, Strict
from headrace.gateway.tokenizer import Tokenizer
from headrace.gateway.tools import Tools
from headrace.messages.request import MAX_PROMPT_TOKENS


class TokenizeRequest(Strict):
    """A text, or a chat, which the model's template makes a text of."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: Tools | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_special_tokens: bool | None = None
    """Those that the model expects around a text; true for a prompt, false for a chat, whose template writes them."""
    return_token_strs: bool | None = None

    add_generation_prompt: Annotated[Any, Refused("chats are tokenized as they are asked", True)] = None
    continue_final_message: Annotated[Any, Refused("chats are tokenized as they are asked", False)] = None
    chat_template: Annotated[Any, Refused("the model's own is used")] = None
    mm_processor_kwargs: Annotated[Any, Refused("only text is supported", {})] = None

    def token_ids(self, tokenizer: Tokenizer) -> list[int]:
        """The tokens. Raises `BadRequest`."""
        if (self.prompt is None) == (self.messages is None):
            raise BadRequest("Give either 'prompt' or 'messages'.", param="prompt")
        if self.messages is None:
            for name in ("tools", "chat_template_kwargs"):
                if getattr(self, name) is not None:
                    raise BadRequest(f"'{name}' needs 'messages'.", param=name)
            return tokenizer.encode(self.prompt or "", self.add_special_tokens is not False)
        chat = ChatRequest(
            model="", messages=self.messages, tools=self.tools, chat_template_kwargs=self.chat_template_kwargs
        )
        (prompt,) = chat_job(chat, tokenizer).prompts
        if not self.add_special_tokens:
            return prompt.token_ids
        return tokenizer.encode(prompt.text or "", add_special_tokens=True)


class DetokenizeRequest(Strict):
    """Token ids."""

    model: str | None = None
    tokens: Annotated[list[Token], Field(max_length=MAX_PROMPT_TOKENS, fail_fast=True)]


def read_tokenize(body: bytes, tokenizer: Tokenizer) -> tuple[str | None, dict[str, Any]]:
    """The model asked for, if any, and the answer but for `max_model_len`. Raises `BadRequest`."""
    request = parse(body, TokenizeRequest)
    ids = request.token_ids(tokenizer)
    pieces = tokenizer.pieces(ids) if request.return_token_strs else None
    return request.model, {"count": len(ids), "tokens": ids, "token_strs": pieces}


def read_detokenize(body: bytes, tokenizer: Tokenizer) -> tuple[str | None, dict[str, Any]]:
    """The model asked for, if any, and the answer. Raises `BadRequest`."""
    request = parse(body, DetokenizeRequest)
    check_tokens(request.tokens, tokenizer, "tokens")
    return request.model, {"prompt": tokenizer.decode(request.tokens)}
