// See: the surprise at each token, and how the model came to what follows one.

import { look, read } from "./api.js";
import { $, element, newTexts, share, shown, visible } from "./dom.js";

const MAX_BITS = 8; // the darkest surprise

export function setUpSee(model) {
  let tokens = []; // {id, text, surprise}
  let nUnread = 0; // the first ones, that do not fit the context
  let buttons = [];
  let asked = 0;

  $("shapes").tBodies[0].append(...model.stages.map(({ name, shape, line }) =>
    element("tr", {}, element("td", {}, element("code", { textContent: name })),
      element("td", { textContent: `(${shape.join(", ")})` }),
      element("td", { textContent: `model.py:${line}` }))));
  $("shapes-details").hidden = !model.is_gpt;

  async function showText(text) {
    const number = ++asked;
    const answer = await read(text, {});
    if (number !== asked) return; // another text or token was asked for since
    ({ tokens, n_unread: nUnread } = answer);
    buttons = tokens.map(tokenButton);
    const breaks = tokens.map((token) => token.text.replace(/[^\n]/g, "")); // after their tokens
    $("tokens").replaceChildren(...buttons.flatMap((button, i) => [button, breaks[i]]));
    buttons[nUnread].tabIndex = 0;
    $("position").hidden = true;
    const known = tokens.slice(nUnread + 1).map((token) => token.surprise);
    const mean = known.reduce((a, b) => a + b, 0) / Math.max(1, known.length);
    const unread = nUnread ? ` The ${nUnread} pale tokens do not fit the context.` : "";
    $("see-note").textContent = `${tokens.length - nUnread} tokens, ${mean.toFixed(3)} nats each: ` +
      `the darker, the more surprising.${model.is_gpt ? " Click a token to see what it looks at." : ""}${unread}`;
    tintBySurprise();
  }

  function tokenButton(token, i) {
    const button = element("button", { type: "button", className: "token", tabIndex: -1,
      textContent: token.text.replaceAll("\n", "↵") });
    button.setAttribute("role", "option");
    button.disabled = i < nUnread;
    button.addEventListener("click", () => shown(() => showPosition(i)));
    button.addEventListener("keydown", (event) => {
      const other = buttons[i + ({ ArrowRight: 1, ArrowLeft: -1 }[event.key] ?? 0)];
      if (!other || other === button || other.disabled) return;
      button.tabIndex = -1;
      other.tabIndex = 0;
      other.focus();
    });
    return button;
  }

  function tint(values, color, describe) {
    for (const [i, button] of buttons.entries()) {
      share(button, values[i] ?? 0);
      button.style.setProperty("--tint", color);
      button.title = describe(i);
      button.dataset.value = values[i] ?? "";
    }
  }

  function tintBySurprise() {
    const inBits = tokens.map(({ surprise }) => (surprise ?? 0) / Math.LN2);
    tint(inBits.map((bits) => Math.min(1, bits / MAX_BITS)), "var(--warm)",
      (i) => `${visible(tokens[i].text)}: ` + (tokens[i].surprise === null ? "not predicted" :
        `${tokens[i].surprise.toFixed(3)} nats`));
  }

  async function showPosition(i) {
    if (!model.is_gpt) return;
    const number = ++asked;
    const seen = await look(tokens.slice(nUnread, i + 1).map((token) => token.id));
    if (number !== asked) return;
    for (const [j, button] of buttons.entries()) button.setAttribute("aria-selected", i === j);
    $("position").hidden = false;
    $("position-title").textContent = `At token ${i}, ${visible(tokens[i].text)}`;
    showHeads(seen.attention);
    const say = ({ text, prob }) => `${visible(text)} ${(100 * prob).toFixed(0)} %`;
    $("lens").replaceChildren(...seen.lens.map((row, layer) => element("tr", {},
      element("th", { textContent: layer ? `after block ${layer - 1}` : "the embedding" }),
      ...row.map((token) => share(element("td", { textContent: say(token) }), token.prob)))));
    $("neighbours").replaceChildren(...seen.neighbours.map(({ text, cosine }) =>
      element("li", { textContent: `${visible(text)} ${cosine.toFixed(2)}` })));
    tintBySurprise();
  }

  // attention: of each layer and head, the weights of the tokens
  function showHeads(attention) {
    $("heads").replaceChildren(...attention.map((heads, layer) => element("tr", {},
      element("th", { textContent: `layer ${layer}` }),
      ...heads.map((weights, head) => element("td", {}, headButton(weights, layer, head))))));
  }

  function headButton(weights, layer, head) {
    const canvas = element("canvas", { width: weights.length, height: 1 });
    const button = element("button", { type: "button", title: `layer ${layer}, head ${head}` }, canvas);
    button.setAttribute("aria-label", `layer ${layer}, head ${head}`);
    button.setAttribute("aria-pressed", false);
    button.addEventListener("click", () => {
      const isOn = button.getAttribute("aria-pressed") === "true";
      for (const other of $("heads").querySelectorAll("button")) other.setAttribute("aria-pressed", false);
      if (isOn) return tintBySurprise();
      button.setAttribute("aria-pressed", true);
      const ofTokens = [...Array(nUnread).fill(0), ...weights];
      tint(ofTokens, "var(--accent)", (i) => `${visible(tokens[i].text)}: ` +
        (i < ofTokens.length ? `weight ${ofTokens[i].toFixed(4)}` : "later, not seen"));
    });
    const context = canvas.getContext("2d");
    context.fillStyle = getComputedStyle(document.documentElement).getPropertyValue("color");
    for (const [i, weight] of weights.entries()) {
      context.globalAlpha = weight;
      context.fillRect(i, 0, 1, 1);
    }
    return button;
  }

  $("see-form").addEventListener("submit", (event) => {
    event.preventDefault();
    shown(() => showText($("see-text").value));
  });

  const newText = newTexts();
  return (given) => {
    const text = newText(given);
    if (text === null) return;
    $("see-text").value = text;
    shown(() => showText($("see-text").value));
  };
}
