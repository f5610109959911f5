"""`headrace loadtest`: loads any OpenAI-compatible server and reports how it did, and how well the load was made."""
