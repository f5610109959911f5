"""The gateway: HTTP in, tokens out.

It speaks OpenAI's chat and completions API, turns each request into queue entries, and assembles the answer from the
tokens that the workers send back. It loads no weights and imports no torch.

How a request runs through the files:

1. `app` takes the HTTP request, `guard` sees that it may pass and that every failure has OpenAI's shape.
2. `chat_request` or `completion_request` validate the body into a `job.Job`; `tokenizer` and `chat_template` make
   its prompts. All of that runs in the tokenizer's threads.
3. `admission` refuses what can't be served in time; `answer` opens one `choice.Choice` for each answer asked for.
   `idempotency` sees that a retry does not make a second one; `callers` and `terms` say whose request it is and what
   its headers ask for.
4. `dispatcher` holds the choices in a `fair_queue` until it is their turn. `mesh_client` queues them, gives them what
   the workers send, queues them anew after a failure, and cancels.
5. `choice` follows the tokens over attempts; `text` turns them into text with `detokenizer` and `stop_strings`.
6. `respond` writes the answer, whole or as server-sent events, in the form of `chat_shape` or `completion_shape`.

Beside it, `live` tells the page in `page/` of the mesh and of each request's `timeline`; `page_files` serves the page.
"""
