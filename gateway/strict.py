"""The base of everything that is read from a body, and annotations for its fields."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Discriminator, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema


class Strict(BaseModel):
    """No unknown fields, no conversions: `"1"` is not a number and `1` is not true."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True
    )


class Refused:
    """Annotation of a field that can't be honoured: lets null through, and values that ask for nothing."""

    def __init__(self, why: str, *harmless: Any) -> None:
        self._why = why
        self._harmless = harmless

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"description": f"Refused: {self._why}.", "enum": [None, *self._harmless]}

    def _check(self, value: Any) -> None:
        if value is None or any(type(value) is type(known) and value == known for known in self._harmless):
            return
        raise ValueError(self._why)


def by_type(known: str, missing: str = "") -> Discriminator:
    """Tells a union's branches apart, each with a `Tag` of its type, by their `type`: `<text>`, for one.

    `known` says what there is where the type is another; `missing` is the type where none is given.
    """

    def tag(value: Any) -> str:
        kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
        return f"<{missing if kind is None else kind}>"

    return Discriminator(tag, custom_error_type="unknown_type", custom_error_message=known)
