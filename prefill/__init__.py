"""The prefill tier: takes requests from the queue, computes their prompts' KV and hands it to decode workers."""
