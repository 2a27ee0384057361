// Server-sent events of a POST request: EventSource itself can only GET.

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** The sentence of an answer in OpenAI's error shape, or its status line. */
async function refusal(response) {
  let said = "";
  try {
    said = (await response.json()).error?.message ?? "";
  } catch { /* no JSON: a proxy's own page */ }
  const wait = response.headers.get("Retry-After");
  if (!said) said = `The server answered ${response.status} ${response.statusText}.`;
  return new Refused(response.status, wait ? `${said} Try again in ${wait} s.` : said);
}

const headers = key => (key ? { Authorization: `Bearer ${key}` } : {});

export async function getJson(path, key) {
  const response = await fetch(path, { headers: headers(key) });
  if (!response.ok) throw await refusal(response);
  return response.json();
}

/** Yields {event, data} until the stream ends; throws Refused for a status that is no success. */
export async function* events(path, body, key, signal) {
  const response = await fetch(path, {
    method: "POST", headers: { "Content-Type": "application/json", ...headers(key) }, body: JSON.stringify(body), signal,
  });
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value.replaceAll("\r", "");
    const parts = rest.split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const fields = { event: "message", data: [] };
      for (const line of part.split("\n")) {
        if (line.startsWith("event:")) fields.event = line.slice(6).trim();
        if (line.startsWith("data:")) fields.data.push(line.slice(5).trimStart());
      }
      if (fields.data.length) yield { event: fields.event, data: fields.data.join("\n") };
    }
  }
}
