// Requests to the gateway that this page came from: with the API key where one is wanted, and streams of events.

const STORED = "headrace-api-key";

/** The server wants a key, or another one. */
export class KeyWanted extends Error {}

export function useKey(key) {
  sessionStorage.setItem(STORED, key); // gone with the tab
}

export async function ask(path, options = {}) {
  const key = sessionStorage.getItem(STORED);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  const message = body.error?.message ?? `the server answered ${response.status}`;
  throw response.status === 401 ? new KeyWanted(message) : new Error(message);
}

/** Server-sent events of a response: `{name, data}`. EventSource can carry no key. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const event = { name: "message", data: "" };
      for (const line of block.split("\n")) {
        if (line.startsWith("event: ")) event.name = line.slice(7);
        if (line.startsWith("data: ")) event.data += line.slice(6);
      }
      if (event.data) yield event;
    }
  }
}

const RETRY_SECONDS = [0.5, 1, 2, 4, 8];

/**
 * Follow `/live` for as long as the page is open. `onState` hears "live", "away" and "key"; the promise that it
 * returns for "key" is waited for.
 */
export async function follow(onEvent, onState) {
  for (let failures = 0; ; ) {
    try {
      const response = await ask("/live");
      failures = 0;
      await onState("live");
      for await (const { name, data } of events(response)) onEvent(name, JSON.parse(data));
      await onState("away");
    } catch (error) {
      if (error instanceof KeyWanted) {
        await onState("key", error.message);
        continue;
      }
      await onState("away", error instanceof TypeError ? undefined : error.message); // fetch throws TypeError
    }
    const seconds = RETRY_SECONDS[Math.min(failures++, RETRY_SECONDS.length - 1)];
    await new Promise((resolve) => setTimeout(resolve, seconds * 1000));
  }
}
