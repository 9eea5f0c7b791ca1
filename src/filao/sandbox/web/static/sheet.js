// The end: what was proved, in numbers; a sheet to print.

import { h } from "./dom.js";
import { euros, further, lesson, number, rich, say, steps, words } from "./say.js";

// A path may go on in the next line after a slash.
const broken = (path) => path.split(/(?<=\/)/).map((part) => [part, h("wbr")]);

export function sheet(scene, proofs, back) {
  const { lesson: told, stage, books } = scene;
  const sums = stage.queue;
  const date = new Date().toLocaleDateString(words.locale, { dateStyle: "long" });
  return h("main", { class: "paper", id: "stage" },
    h("div", { class: "acts no-print" }, h("button", { class: "plain", onclick: back }, say("back")), h("button", { class: "act", onclick: () => print() }, say("print"))),
    h("h1", {}, say("sheet_title")), h("p", {}, say("objective")), h("p", { class: "soft" }, say("sheet_date", { date, done: told.done.length, all: steps.length })),
    h("dl", { class: "figures" }, [[number(sums?.sent ?? 0), say("all_sent_label", { n: sums?.sent ?? 0 })], [number(sums?.acked ?? 0), say("acked_label", { n: sums?.acked ?? 0 })], [number(books.lost), say("lost_label", { n: books.lost })], [number(books.doubled), say("doubled_label", { n: books.doubled })], [euros(stage.cents), say("amount_label")]].map(([value, label]) => h("div", {}, h("dt", {}, label), h("dd", {}, value)))),
    h("p", { class: "soft" }, books.lost || books.doubled ? say("sheet_wrongs") : ""),
    h("ol", { class: "proved" }, steps.map((step) => {
      const done = told.done.includes(step.key);
      const values = Object(proofs[step.key]);
      return h("li", { class: done ? "done" : "" }, h("h2", {}, lesson[step.key].title, " ", h("span", { class: "soft" }, done ? "✓" : say("open"))), done ? h("p", {}, rich(lesson[step.key].why, values, h)) : null);
    })),
    h("h2", {}, say("further")), h("ul", { class: "further" }, further.map(([where, key]) => h("li", {}, say(key), " ", h("code", {}, broken(where))))));
}
