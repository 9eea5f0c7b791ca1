// Step 11: an editor, the checks of what is in it, and how it runs outside.
// Under the text lies the same text, unseen, line by line: long lines break at the same places, and each has its number.

import { h } from "./dom.js";
import { copy, download } from "./panels.js";
import { fill, lesson, mayRunCode, programs, python, say, translated } from "./say.js";

const KEPT = "filao-code";
const MINE = "filao-code-mine"; // what stood in the editor when the skeleton was asked for
const NOTHING = "\u200b"; // keeps an empty line as high as others

export const kept = () => localStorage.getItem(KEPT) ?? programs.my_consumer;

export function editor(told, state, ask) {
  if (!mayRunCode) return h("section", { class: "editor off" }, h("p", {}, say("error_no_code")));
  const bad = told.checks.map((check) => Number(check.values.line ?? 0)).find((line) => line > 0);
  const lines = state.code.split("\n");
  const run = () => ask({ do: "check", code: state.code });
  return h("section", { class: "editor", "aria-label": say("editor") },
    h("div", { class: "sheet-of" },
      h("pre", { class: "mirror", "aria-hidden": "true" }, lines.map((line, at) => h("span", { class: `line${at + 1 === bad ? " bad" : ""}`, "data-line": at + 1 }, line || NOTHING))),
      h("textarea", {
        class: "code", spellcheck: "false", autocapitalize: "off", autocomplete: "off", "aria-label": say("editor_label"), value: state.code,
        oninput: (event) => state.write(event.target.value), onkeydown: (event) => keys(event, state, run),
        onscroll: align,
      })),
    h("div", { class: "run" },
      h("div", { class: "acts" },
        h("button", { class: "act", "data-act": "check", disabled: told.running, onclick: run }, say(told.running ? "checking" : "check")),
        h("button", { class: "plain", disabled: !told.running, onclick: () => ask({ do: "stop" }) }, say("stop")),
        swap(state)),
      h("ol", { class: "checks", "data-run": told.run, "data-running": told.running }, told.checks.map((check) => h("li", { class: check.state, "data-check": check.key, "data-state": check.state },
        h("strong", {}, h("span", { class: "mark", "aria-hidden": "true" }, { open: "○", running: "…", green: "✓", red: "✖\ufe0e" }[check.state]), " ", fill(lesson.implement.conditions[check.key]),
          h("span", { class: "sr-only" }, ` (${say(`check_${check.state}`)})`)),
        check.told && check.state !== "open" && check.state !== "running" ? h("p", {}, reason(check)) : null)))));
}

// The skeleton takes the place of the learner's code, and gives it back: nothing that was written is lost by a press.
function swap(state) {
  const mine = localStorage.getItem(MINE);
  const isSkeleton = state.code === programs.my_consumer;
  const exchange = () => {
    if (!isSkeleton) localStorage.setItem(MINE, state.code);
    state.write(isSkeleton ? mine : programs.my_consumer, true);
  };
  return h("button", { class: "plain swap", disabled: isSkeleton && !mine, onclick: exchange }, say(isSkeleton && mine ? "mine" : "anew"));
}

// What Python itself says, in the words of the page where these are known; then its own words stand behind, small.
function reason({ told, values }) {
  const error = translated(values.error ?? "");
  return error ? [say(`told_${told}`, { ...values, error }), " ", h("small", { lang: "en" }, values.error)] : say(`told_${told}`, values);
}

function keys(event, state, run) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    run();
  } else if (event.key === "Escape") state.leaves = true; // and the next Tab leaves the editor
  else if (event.key === "Tab" && !event.shiftKey && !state.leaves) {
    event.preventDefault();
    event.target.setRangeText("    ", event.target.selectionStart, event.target.selectionEnd, "end");
    state.write(event.target.value);
  } else state.leaves = false;
}

// The numbers stand beside their lines, wherever these were scrolled to.
export function align() {
  const code = document.querySelector("textarea.code");
  if (code) code.previousSibling.scrollTop = code.scrollTop;
}

export function keep(code) {
  localStorage.setItem(KEPT, code);
}

export function outside(told, state) {
  return h("div", { class: "outside" },
    h("div", {}, h("h2", {}, say("output")), h("pre", { class: "output", tabindex: 0, role: "region", "aria-label": say("output") }, told.output || say("no_output"))),
    h("div", {}, h("h2", {}, say("outside")), h("p", {}, say("outside_hint")), h("code", { class: "command" }, `${python} my_consumer.py`),
      h("div", { class: "acts" }, h("button", { class: "plain", onclick: () => download("my_consumer.py", state.code) }, say("download", { name: "my_consumer.py" })), copy(state.code, state))));
}
