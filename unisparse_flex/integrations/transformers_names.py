"""What transformers calls things, where its versions differ."""

from __future__ import annotations

from dataclasses import fields
from functools import cache


@cache
def cache_name() -> str:
    """What it calls the keys and values of earlier tokens: ``cache`` from 5.24 on."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    names = {field.name for field in fields(CausalLMOutputWithPast)}
    return "cache" if "cache" in names else "past_key_values"
