// Server-sent events by fetch: unlike EventSource it can send a key, and says why it was refused.

/** An answer that is not 200: `status`, and the reason in its body. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Throws Refused unless `response` is good. */
export async function checked(response) {
  if (response.ok) return response;
  let message = `the gateway answered ${response.status}`;
  try {
    const body = await response.json();
    message = body.error?.message ?? body.detail ?? message;
  } catch { /* not JSON: the status says it */ }
  throw new Refused(response.status, typeof message === "string" ? message : JSON.stringify(message));
}

/** Yields {event, data} of a response's body until it ends. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += value;
      for (let end; (end = rest.indexOf("\n\n")) >= 0; rest = rest.slice(end + 2)) {
        const one = { event: "message", data: "" };
        for (const line of rest.slice(0, end).split("\n")) {
          if (line.startsWith("data:")) one.data += line.slice(5).trimStart();
          else if (line.startsWith("event:")) one.event = line.slice(6).trim();
        }
        if (one.data) yield one;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Follows `url` for ever. `told(event, document)` gets every event, `state(name, error)` "live", "lost" or "refused"; after
 * "refused" it waits for what `state` gave back. */
export async function follow(url, headers, told, state) {
  for (let wait = 500; ; wait = Math.min(2 * wait, 8000)) {
    try {
      const response = await checked(await fetch(url, { headers: headers(), cache: "no-store" }));
      for await (const one of events(response)) {
        if (one.event === "message") throw new Error(JSON.parse(one.data).error?.message ?? "the stream broke off");
        state("live");
        wait = 250;
        told(one.event, JSON.parse(one.data));
      }
      state("lost", new Error("the gateway ended the stream"));
    } catch (error) {
      if (error instanceof Refused && error.status === 401) {
        await state("refused", error);
        continue;
      }
      state("lost", error);
    }
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
}
