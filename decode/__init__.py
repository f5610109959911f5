"""The decode tier: receives prompts' KV and turns it into tokens, many requests at once."""
