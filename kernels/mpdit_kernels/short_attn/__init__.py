"""Attention over few tokens: all keys and values of a head in one program."""

from mpdit_kernels.short_attn.op import refusal, short_attention, short_attention_varlen

__all__ = ["refusal", "short_attention", "short_attention_varlen"]
