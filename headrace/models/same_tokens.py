"""Whether two models call the same text by the same token ids."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

from headrace.models.errors import ModelError


def check_same_tokens(target: Path, draft: Path, name: str) -> None:
    """Raise `ModelError` where the draft model of this name has another vocabulary than its target."""
    files = [folder / "tokenizer.json" for folder in (target, draft)]
    for file in files:
        if not file.is_file():
            raise ModelError(f"--draft-model {name}: {file} is missing, which must be the model's own")
    if files[0].read_bytes() == files[1].read_bytes():
        return
    ours, theirs = (Tokenizer.from_file(str(file)).get_vocab() for file in files)
    differ = [token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token)]
    if differ:
        raise ModelError(
            f"--draft-model {name} has another tokenizer than the model: {len(differ)} of {len(ours)} tokens differ, "
            f"such as {min(differ)!r}; give a smaller model of the same family"
        )
