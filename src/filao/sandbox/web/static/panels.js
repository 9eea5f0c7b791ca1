// What lies under the stage: a claim's story, the sliders, the books, the Python, a comparison, the glossary.

import { compare } from "./compare.js";
import { h } from "./dom.js";
import { fault, glossary, number, programs, python, say, seconds } from "./say.js";

export const POLICY = 12;

export function storyPanel(scene, state, ask, show) {
  const told = scene.story;
  const find = h("form", { class: "find", onsubmit: (event) => { event.preventDefault(); show(Number(event.target.elements.claim.value)); } },
    h("label", {}, say("claim_number"), h("input", { name: "claim", type: "number", min: 1, value: state.claim || 1 })),
    h("button", { class: "plain" }, say("show")));
  if (!told) return h("div", { class: "story" }, find, h("p", { class: "soft" }, say(state.claim ? "story_unknown" : "story_none", { n: state.claim })));
  return h("div", { class: "story" }, find,
    h("p", {}, h("strong", {}, say("claim_n", { n: told.claim })), " · ", say("policy_n", { n: told.policy }),
      told.sent === null ? "" : ` · ${told.sent < 0 ? say("sent_before") : say("sent_at", { at: seconds(told.sent) })}`, " · ", say("paid_times", { n: told.paid }), " ",
      h("button", { class: "link", onclick: () => state.toTimeline(told.claim) }, say("in_timeline"))),
    h("ol", { class: "attempts" }, told.attempts.map((one) => h("li", { class: one.how || "running" },
      h("strong", {}, say("attempt_n", { n: one.attempt })), ` · ${say("consumer_n", { n: one.lane })} · `,
      `${seconds(one.from)} – ${one.to === null ? say("still") : seconds(one.to)} · `,
      one.paid === null ? "" : `${say("paid_at", { at: seconds(one.paid) })} · `,
      one.together ? say("how_together") : say(`how_${one.how || "running"}`), one.why && one.how !== "refused" ? ` (${fault(one.why)})` : ""))),
    told.dead && mending(told.dead, ask));
}

export function mending(letter, ask) {
  const send = (event, mended) => {
    event.preventDefault();
    const policy = Number(event.target.form?.elements.policy?.value ?? event.target.elements?.policy?.value ?? POLICY);
    ask({ do: "redrive", message: letter.id, mended, policy });
  };
  return h("form", { class: "mend", key: `mend-${letter.id}`, onsubmit: (event) => send(event, true) },
    h("span", {}, say("dead_because", { reason: say(`reason_${letter.reason}`), n: letter.attempts, why: fault(letter.error) })),
    h("label", {}, say("policy"), h("input", { name: "policy", type: "number", min: 0, value: POLICY })),
    h("button", { class: "plain strong" }, say("mend")),
    h("button", { class: "plain", type: "button", onclick: (event) => send(event, false) }, say("redrive")));
}

// --- load ------------------------------------------------------------------------------------------------------------

export function loadPanel(load, ask) {
  const slider = (rule, least, most, step, value, shown) => h("label", { class: "slider" }, h("span", {}, say(`slide_${rule}`)), h("output", {}, shown),
    h("input", { type: "range", min: least, max: most, step, value, oninput: (event) => ask({ do: "set", rule, value: Number(event.target.value) }) }));
  const { predicted, measured } = load;
  const grows = predicted.depth === null;
  const cell = (value, write) => (value === null || value === undefined ? "–" : write(value));
  const line = (key, write) => h("tr", {}, h("th", { scope: "row" }, say(`load_${key}`)),
    h("td", {}, predicted[key] === null && key !== "busy" ? say("grows") : cell(predicted[key], write)), h("td", {}, cell(measured?.[key], write)));
  const percent = (value) => `${number(value * 100, 0)}\u00a0%`;
  return h("div", { class: "load" },
    h("div", { class: "sliders" },
      slider("arrivals", 0, 8, 0.25, load.arrivals, `${number(load.arrivals, 2)} /s`),
      slider("work", 0.1, 4, 0.1, load.work, seconds(load.work)),
      slider("consumers", 0, 6, 1, load.consumers, number(load.consumers)),
      slider("failing", 0, 0.8, 0.05, load.failing, percent(load.failing))),
    h("table", { class: grows ? "theory over" : "theory" },
      h("thead", {}, h("tr", {}, h("td", {}), h("th", { scope: "col" }, say("predicted")), h("th", { scope: "col" }, say("measured")))),
      h("tbody", {}, line("arrivals", (value) => `${number(value, 2)} /s`), line("busy", percent), line("depth", (value) => number(value, 1)), line("latency", seconds)),
      h("caption", {}, say(grows ? "overload" : "little"))),
    h("div", { class: "charts" }, chart(say("chart_depth"), load.depth, (value) => number(value, 0)), chart(say("chart_age"), load.age, seconds)));
}

function chart(title, values, write) {
  const most = Math.max(1, ...values);
  const last = values.at(-1) ?? 0;
  const points = values.map((value, at) => `${(at * 200) / 79},${44 - (value / most) * 40}`).join(" ");
  return h("figure", { class: "chart" }, h("figcaption", {}, title, " ", h("strong", {}, write(last))),
    h("svg", { viewBox: "0 0 200 48", preserveAspectRatio: "none", "aria-hidden": "true" }, h("polyline", { points })));
}

// --- books -----------------------------------------------------------------------------------------------------------

export function booksPanel(scene, ask, show) {
  const { books, stage } = scene;
  const letters = stage.queue?.letters ?? [];
  return h("div", { class: "books" },
    h("div", {}, h("h2", {}, say("wrongs")),
      books.wrongs.length === 0 ? h("p", { class: "good" }, say("no_wrongs")) : h("ul", {}, books.wrongs.map((wrong) => h("li", {},
        h("button", { class: "link", onclick: () => show(wrong.claim) }, say("claim_n", { n: wrong.claim })), " ",
        h("strong", { class: "bad" }, wrong.kind === "lost" ? say("was_lost") : say("was_doubled", { n: wrong.paid })), " ",
        say(`why_${wrong.kind}_${wrong.cause || "nothing"}`, { n: wrong.lane }))))),
    h("div", {}, h("h2", {}, say("dead_letters")),
      letters.length === 0 ? h("p", { class: "soft" }, say("no_dead")) : letters.map((letter) => h("div", { key: letter.id }, h("strong", {}, say("claim_n", { n: letter.claim })), " ", mending(letter, ask)))));
}

// --- python, glossary ------------------------------------------------------------------------------------------------

export function pythonPanel(step, state) {
  const code = programs[step];
  return h("div", { class: "python" },
    h("div", { class: "own" }, h("p", {}, say("python_hint")), h("p", {}, say("own_hint")), h("code", { class: "command" }, `${python.replace(/python[\d.]*$/, "filao")} work my_worker:worker`),
      h("div", { class: "acts" }, copy(code ?? "", state), h("button", { class: "plain", onclick: () => download("my_worker.py", programs.my_worker) }, say("download", { name: "my_worker.py" })))),
    h("pre", { class: "program", tabindex: 0, role: "region", "aria-label": say("python") }, code ?? ""));
}

export const copy = (text, state) => h("button", { class: "plain", onclick: () => navigator.clipboard?.writeText(text).then(() => state.tell(say("copied"))) }, say("copy"));

export function download(name, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/x-python" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

export const glossaryPanel = () => h("dl", { class: "glossary" }, glossary.map(([word, meaning]) => h("div", {}, h("dt", {}, word), h("dd", {}, meaning))));

export const comparePanel = (state) => compare(state);
