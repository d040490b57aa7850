// What the page asks of the server. Each function throws an Error with the server's message.

async function answer(response) {
  if (response.ok) return response;
  const contents = await response.json().catch(() => null);
  throw new Error(contents?.error?.message ?? `the server answered ${response.status}`);
}

async function send(path, contents, signal) {
  const headers = { "content-type": "application/json" };
  const body = JSON.stringify(contents);
  return answer(await fetch(path, { method: "POST", headers, body, signal }));
}

export const about = async () => (await answer(await fetch("page/about"))).json();
export const metrics = async (start) =>
  (await answer(await fetch(`page/metrics?start=${start}`))).json();

// text: a text or a list of token ids; options: temperature, top_k, top_p.
export const read = async (text, options, signal) =>
  (await send("page/read", { text, ...options }, signal)).json();
export const look = async (text, signal) => (await send("page/look", { text }, signal)).json();

// Yields the choices of /v1/completions as they come: {index, text, finish_reason}.
export async function* complete(request, signal) {
  const response = await send("v1/completions", { ...request, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const contents = JSON.parse(data);
      if (contents.error) throw new Error(contents.error.message);
      yield* contents.choices;
    }
  }
}
